"""The notebook: kept without outputs, and run from top to bottom in a kernel of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
NOTEBOOK = RECIPES / "quickstart.ipynb"
KNOB = "changes = {}"
QUICK = """changes = {
    "distil.fit.epochs": 1, "teacher.fit.epochs": 1, "evaluate.seeds": [], "distil.controls": [], "benchmark.rounds": 5,
    "benchmark.precision": None, "export.formats": ["safetensors", "onnx-int8"],
}"""


def test_it_is_kept_without_outputs_and_its_own_settings():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum(KNOB in "".join(cell["source"]) for cell in code) == 1


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    """On CPUs, with fewer epochs; the installation is skipped, since the kernel is this environment's."""
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(NOTEBOOK, as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace(KNOB, QUICK)
    done = nbclient.NotebookClient(book, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "\n".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for cell in done.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "steps to do" in shown
    assert "student_ce_only" in shown
    assert "Deploy" in shown
    assert shown.count("['positive', 'negative']") == 2
    assert (tmp_path / "runs/quickstart/report.html").is_file()
