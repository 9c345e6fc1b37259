"""Every notebook runs from top to bottom, and is committed with outputs that name nobody's machine."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest
from processes import QUICK

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SECONDS = 600  # a minute or so on two idle cores
TOYS = {
    "00_tour": ("steps, batch, length = 150, 8, 128", "steps, batch, length = 20, 8, 128", QUICK),
    "01_fp8": ("STEPS, ROWS = 30, 4", "STEPS, ROWS = 10, 2", QUICK.replace("level=0", "level=1")),
}
"""How the tests run a notebook: what they change, so that its models train for less, which changes what it prints and
not what it does; and how it is compiled, as what is compiled fast runs slowly."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_every_notebook_is_run():
    assert {path.stem for path in NOTEBOOKS} == set(TOYS) != set()


@each_notebook
def test_committed_with_outputs(path):
    """Each code cell has run, in order, without an error or a warning; outputs hold no absolute path."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = json.dumps([output.data if "data" in output else output.text for output in outputs
                       if "image/png" not in output.get("data", {})])
    assert not [root for root in ("/home", "/root", "/work", "/tmp", "/Users", "C:\\\\") if root in text]
    assert path.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@each_notebook
def test_runs(path, monkeypatch):
    """A fresh kernel in the notebook's own directory, as Jupyter starts it; a cell that raises fails the test."""
    long, short, compiled = TOYS[path.stem]
    monkeypatch.setenv("XLA_FLAGS", compiled)
    notebook = nbformat.read(path, as_version=4)
    [cell] = [cell for cell in notebook.cells if long in cell.source]
    cell.source = cell.source.replace(long, short)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.execute()
