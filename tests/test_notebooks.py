"""Every notebook runs from top to bottom on two CPU cores in minutes."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    assert any(cell.cell_type == "code" for cell in notebook.cells)
    resources = {"metadata": {"path": str(path.parent)}}
    # Raises CellExecutionError, with the cell and its traceback, where one fails.
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    ).execute()


def test_there_are_notebooks_and_they_hold_results():
    import json

    assert NOTEBOOKS
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert any(cell.get("outputs") for cell in cells), f"{path.name} was saved without outputs"
