"""Every notebook runs from top to bottom on two CPU cores in minutes."""

import json
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


def test_the_first_cell_installs_the_library_where_it_is_missing():
    first = {
        next("".join(c["source"]) for c in json.loads(path.read_text())["cells"]
             if c["cell_type"] == "code")
        for path in NOTEBOOKS
    }  # fmt: skip
    assert len(first) == 1  # The same in all of them.
    (text,) = first
    lines = text.splitlines()
    assert lines[-1].strip() == '%pip install -q "{source}[app]"'
    # Where it is there, as here, nothing is installed.
    exec("\n".join([*lines[:-1], "    raise AssertionError"]), {})


def test_there_are_notebooks_and_they_hold_results():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert any(cell.get("outputs") for cell in cells), f"{path.name} was saved without outputs"
