"""The house's rules: who may import whom, what may load torch and OpenMM, and where decisions are made.

Each rule is a function from the package's syntax trees (benchmarks/package_tree.py reads them, imports inside functions
and under ``if TYPE_CHECKING`` too) to what breaks it, a line each. Lists of modules are for exceptions only: the rest
is a table of folders. test_layers.py holds the package to the rules, and each rule to something that breaks it.
"""

import ast
from typing import get_args

import networkx as nx
from package_tree import cycles, folder_of

from openmm_cgflow.config import Config

GROUND = "_version describe errors seeds settings units"
# Folders and files at the root, each with those that it may import besides the ground and itself: down only.
MAY_IMPORT = {
    "_version": "",
    "errors": "",
    "seeds": "",
    "units": "",
    "settings": "",
    "describe": "",
    "config": "",
    "molecule": "",
    "coordinates": "molecule",
    "engines": "molecule",
    "forces": "molecule coordinates engines",
    "networks": "molecule coordinates forces",
    "model": "molecule coordinates engines forces networks",
    "training": "molecule coordinates forces networks model",
    "files": "",
    "analysis": "molecule coordinates files",  # torsions by Z-matrix; what it may reach keeps out the rest
    "paper": "molecule coordinates engines forces networks training model files analysis",
    "runs": "config molecule coordinates engines forces networks training model files analysis paper",
    "openmmml_plugin": "molecule model runs",
    "options": "",
    "cli": "options config molecule files analysis model runs",
    "__main__": "cli",
    "__init__": "",
}

_NEURAL, _MOLECULAR, _PLOTS = {"torch", "zuko"}, {"openmm", "parmed"}, {"matplotlib"}
_HEAVY = _NEURAL | _MOLECULAR | _PLOTS | {"mdtraj"}
# What a folder, or one of its modules where it is named as well, must not import itself, also not inside a function.
DIRECT = {
    **dict.fromkeys(
        ["_version", "errors", "seeds", "settings", "describe", "config", "__init__", "__main__", "options"], _HEAVY
    ),
    "cli": _HEAVY | {"numpy"},
    "openmmml_plugin": _HEAVY - {"openmm"},
    "units": _HEAVY - {"openmm"},
    "molecule": _NEURAL | _PLOTS,
    "molecule.bonds": _HEAVY,
    "molecule.potentials": _PLOTS,
    "molecule.torch_force": _PLOTS,
    **dict.fromkeys(["coordinates", "forces", "networks", "training"], _HEAVY - _NEURAL),
    "coordinates.zmatrix": _HEAVY,
    "engines": _HEAVY - {"openmm"},
    "model": _PLOTS,
    "files": _HEAVY,
    "files.trajectory": _HEAVY - {"mdtraj"},
    "analysis": _HEAVY - {"mdtraj"},
    "analysis.plots": _HEAVY - _PLOTS,
    "paper": _PLOTS,
    "runs": _PLOTS,
    "runs.evaluate": _HEAVY - {"mdtraj"},
}
# What it must not reach through the package either.
REACHED = {
    **dict.fromkeys(["errors", "seeds", "units", "settings", "config", "__init__"], _HEAVY - {"openmm"}),
    "molecule": _NEURAL,
    "molecule.bonds": _HEAVY,
    "molecule.potentials": set(),
    "molecule.torch_force": set(),
    **dict.fromkeys(["coordinates", "forces", "networks", "training"], _MOLECULAR),
    "coordinates.zmatrix": _HEAVY,
    "engines": _NEURAL,
    "files": _HEAVY,
    "files.trajectory": _NEURAL | _MOLECULAR,
    "analysis": _NEURAL | _MOLECULAR,
    "runs.evaluate": _NEURAL,
}
# `units` is the door for openmm.unit and leads nowhere else; `potentials` is the one to torch for configurations that
# ask for it, `runs.exact` the one for evaluations of synthetic targets.
DOORS = {"units", "molecule.potentials", "runs.exact"}

# Where the whole of the settings may be seen: everything below takes its own section.
WHOLE_CONFIG = {"config", "runs", "cli", "__init__"}
# Where the kind of coordinates, the method, or a synthetic target may be asked for.
DECIDE = {"runs.build", "runs.loop", "settings", "config"}
_WORDS = {
    word
    for section, name in (("coordinates", "kind"), ("training", "method"))
    for word in get_args(Config.model_fields[section].annotation.model_fields[name].annotation)
}
# The one place that knows which networks a trained model has.
KINDS_OF_DENSITY = {"model.density"}
MAX_LINES = 300
LONGER: dict[str, str] = {
    "settings": "one list of all settings with their descriptions",
    "paper.exact": "one comparison with its record and its table, for the publication alone",
}
"""Modules that may be longer, and why."""


def down_only(package):
    for name, module in package.modules.items():
        here = folder_of(name)
        allowed = {here, *GROUND.split(), *MAY_IMPORT.get(here, "").split()}
        for one in module.imports:
            # What goes through the root has a rule of its own.
            if one.inside and folder_of(one.target) not in allowed and not one.root:
                yield f"{name} imports {folder_of(one.target)}"


def every_room_has_its_place(package):
    for name in package.modules:
        if folder_of(name) not in MAY_IMPORT:
            yield f"{folder_of(name)} is not in the table"


def no_cycle_of_modules(package):
    yield from (" ".join(names) for names in cycles(package.graph(typing=True)))


