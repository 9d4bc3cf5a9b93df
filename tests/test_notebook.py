"""The notebooks run from their first cells to their last, as they stand: ``pytest -m slow tests/test_notebook.py``."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

# The kernel's libraries warn about their own event loops; none of it comes from this package.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def printed_by(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def test_quickstart(root):
    printed = printed_by(root / "notebooks" / "quickstart.ipynb")
    assert "4 slow and 10 fast atoms" in printed
    assert "samples.dcd" in printed
    trans = float(printed.split("trans ")[-1].split(",")[0])
    assert 0.3 < trans < 0.95


def test_bias_md(root):
    printed = printed_by(root / "notebooks" / "bias_md.ipynb")
    with_bias, without = map(int, re.search(r"transitions: (\d+) with bias, (\d+) without", printed).groups())
    assert with_bias > 4 * max(without, 1)
    reweighted, error, model = map(float, re.search(r"trans (\S+) \+- (\S+) reweighted, (\S+) in", printed).groups())
    assert error < 0.2
    assert abs(reweighted - model) < 4 * error + 0.05
