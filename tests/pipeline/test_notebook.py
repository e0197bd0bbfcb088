"""The notebook: kept without outputs, and run from top to bottom in a kernel of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
NOTEBOOK = RECIPES / "quickstart.ipynb"
KNOB = 'changes = ""'
QUICK = "--set distil.fit.epochs=1 --set teacher.fit.epochs=1 --set benchmark.rounds=5 --set benchmark.precision=null"


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
    shutil.copy(RECIPES / "quickstart.yaml", tmp_path)
    book = nbformat.read(NOTEBOOK, as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace(KNOB, f'changes = "{QUICK}"')
    done = nbclient.NotebookClient(book, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = [
        "".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/markdown", "")))
        for cell in done.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    whole = "\n".join(told)
    assert "the recipe and its data are good" in " ".join(whole.split())
    assert "student_ce_only" in whole
    assert '"label": "positive"' in whole
    assert "distilled by distilpeft" in whole
    assert (tmp_path / "runs/quickstart/report.html").is_file()
