"""The package held to the house's rules, and each rule to something that breaks it."""

from functools import cache
from pathlib import Path

import pytest
from house_rules import (
    DECIDE,
    DIRECT,
    DOORS,
    KINDS_OF_DENSITY,
    LONGER,
    MAX_LINES,
    MAY_IMPORT,
    REACHED,
    RULES,
    WHOLE_CONFIG,
    command_line_is_on_top,
    decisions_in_one_place,
    direct_imports,
    down_only,
    every_module_states_what_it_offers,
    every_room_has_its_place,
    folders_are_no_modules,
    kinds_of_density_in_one_file,
    loading_does_without_training,
    modules_are_short,
    no_cycle_of_folders,
    no_cycle_of_modules,
    no_relative_imports,
    nothing_goes_through_the_root,
    nothing_touches_global_matplotlib,
    paper_from_runs_alone,
    potentials_are_opened_late_and_by_readers_alone,
    reached_imports,
    whole_config_at_the_top,
)
from package_tree import Package, folder_of, read

PACKAGE = read(Path(__file__).resolve().parent.parent)


@cache
def _found(rule):
    return frozenset(rule(PACKAGE))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    assert sorted(_found(rule)) == []


@pytest.mark.parametrize("rule", [direct_imports, reached_imports], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("module", sorted(PACKAGE.modules))
def test_what_a_module_loads(module, rule):
    assert [line for line in _found(rule) if line.split()[0] == module] == []


_ALL = "__all__ = []\n"
# Modules that break a rule, and what it says of them.
BROKEN = {
    down_only: (
        {
            "molecule.a": "def f():\n  from openmm_cgflow.forces import b",
            "forces.b": "",
            "forces.c": "import openmm_cgflow.cli",
            "cli": "",
        },
        {"molecule.a imports forces", "forces.c imports cli"},
    ),
    every_room_has_its_place: (
        {"chapel.a": "", "attic": ""},
        {"chapel is not in the table", "attic is not in the table"},
    ),
    no_cycle_of_modules: (
        {
            "molecule.a": "if TYPE_CHECKING:\n  from openmm_cgflow.molecule import b",
            "molecule.b": "def f():\n  from openmm_cgflow.molecule.a import c",
        },
        {"molecule.a molecule.b"},
    ),
    no_cycle_of_folders: (
        {
            "forces.a": "from openmm_cgflow.networks import b",
            "forces.d": "",
            "networks.b": "",
            "networks.c": "from openmm_cgflow.forces.d import e",
        },
        {"forces networks"},
    ),
    direct_imports: (
        {"training.pmf.a": "def f():\n  import openmm.app", "engines.b": "from torch import nn", "cli": "import numpy"},
        {"training.pmf.a imports openmm", "engines.b imports torch", "cli imports numpy"},
    ),
    reached_imports: (
        {
            "engines.a": "from openmm_cgflow.molecule import b, potentials",
            "molecule.b": "import openmm",
            "molecule.potentials": "import torch",
            "forces.c": "def f():\n  from openmm_cgflow.engines import a",
        },
        {"forces.c reaches openmm"},
    ),
    potentials_are_opened_late_and_by_readers_alone: (
        {
            "molecule.potentials": "",
            "molecule.readers": "from openmm_cgflow.molecule.potentials import a",
            "molecule.b": "def f():\n  from openmm_cgflow.molecule import potentials",
        },
        {"molecule.readers, line 1", "molecule.b"},
    ),
    loading_does_without_training: (
        {
            "runs.load": "def f():\n  from openmm_cgflow.model import a",
            "model.a": "from openmm_cgflow.training.pmf import b",
            "training.pmf.b": "",
        },
        {"runs.load reaches training.pmf.b"},
    ),
    whole_config_at_the_top: (
        {"config": "", "runs.a": "import openmm_cgflow.config", "model.b": "from openmm_cgflow.config import Config"},
        {"model.b"},
    ),
    paper_from_runs_alone: ({"paper.a": "", "cli": "def f():\n  from openmm_cgflow.paper import a"}, {"cli"}),
    command_line_is_on_top: ({"cli": "", "runs.a": "from openmm_cgflow.cli import main"}, {"runs.a"}),
    nothing_goes_through_the_root: (
        {"runs.train": "", "a": "from openmm_cgflow import train", "b": "from openmm_cgflow import __version__"},
        {"a imports runs.train", "b imports __init__"},
    ),
    no_relative_imports: ({"forces.a": "\nfrom .b import c", "forces.b": ""}, {"forces.a, line 2"}),
    decisions_in_one_place: (
        {
            "a": "if config.training.method == 'pmf': ...",
            "b": "if 'internal' != kind: ...",
            "c": "match settings.kind:\n  case 'box': ...",
            "d": "x = 1 if method in ('pmf', 'joint') else 2",
            "e": "if structure.target is not None: ...",
            "f": "isinstance(engine, (Lattice, lattice.LatticeEngine))",
            "g": "isinstance(x, Map | LinearMap)",
            "settings": "if self.method == 'pmf': ...",
            "runs.build": "if self.kind == 'box': ...",
            "h": "force.kind == 'HarmonicBondForce'",
        },
        {
            "a: method compared",
            "b: kind compared",
            "c: match kind",
            "d: method compared",
            "e: target is None",
            "f: isinstance LatticeEngine",
            "g: isinstance LinearMap",
        },
    ),
    kinds_of_density_in_one_file: (
        {"model.a": "if self.pmf is None: ...", "b": "joint is not None", "model.density": "if pmf is None: ..."},
        {"model.a: pmf", "b: joint"},
    ),
    every_module_states_what_it_offers: (
        {"a": "# __all__\n", "b": _ALL, "c": "__all__: list[str] = []", "d": "def f():\n  __all__ = []"},
        {"__init__", "a", "d"},
    ),
    modules_are_short: ({"a": "\n" * (MAX_LINES + 1), "b": "\n" * MAX_LINES}, {"a"}),
    folders_are_no_modules: (
        {"a.__init__": f"'A.'\n{_ALL}", "b.__init__": "", "c.__init__": "'C.'\nimport numpy\n", "d.__init__": _ALL},
        {"b.__init__", "c.__init__", "d.__init__"},
    ),
    nothing_touches_global_matplotlib: ({"a": "from matplotlib import pyplot", "b": "# no pyplot"}, {"a"}),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_can_fail(rule):
    sources, said = BROKEN[rule]
    assert set(rule(Package({"__init__": '_HOME = {"train": "runs.train"}\n', **sources}))) == said


def test_tables_name_what_exists():
    """An exception for a module that is gone, or has another name now, would let its successor through."""
    named = {*DIRECT, *REACHED, *DOORS, *WHOLE_CONFIG, *DECIDE, *KINDS_OF_DENSITY, *MAY_IMPORT, *LONGER}
    missing = named - set(map(folder_of, PACKAGE.modules)) - set(PACKAGE.modules)
    assert missing == set()
