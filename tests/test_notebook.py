"""The notebook runs from its first cell to its last, as it stands."""

import nbformat
import pytest
from nbclient import NotebookClient

# The kernel's libraries warn about their own event loops; none of it comes from this package.
pytestmark = pytest.mark.filterwarnings("default")


def test_quickstart(root):
    path = root / "notebooks" / "quickstart.ipynb"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "4 slow and 10 fast atoms" in printed
    assert "samples.dcd" in printed
    trans = float(printed.split("trans ")[-1].split(",")[0])
    assert 0.3 < trans < 0.95
