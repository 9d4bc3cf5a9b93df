"""Who imports whom in the package, as a table: storeys, cycles, edges, and the way through the modules of a command.

    python benchmarks/import_graph.py [--tree PATH]

Read from the syntax trees, so any checkout can be looked at, and nothing is imported. tests/test_layers.py holds the
rules on the same graph. The terms of the table:

- **module**: a file; **folder**: one directly in the package, with all that it holds, or a file at the package's root.
- **storeys**: modules on the longest chain of imports (those of a cycle count as they come); of folders likewise.
- **cycle**: modules that reach one another by imports; of folders, imports inside a folder do not count.
- **through the root**: ``from openmm_cgflow import x``, where x is not a module.
- **type hints**: imports under ``if TYPE_CHECKING``. Nothing executes them, but a reader follows them all the same.
- **moves**: the functions that a command calls, depth first in the order of the calls and each once: a move is from one
  to the next in another folder or module, a **climb** a move to a higher storey. Calls are followed where the syntax
  says what is called: a function or class of this or an imported module, a method of ``self`` or of a class by its
  name. What an object answers that was handed in cannot be followed.
- **from a PDB to a DCD**: the longest chain of imports from a module that calls the writer of trajectories down to the
  module that reads structures, and the writer: what stands between the file that comes in and the one that goes out.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from itertools import pairwise
from pathlib import Path

from package_tree import Package, chain, cycles, definitions, folder_of, levels, longest, read

__all__ = ["from_pdb_to_dcd", "table", "walk"]

READER, WRITER = "load_files", "write_trajectory"
"""The functions at both ends of the data's path."""
STARTS = {"cli train": "_train", "cli check": "_check", "train(config)": "train", "load": "load"}
"""Walks of the table and the function each begins with; of two with that name, the one of the module on top."""
LONG = 300


def from_pdb_to_dcd(package: Package) -> list[str]:
    """The reader's module, those up to one that calls the writer, and the writer's."""
    graph = package.graph(typing=True)
    reader, writer = package.home(READER), package.home(WRITER)
    callers = [name for name in package.modules if (writer, WRITER) in package.imported_names(name).values()]
    longest = max((chain(graph, name, reader) for name in callers), key=lambda path: (len(path), path), default=[])
    return [*reversed(longest), writer]


def walk(package: Package, function: str) -> list[str]:
    """The modules of the functions that a function's calls lead to, in the order of the calls."""
    known = {name: definitions(module.tree) for name, module in package.modules.items()}
    names = {name: package.imported_names(name) for name in package.modules}
    entered: set[tuple[str, str]] = set()
    start = package.home(function)
    path = [start]

    def called(node: ast.expr, module: str, owner: str) -> tuple[str, str] | None:
        words = ast.unparse(node).split(".")
        if words[0] in ("self", "cls") and len(words) == 2:
            found = (module, f"{owner}.{words[1]}")
        elif words[0] in names[module]:
            home, name = names[module][words[0]]
            found = (home, ".".join([*([name] if name else []), *words[1:]]))
        else:
            found = (module, ".".join(words))
        return found if found[1] in known.get(found[0], {}) else None

    def enter(module: str, name: str) -> None:
        if (module, name) in entered:
            return
        entered.add((module, name))
        if path[-1] != module:
            path.append(module)
        node = known[module][name]
        if isinstance(node, ast.ClassDef):
            for method in ("__init__", "__post_init__"):
                if f"{name}.{method}" in known[module]:
                    enter(module, f"{name}.{method}")
            return
        owner = name.split(".")[0] if "." in name else ""
        for call in sorted((one for one in ast.walk(node) if isinstance(one, ast.Call)), key=_position):
            if (found := called(call.func, module, owner)) is not None:
                enter(*found)

    enter(start, function)
    return path


def _position(call: ast.Call) -> tuple[int, int]:
    # Where the call ends: its arguments are called before it.
    return call.end_lineno or 0, call.end_col_offset or 0


def _moves(path: list[str], storeys: dict[str, int]) -> tuple[int, int, int]:
    """How many different places, moves from one to another, and climbs among these."""
    moves = [(a, b) for a, b in pairwise(path) if a != b]
    return len(set(path)), len(moves), sum(storeys[b] > storeys[a] for a, b in moves)


def table(package: Package) -> list[str]:
    """What the command prints."""
    graph, hinted = package.graph(), package.graph(typing=True)
    folders, hinted_folders = package.folder_graph(), package.folder_graph(typing=True)
    leaving = [sum(folder_of(a) != folder_of(b) for a, b in one.edges) for one in (graph, hinted)]
    at_root = sum("." not in name for name in graph)
    roots = [one for module in package.modules.values() for one in module.imports if one.root]
    lengths = {name: module.n_lines for name, module in package.modules.items()}
    largest = max(lengths, key=lambda name: lengths[name])
    n_folders = folders.number_of_nodes() - at_root
    rows = [
        ("modules", graph.number_of_nodes(), ""),
        ("folders, files at the root", f"{n_folders}, {at_root}", ""),
        ("storeys of modules", *(max(levels(one).values()) for one in (graph, hinted))),
        ("storeys of folders", *(max(levels(one).values()) for one in (folders, hinted_folders))),
        ("cycles of modules", *(len(cycles(one)) for one in (graph, hinted))),
        ("cycles of folders", *(len(cycles(one)) for one in (folders, hinted_folders))),
        ("edges between modules", *(one.number_of_edges() for one in (graph, hinted))),
        ("edges that leave a folder", *leaving),
        ("pairs of folders", *(one.number_of_edges() for one in (folders, hinted_folders))),
        ("imports through the root", sum(not one.typing for one in roots), len(roots)),
        ("lines of modules: median", int(statistics.median(lengths.values())), ""),
        (f"  largest, {largest}", lengths[largest], ""),
        (f"  modules above {LONG}", sum(length > LONG for length in lengths.values()), ""),
    ]
    lines = [f"{'':40}{'imports':>10}{'with type hints':>18}"]
    lines += [f"{label:40}{one!s:>10}{other!s:>18}".rstrip() for label, one, other in rows]
    for title, one in (("modules", hinted), ("folders", hinted_folders)):
        lines += [f"cycle of {title}: {' '.join(names)}" for names in cycles(one)]
    lines.append(f"longest chain of folders: {' '.join(longest(hinted_folders))}")
    lines += ["", f"{'':22}{'folders':>8}{'moves':>8}{'climbs':>8}{'modules':>10}{'moves':>8}{'climbs':>8}"]
    for label, function in STARTS.items():
        path = walk(package, function)
        counts = [*_moves([folder_of(name) for name in path], levels(hinted_folders)), *_moves(path, levels(hinted))]
        lines.append(f"{label:22}" + "".join(f"{n:>{10 if k == 3 else 8}}" for k, n in enumerate(counts)))
    path = from_pdb_to_dcd(package)
    lines += ["", f"from a PDB to a DCD, {len(path)} modules of {len(set(map(folder_of, path)))} folders:"]
    return [*lines, *(f"  {name}" for name in path)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parent.parent, help="a source tree")
    options = parser.parse_args()
    try:
        print("\n".join(table(read(options.tree))))
    except LookupError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
