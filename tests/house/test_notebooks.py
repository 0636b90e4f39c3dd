"""The notebooks from top to bottom, with small settings. Their own cells assert their claims."""

import base64

import pytest

from helpers.runs import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The figures of each on a `smoke` run, and the least number of assertions in its cells.
EXPECTED = {"1_trigflow_in_2d": (3, 8), "2_inspect_losses": (10, 7), "3_sample_and_edit": (4, 8)}
_FIGURE = 300_000  # bytes of a committed figure


def read_notebook(path):
    """Return a notebook as JSON."""
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    return book


def code_cells(book):
    """Return the sources of its code cells."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def figures_of(book):
    """Return the figures in its outputs."""
    outputs = [output for cell in code_cells(book) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    return [
        base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})
    ]


def test_all_notebooks_are_listed():
    assert [path.stem for path in NOTEBOOKS] == list(EXPECTED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_as_committed(path):
    """Notebooks are small, without errors and without paths of a machine.

    The first cell fetches the code if it is absent.
    """
    book = read_notebook(path)
    assert all(len(figure) <= _FIGURE for figure in figures_of(book))
    assert 'if "google.colab" in sys.modules' in code_cells(book)[0].source
    text = path.read_text()
    assert "/home/" not in text
    assert "/root/" not in text
    assert "/tmp/" not in text
    assert "/work" not in text
    assert (
        sum(cell.source.count("assert ") for cell in code_cells(book)[2:]) >= EXPECTED[path.stem][1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_executes(path, request, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    book = read_notebook(path)
    for cell in code_cells(book):
        cell.outputs, cell.execution_count = [], None
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("SPRINT_JAX_NOTEBOOK", "tiny")
    if path.stem != "1_trigflow_in_2d":
        monkeypatch.setenv("SPRINT_JAX_RUN", str(request.getfixturevalue("finished")))
    nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    assert all(cell.execution_count for cell in code_cells(book))
    assert len(figures_of(book)) == EXPECTED[path.stem][0]
