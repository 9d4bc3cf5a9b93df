"""Who may import whom, read from the syntax trees: imports inside functions count as well."""

import ast
from functools import cache

import pytest

import openmm_cgflow

_NEURAL, _MOLECULAR = {"torch", "zuko"}, {"openmm", "parmed"}
_FLOW_SIDE = ["coordinates", "internal", "flow", "tempering", "harmonic", "assembly", "meanforce", "training"]
_FLOW_SIDE += ["averaging", "pmf", "distillation", "pmf_training", "splines", "ladder", "joint", "joint_training"]
_FLOW_SIDE += ["fastchains", "switching", "paths", "values", "prior", "dimenet", "freeenergy", "charts"]
_EVALUATION = ["states", "distances", "reference", "observables", "comparison", "basins", "report", "evaluation"]
_WORKER_SIDE = ["system", "loaders", "sanitize", "topology", "partition", "zmatrix"]
_WORKER_SIDE += [
    "platforms",
    "chain",
    "replicas",
    "contexts",
    "lattice",
    "replicate",
    "batched",
    "errors",
    "units",
    "config",
]

# What a module must not import itself.
_DIRECT = {
    **{name: _MOLECULAR | {"mdtraj"} for name in (*_FLOW_SIDE, "zmatrix")},
    **{name: _NEURAL | _MOLECULAR for name in ("export", "plots", *_EVALUATION)},
    **{name: _NEURAL | _MOLECULAR | {"mdtraj"} for name in ("config", "template")},
    "cli": _NEURAL | _MOLECULAR | {"mdtraj", "matplotlib", "numpy"},
}
# What it must not reach through the package either. `units` is the door for openmm.unit and leads nowhere else;
# `potentials` is the one to torch for configurations that ask for it, and is imported by nothing else.
_REACHED = {
    **{name: _MOLECULAR for name in _FLOW_SIDE},
    **{name: _NEURAL for name in _WORKER_SIDE},
    **{name: _NEURAL for name in _EVALUATION},
    **{name: _NEURAL | _MOLECULAR for name in ("states", "distances", "reference", "observables", "comparison")},
    **{name: _NEURAL | _MOLECULAR | {"mdtraj"} for name in ("rundir", "runlog", "files")},
}
_DOORS = {"units", "potentials"}


@pytest.fixture(scope="module")
def imports(root):
    """Of each module: the modules of the package and the outside packages that it imports."""
    folder = root / "openmm_cgflow"
    names = {path.stem for path in folder.glob("*.py")}
    return {path.stem: _read(path.read_text(), names) for path in folder.glob("*.py")}


def _read(source, names):
    inside, outside = set(), set()
    for node in _nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide from this test"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            first, *rest = target.split(".")
            if first != openmm_cgflow.__name__:
                outside.add(first)
            elif rest and rest[0] in names:
                inside.add(rest[0])
            elif rest:
                # A name from __init__, which finds it lazily in another module.
                inside.add(openmm_cgflow._HOME.get(rest[0], "__init__"))
    return inside, outside


def _nodes(node):
    """Every node but those under ``if TYPE_CHECKING``, which nothing executes."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from _nodes(child)


def test_reader_sees_every_form():
    source = "import a.b\nfrom c import d\ndef f():\n  import e\nif TYPE_CHECKING:\n  import g\n"
    source += "from openmm_cgflow import units, train\nfrom openmm_cgflow.config import Config\n"
    assert _read(source, {"units", "config"}) == ({"units", "config", "runner"}, {"a", "c", "e"})


@pytest.mark.parametrize("module", sorted(_DIRECT))
def test_direct_imports(imports, module):
    _, outside = imports[module]
    assert not outside & _DIRECT[module]


@pytest.mark.parametrize("module", sorted(_REACHED))
def test_reached_imports(imports, module):
    @cache
    def reached(name):
        inside, outside = (set(), set()) if name in _DOORS else imports[name]
        return outside.union(*(reached(other) for other in inside))

    assert not reached(module) & _REACHED[module]


def test_no_cycles(imports):
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(imports[name][0]):
                visit(other)
            path.pop()
            done.add(name)

    for name in imports:
        visit(name)


def test_command_line_is_on_top(imports):
    assert {name for name, (inside, _) in imports.items() if "cli" in inside} == {"__main__"}


def test_every_module_states_what_it_offers(root):
    for path in (root / "openmm_cgflow").rglob("*.py"):
        assert "__all__" in path.read_text(), path


def test_nothing_touches_global_matplotlib(root):
    for path in (root / "openmm_cgflow").rglob("*.py"):
        assert "pyplot" not in path.read_text().replace("no pyplot", ""), path
