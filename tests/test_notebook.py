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


def test_paper_synthetic(root, monkeypatch):
    """Cut short: every mode is found, with about its weight."""
    monkeypatch.setenv("OPENMM_CGFLOW_QUICK", "1")
    monkeypatch.delenv("OPENMM_CGFLOW_RUNS", raising=False)
    printed = printed_by(root / "notebooks" / "paper_synthetic.ipynb")
    share, exact = map(float, re.search(r"double well: minor mode (\S+) of the samples, (\S+) exact", printed).groups())
    assert exact == pytest.approx(0.00835, abs=1e-5)
    assert exact / 4 < share < 4 * exact
    assert "without tempering: minor mode" in printed

    def shares(title):
        return [float(word) for word in printed.split(f"{title}: weights of the modes")[1].split()[:3]]

    assert shares("d = 2") == pytest.approx([1 / 3] * 3, abs=0.15)
    assert shares("d = 10, tempering") == pytest.approx([1 / 3] * 3, abs=0.15)
    assert min(shares("d = 10, no tempering")) < 0.05