def no_cycle_of_folders(package):
    yield from (" ".join(names) for names in cycles(package.folder_graph(typing=True)))


def direct_imports(package):
    for name, module in package.modules.items():
        for other in sorted(module.outside() & _of(DIRECT, name)):
            yield f"{name} imports {other}"


def reached_imports(package):
    for name in package.modules:
        for other in sorted(package.reached(name, DOORS) & _of(REACHED, name)):
            yield f"{name} reaches {other}"


def potentials_are_opened_late_and_by_readers_alone(package):
    for name, module in package.modules.items():
        for one in module.imports:
            # Under type hints nothing is loaded.
            if one.target == "molecule.potentials" and not one.typing and (name != "molecule.readers" or not one.lazy):
                yield f"{name}, line {one.line}" if name == "molecule.readers" else name


def loading_does_without_training(package):
    graph = package.graph()
    if "runs.load" in graph:
        below = sorted(nx.descendants(graph, "runs.load"))
        yield from (f"runs.load reaches {name}" for name in below if folder_of(name) == "training")


def whole_config_at_the_top(package):
    for name, module in package.modules.items():
        if folder_of(name) not in WHOLE_CONFIG and any(one.target == "config" for one in module.imports):
            yield name


def paper_from_runs_alone(package):
    for name, module in package.modules.items():
        if folder_of(name) not in ("paper", "runs") and "paper" in map(folder_of, module.inside(typing=True)):
            yield name


def command_line_is_on_top(package):
    for name, module in package.modules.items():
        if name != "__main__" and "cli" in module.inside(typing=True):
            yield name


def nothing_goes_through_the_root(package):
    for name, module in package.modules.items():
        for one in module.imports:
            if one.root:
                yield f"{name} imports {one.target}"


def no_relative_imports(package):
    for name, module in package.modules.items():
        yield from (f"{name}, line {one.line}" for one in module.imports if one.relative)


def decisions_in_one_place(package):
    """Comparisons of a kind or a method with a word, of a target with None, and of engines and maps by class."""
    for name, module in package.modules.items():
        if name in DECIDE or name.endswith(".settings"):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Compare) and (word := _decision(node)):
                yield f"{name}: {word}"
            if isinstance(node, ast.Match) and _last(node.subject) in ("kind", "method"):
                yield f"{name}: match {_last(node.subject)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                for word in ("LatticeEngine", "LinearMap"):
                    if word in ast.unparse(node.args[1]):
                        yield f"{name}: isinstance {word}"


def kinds_of_density_in_one_file(package):
    """``pmf is None`` and the like: which networks a model has is known to one file."""
    for name, module in package.modules.items():
        if name in KINDS_OF_DENSITY:
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Compare) and _is_none(node) and _last(node.left) in ("pmf", "joint", "response"):
                yield f"{name}: {_last(node.left)}"


def every_module_states_what_it_offers(package):
    for name, module in package.modules.items():
        names = [ast.unparse(target) for node in module.tree.body for target in _targets(node)]
        if "__all__" not in names:
            yield name


def modules_are_short(package):
    for name, module in package.modules.items():
        if module.n_lines > MAX_LINES and name not in LONGER:
            yield name
    for name in LONGER:
        if name in package.modules and package.modules[name].n_lines <= MAX_LINES:
            yield f"{name} needs no exception"


def folders_are_no_modules(package):
    """Their ``__init__`` holds a docstring and an empty ``__all__``."""
    for name, module in package.modules.items():
        if name.endswith(".__init__"):
            rest = module.tree.body[1:] if ast.get_docstring(module.tree) else module.tree.body
            if not ast.get_docstring(module.tree) or any("__all__" not in map(ast.unparse, _targets(n)) for n in rest):
                yield name


def nothing_touches_global_matplotlib(package):
    for name, module in package.modules.items():
        if "pyplot" in module.text.replace("no pyplot", ""):
            yield name


RULES = (
    down_only,
    every_room_has_its_place,
    no_cycle_of_modules,
    no_cycle_of_folders,
    direct_imports,
    reached_imports,
    potentials_are_opened_late_and_by_readers_alone,
    loading_does_without_training,
    whole_config_at_the_top,
    paper_from_runs_alone,
    command_line_is_on_top,
    nothing_goes_through_the_root,
    no_relative_imports,
    decisions_in_one_place,
    kinds_of_density_in_one_file,
    every_module_states_what_it_offers,
    modules_are_short,
    folders_are_no_modules,
    nothing_touches_global_matplotlib,
)


def _of(table, name):
    """The entry of a module, else of its folder."""
    return table.get(name, table.get(folder_of(name), set()))


def _last(node):
    """The last word of ``a.b.c``."""
    return ast.unparse(node).split(".")[-1] if isinstance(node, ast.Name | ast.Attribute) else ""


def _is_none(node):
    return isinstance(node.ops[0], ast.Is | ast.IsNot) and ast.unparse(node.comparators[0]) == "None"


def _decision(node):
    sides = [node.left, *node.comparators]
    for side in sides:
        if _last(side) in ("kind", "method") and any(_has_word(other) for other in sides):
            return f"{_last(side)} compared"
    return "target is None" if _is_none(node) and ast.unparse(node.left).endswith(".target") else ""


def _has_word(node):
    return any(isinstance(one, ast.Constant) and one.value in _WORDS for one in ast.walk(node))


def _targets(node):
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
