"""The directive ``source-tree``: every folder and module of the package with the first line of its docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import openmm_cgflow

_logger = logging.getLogger(__name__)


class SourceTree(SphinxDirective):
    """Its content names the folders in the order in which they are shown. Files are read, and none is imported."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        root = Path(openmm_cgflow.__file__).parent
        for path in root.rglob("*.py"):
            self.env.note_dependency(str(path))
        order, there = " ".join(self.content).split(), {path.parent.name for path in root.glob("*/__init__.py")}
        if set(order) != there:
            _logger.warning("folders of the package: %s", sorted(there), location=self.get_location())
        folders = [root / name for name in order if name in there]
        lines = [*_modules(root), *(line for folder in folders for line in _folder(folder))]
        return self.parse_text_to_nodes("\n".join(lines))


def _folder(folder: Path, indent: str = "") -> Iterator[str]:
    yield f"{indent}- **`{folder.name}/`** {_purpose(folder / '__init__.py')}"
    yield from _modules(folder, indent + "  ")
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield from _folder(inner, indent + "  ")


def _modules(folder: Path, indent: str = "") -> Iterator[str]:
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("__"):
            yield f"{indent}- `{path.stem}` {_purpose(path)}"


def _purpose(path: Path) -> str:
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    text = re.sub(r":\w+(?::\w+)?:`~?([^`]+)`", r"`\1`", first).replace("``", "`")
    return " ".join(text.split()).replace("*", r"\*")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("source-tree", SourceTree)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
