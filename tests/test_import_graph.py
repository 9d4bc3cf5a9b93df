"""The table of imports: every form that an import can take, and graphs, walks and chains whose numbers are known."""

import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import from_pdb_to_dcd, table, walk
from package_tree import Package, chain, cycles, levels, longest, read

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

ROOT = '_HOME = {"train": "runs.train"}\n'
EMPTY = '"""Nothing."""\n'


def _inside(source, *names):
    package = Package({"__init__": ROOT, "runs.train": "", **dict.fromkeys(names, ""), "here.one": source})
    return package.modules["here.one"]


def test_reader_sees_every_form():
    source = "import a.b\nfrom c import d\ndef f():\n  import e\nif TYPE_CHECKING:\n  import g\n"
    source += "from openmm_cgflow import units, train\nfrom openmm_cgflow.config import Config\n"
    module = _inside(source, "units", "config")
    assert (module.inside(), module.outside()) == ({"units", "config", "runs.train"}, {"a", "c", "e"})
    assert [one.target for one in module.imports if one.lazy] == ["e"]
    assert [one.target for one in module.imports if one.typing] == ["g"]
    assert [one.target for one in module.imports if one.root] == ["runs.train"]


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("import openmm_cgflow.there.two", "there.two"),
        ("import openmm_cgflow.there.two as two", "there.two"),
        ("from openmm_cgflow.there import two", "there.two"),
        ("from openmm_cgflow.there.two import name", "there.two"),
        ("from openmm_cgflow.there import name", "there.__init__"),
        ("import openmm_cgflow.there", "there.__init__"),
        ("import openmm_cgflow", "__init__"),
        ("from openmm_cgflow import __version__", "__init__"),
        ("from .two import name", "here.two"),
        ("from . import two", "here.two"),
        ("from ..there.two import name", "there.two"),
        ("from ..there import two", "there.two"),
        ("class A:\n def f(self):\n  try:\n   from openmm_cgflow.there import two\n  finally: ...", "there.two"),
        ("if not TYPE_CHECKING:\n  from openmm_cgflow.there import two", "there.two"),
        ("if TYPE_CHECKING: ...\nelse:\n  from openmm_cgflow.there import two", "there.two"),
    ],
)
def test_reader_finds_the_module(line, target):
    module = _inside(line, "there.__init__", "there.two", "here.two")
    assert module.inside() == {target}
    assert any(one.relative for one in module.imports) == ("from ." in line)


@pytest.fixture
def package():
    """``cli`` calls down to ``low.a`` and ``low.b``, and up again; ``high.c`` and ``high.d`` are a cycle."""
    return Package(
        {
            "__init__": ROOT,
            "cli": "from openmm_cgflow.high.c import run\ndef _train():\n  run(_words())\ndef _words(): ...\n",
            "high.__init__": EMPTY,
            "high.c": "from openmm_cgflow.low import a, b\nfrom openmm_cgflow.low.b import Thing\n"
            "if TYPE_CHECKING:\n  from openmm_cgflow.high.d import d\n"
            "def run(x):\n  thing = Thing()\n  Thing.make()\n  b.write_trajectory(a.load_files())\n  a.load_files()\n",
            "high.d": "from openmm_cgflow.high import c\nfrom openmm_cgflow.low.b import write_trajectory\n",
            "low.a": "def load_files(): _other()\ndef _other(): ...\n",
            "low.b": "from openmm_cgflow.low import a\nclass Thing:\n  def __init__(self): self.f()\n"
            "  def f(self): a.load_files()\n  @classmethod\n  def make(cls): ...\ndef write_trajectory(x): ...\n",
        }
    )


def test_storeys_and_cycles(package):
    assert levels(package.graph())["cli"] == 4
    assert levels(package.graph(typing=True)) == {
        "__init__": 1,
        "high.__init__": 1,
        "low.a": 1,
        "low.b": 2,
        "high.c": 4,
        "high.d": 4,
        "cli": 5,
    }
    assert cycles(package.graph()) == []
    assert cycles(package.graph(typing=True)) == [["high.c", "high.d"]]
    assert cycles(package.folder_graph(typing=True)) == []
    assert longest(package.folder_graph()) == ["cli", "high", "low"]
    assert set(package.folder_graph().edges) == {("cli", "high"), ("high", "low")}


def test_walk_follows_the_calls(package):
    # _words, run, Thing and its f, load_files and _other, Thing.make and write_trajectory; the rest was entered before.
    assert walk(package, "_train") == ["cli", "high.c", "low.b", "low.a", "low.b"]


def test_chain_from_structure_to_trajectory(package):
    graph = package.graph(typing=True)
    assert chain(graph, "cli", "low.a") == ["cli", "high.c", "high.d", "low.b", "low.a"]
    assert chain(graph, "low.a", "cli") == []
    assert from_pdb_to_dcd(package) == ["low.a", "low.b", "high.d", "high.c", "low.b"]


def test_reached_stops_at_doors():
    package = Package(
        {"__init__": ROOT, "a": "from openmm_cgflow import b", "b": "from openmm_cgflow import c", "c": "import torch"}
    )
    assert package.reached("a") == {"torch"}
    assert package.reached("a", {"b"}) == set()
    assert package.reached("c", {"c"}) == {"torch"}


def test_the_command_prints_the_table_of_this_tree(root):
    command = [sys.executable, BENCHMARKS / "import_graph.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == table(read(root))
    numbers = {line[:22].strip(): line[22:].split() for line in printed}
    assert int(numbers["modules"][0]) == len(list((root / "openmm_cgflow").rglob("*.py")))
    counts = list(map(int, numbers["cli train"]))
    for places, moves, climbs in (counts[:3], counts[3:]):
        assert 0 < climbs < moves
        assert 10 < places <= moves + 1
    assert all(few <= many for few, many in zip(counts[:3], counts[3:], strict=True))


def test_the_command_refuses_a_tree_without_the_package(tmp_path):
    command = [sys.executable, BENCHMARKS / "import_graph.py", "--tree", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "no package here" in ended.stderr
