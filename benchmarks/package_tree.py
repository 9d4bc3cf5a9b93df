"""The modules of a package and who imports whom, read from the syntax trees; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx as nx

__all__ = [
    "PACKAGE",
    "Import",
    "Module",
    "Package",
    "chain",
    "cycles",
    "definitions",
    "folder_of",
    "levels",
    "longest",
    "read",
]

PACKAGE = "openmm_cgflow"


@dataclass(frozen=True)
class Import:
    """One imported name: ``target`` is a module of the package, or the first name of an outside package."""

    target: str
    inside: bool
    line: int
    typing: bool = False
    """Under ``if TYPE_CHECKING``."""
    lazy: bool = False
    """Inside a function."""
    root: bool = False
    """A name of the package's ``__init__``, not a module."""
    relative: bool = False


@dataclass(frozen=True)
class Module:
    """A file of the package; ``name`` is dotted and without the package's own."""

    name: str
    text: str
    imports: tuple[Import, ...]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def n_lines(self) -> int:
        return self.text.count("\n")

    def inside(self, *, typing: bool = False) -> set[str]:
        """Modules of the package that it imports."""
        return {one.target for one in self.imports if one.inside and (typing or not one.typing)} - {self.name}

    def outside(self) -> set[str]:
        """Other packages that it imports, but for type hints."""
        return {one.target for one in self.imports if not one.inside and not one.typing}


class Package:
    """The modules of a package by name, and the graphs of their imports."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.homes = lazy_homes(sources.get("__init__", ""))
        self.modules: dict[str, Module] = {}
        for name, text in sources.items():
            found = imports(text, name, set(sources), self.homes)
            # The root's own are there for type checkers: they repeat its lazy names.
            self.modules[name] = Module(name, text, tuple(one for one in found if name != "__init__" or not one.typing))

    def graph(self, *, typing: bool = False) -> nx.DiGraph:
        """An edge from each module to each that it imports."""
        graph = nx.DiGraph()
        graph.add_nodes_from(self.modules)
        graph.add_edges_from(
            (name, other) for name, module in self.modules.items() for other in module.inside(typing=typing)
        )
        return graph

    def folder_graph(self, *, typing: bool = False) -> nx.DiGraph:
        graph = nx.DiGraph()
        graph.add_nodes_from(map(folder_of, self.modules))
        edges = ((folder_of(one), folder_of(other)) for one, other in self.graph(typing=typing).edges)
        graph.add_edges_from((one, other) for one, other in edges if one != other)
        return graph

    def reached(self, name: str, doors: Iterable[str] = ()) -> set[str]:
        """Outside packages that importing and using a module can load; ``doors`` are not gone through."""
        graph = self.graph()
        graph.remove_nodes_from(set(doors) - {name})
        return set().union(*(self.modules[other].outside() for other in {name, *nx.descendants(graph, name)}))

    def imported_names(self, name: str) -> dict[str, tuple[str, str]]:
        """Of each name that a module imports from the package: its module, and its name there ("": the module)."""
        names = {}
        for node in ast.walk(self.modules[name].tree):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != PACKAGE:
                continue
            home = ".".join((node.module or "").split(".")[1:])
            for alias in node.names:
                inside = f"{home}.{alias.name}" if home else alias.name
                if inside in self.modules:
                    names[alias.asname or alias.name] = (inside, "")
                elif home or alias.name in self.homes:
                    names[alias.asname or alias.name] = (home or self.homes[alias.name], alias.name)
        return names

    def home(self, function: str) -> str:
        """The module that defines a function, the highest of several."""
        graph = self.graph(typing=True)
        found = [name for name, module in self.modules.items() if function in definitions(module.tree)]
        if not found:
            raise LookupError(f"no module defines {function}")
        return max(found, key=lambda name: levels(graph)[name])


def read(root: Path, package: str = PACKAGE) -> Package:
    """The package in a source tree."""
    folder = root / package
    if not (folder / "__init__.py").is_file():
        raise LookupError(f"{folder}: no package here")
    sources = {}
    for path in sorted(folder.rglob("*.py")):
        sources[".".join(path.relative_to(folder).with_suffix("").parts)] = path.read_text(encoding="utf-8")
    return Package(sources)


def folder_of(module: str) -> str:
    """The folder that holds a module; a file at the root is a room of its own."""
    return module.split(".")[0]


def lazy_homes(init: str) -> dict[str, str]:
    """Where ``__init__`` finds its names on first use: its dictionary ``_HOME``."""
    for node in ast.parse(init).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return ast.literal_eval(node.value)
    return {}


def imports(text: str, name: str, modules: set[str], homes: dict[str, str]) -> Iterator[Import]:
    """Every import of a module, those inside functions and of relative names too."""

    def visit(node: ast.AST, typing: bool, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield target(alias.name, node.lineno, typing, lazy, False)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                start = ".".join([PACKAGE, *name.split(".")[: -node.level], *start.split(".")]).rstrip(".")
            for alias in node.names:
                yield target(f"{start}.{alias.name}", node.lineno, typing, lazy, bool(node.level))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, True, lazy)
            for child in node.orelse:
                yield from visit(child, typing, lazy)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, typing, lazy)

    def target(path: str, line: int, typing: bool, lazy: bool, relative: bool) -> Import:
        first, *rest = path.split(".")
        if first != PACKAGE:
            return Import(first, False, line, typing, lazy)
        for length in range(len(rest), 0, -1):
            dotted = ".".join(rest[:length])
            for known in (dotted, f"{dotted}.__init__"):
                if known in modules:
                    return Import(known, True, line, typing, lazy, relative=relative)
        home = homes.get(rest[0], "__init__") if rest else "__init__"
        return Import(home, True, line, typing, lazy, root=bool(rest), relative=relative)

    yield from visit(ast.parse(text), False, False)


def cycles(graph: nx.DiGraph) -> list[list[str]]:
    """Sets of nodes that reach one another."""
    return sorted(sorted(nodes) for nodes in nx.strongly_connected_components(graph) if len(nodes) > 1)


def levels(graph: nx.DiGraph) -> dict[str, int]:
    """The storey of each node, 1 at the ground: nodes on the longest chain of imports that starts there."""
    condensed = nx.condensation(graph)
    storey: dict[int, int] = {}
    for node in reversed(list(nx.topological_sort(condensed))):
        below = max((storey[other] for other in condensed.successors(node)), default=0)
        storey[node] = below + len(condensed.nodes[node]["members"])
    return {name: storey[node] for name, node in condensed.graph["mapping"].items()}


def chain(graph: nx.DiGraph, top: str, bottom: str) -> list[str]:
    """The longest chain of imports from one module down to another; empty if there is none."""
    condensed = nx.condensation(graph)
    mapping, members = condensed.graph["mapping"], nx.get_node_attributes(condensed, "members")
    best: dict[int, list[str]] = {}
    for node in reversed(list(nx.topological_sort(condensed))):
        longer = (best[other] for other in condensed.successors(node) if other in best)
        below = max(longer, key=lambda path: (len(path), path), default=[])
        if node == mapping[bottom] or below:
            best[node] = sorted(members[node]) + below
    return best.get(mapping[top], [])


def longest(graph: nx.DiGraph) -> list[str]:
    """The longest chain of imports of all."""
    chains = [chain(graph, top, bottom) for top in graph for bottom in graph if not graph[bottom]]
    return max(chains, key=lambda path: (len(path), path))


def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    """Functions and classes of a module, and methods as ``Class.method``."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = (one for one in node.body if isinstance(one, ast.FunctionDef))
            found.update((f"{node.name}.{one.name}", one) for one in methods)
    return found
