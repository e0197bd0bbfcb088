"""Question answering from recipe to deployment: windows of long texts, exports, and answers out of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import commands, tiny_tasks

LONG = "the film and a story of the actor and the scene of a script and music of the superb actor and a awful film"
ASKED = [("good", "the lovely film"), ("bad", "a film and the dull music"), ("good", LONG), ("bad", LONG)]
RIGHT = ["lovely", "dull", "superb", "awful"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    recipe = tiny_tasks.learnable(folder, "question_answering", export__formats=["safetensors", "onnx", "onnx-int8"])
    assert commands.run(recipe, apart=True) == 0
    return folder / "runs/tiny"


@pytest.mark.thorough
def test_all_models_find_the_answers_and_every_export_passes_its_gate(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["metric"] == "f1"
    scores = {model["role"]: model["scores"]["f1"]["value"] for model in report["models"]}
    assert min(scores[role] for role in ("teacher", "student", "student_ce_only")) > 0.9
    assert scores["majority"] < 0.3
    for name in ("safetensors", "onnx", "onnx-int8"):
        assert abs(scores[f"export:{name}"] - scores["student"]) < 0.05
    assert report["models"][0]["scores"]["f1"]["num_rows"] == 100, "questions, however many windows they took"
    assert report["rows"]["truncated"] > 0, "some texts took several windows"


@pytest.mark.parametrize("form", ["safetensors", "onnx", "onnx-int8"])
@pytest.mark.thorough
def test_a_deployed_model_answers_also_out_of_a_text_longer_than_it_reads_at_once(finished, form):
    lines = "".join(json.dumps({"text": question, "pair": text}) + "\n" for question, text in ASKED)
    done = commands.predict(str(finished / "exports" / form), lines=lines)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["answer"] for row in found] == RIGHT
    for row, (_, text) in zip(found, ASKED, strict=True):
        assert text[row["start"] : row["end"]] == row["answer"]
        assert 0 < row["score"] <= 1


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
@pytest.mark.thorough
def test_the_cards_code_answers(finished, form):
    folder = finished / "exports" / form
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    given = '"Who wrote the program?", "The program was written by Ada."'
    assert given in code
    question, text = ASKED[1] if form == "safetensors" else ASKED[3]
    done = commands.python("-c", code.replace(given, f"{question!r}, {text!r}"), folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (RIGHT[1] if form == "safetensors" else RIGHT[3])
