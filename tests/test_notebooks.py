"""The notebooks run from beginning to end on the embedded model."""

from __future__ import annotations

import os

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
FIGURES = {"quickstart": 0, "what_is_pruned": 6, "choose_final_keep": 2, "long_document": 0}
SMALLER = {  # for less work than a reader's
    "quickstart": {"1100": "550", "1000": "500", "repeats: int = 3": "repeats: int = 1"},
    "what_is_pruned": {"480": "240", "(50_000, 110_000, 170_000, 230_000)": "(50_000, 170_000)"},
    "choose_final_keep": {"440_000": "200_000", "prompts=2": "prompts=1"},
    "long_document": {},
}
SAYS = {
    "quickstart": ["of the FLOPs", "transformers  ", "False"],
    "what_is_pruned": ["[240, "],
    "long_document": [
        "2 hits, 0 partial, 1 misses",
        "cut to 67% of each segment",
        "without a prompt cache: True",
        "in one: 0 segments",
        "Snapshot(segments=4",
        "final_keep was 0.3 and is 0.5",
    ],
    "choose_final_keep": ["influence 0.02", "on ordinary text", "dense  100% of the FLOPs  found"],
}


@pytest.fixture(scope="module")
def client():
    """One kernel for all: it imports once."""
    folder = {"metadata": {"path": str(ROOT / "examples")}}
    client = NotebookClient(
        nbformat.v4.new_notebook(), timeout=120, kernel_name="python3", resources=folder
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm wants a widget
        if "PYTEST_XDIST_WORKER" in os.environ:
            patch.setenv("OMP_NUM_THREADS", "1")
        with client.setup_kernel():
            yield client


def test_these_are_all():
    assert {path.stem for path in NOTEBOOKS} == set(FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, client):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)  # committed without
    source = "\n".join(cell.source for cell in code)
    for number, smaller in SMALLER[path.stem].items():
        assert number in source
        for cell in code:
            cell.source = cell.source.replace(number, smaller)
    client.nb = notebook
    client.execute_cell(nbformat.v4.new_code_cell("%reset -f"), 0)  # as in a new kernel, no names
    for i, cell in enumerate(notebook.cells):
        client.execute_cell(cell, i)
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[path.stem]
    assert not any(output.get("name") == "stderr" for output in outputs)
    said = "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs
    )
    for text in SAYS[path.stem]:
        assert text in said
