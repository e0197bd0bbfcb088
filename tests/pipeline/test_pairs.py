"""Pairs of texts from recipe to deployment: the class is the second text's, so who tells them apart is right."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from support import commands, equality, tiny

PAIRS = [(one, two) for one, two, _ in tiny.pairs(12, seed=9)]


def workspace(folder: Path, **changes: object) -> Path:
    optim, fit = {"lr": 0.003}, {"epochs": 12, "batch_size": 16, "micro_batch_size": 8, "precision": "fp32"}
    settings = {
        "task__pair": "other", "data__max_tokens": 40, "teacher__quantize": "none", "teacher__lora": None,
        "teacher__optim": optim, "teacher__fit": fit, "distil__fit": {**fit, "epochs": 8}, "distil__optim": optim,
        "student": {"from_teacher": {"layers": [0, 1]}},
    }  # fmt: skip
    recipe = commands.workspace(folder, **{**settings, **changes})
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "other", "label"), *tiny.pairs(400)])
    return recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = workspace(tmp_path_factory.mktemp("pairs"), export__formats=["safetensors", "onnx", "onnx-int8"])
    assert commands.run(recipe, apart=True) == 0
    return recipe.parent / "runs/tiny"


def labels_of_the_student(run: Path) -> list[str]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = str(run / "exports" / "safetensors")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for one, two in PAIRS:
        inputs = tokenizer(one, two, return_tensors="pt", return_token_type_ids=True)
        with torch.no_grad():
            found.append(model.config.id2label[int(model(**inputs).logits.argmax())])
    return found


@pytest.mark.thorough
def test_teacher_and_students_tell_the_texts_apart_and_every_export_passes_its_gate(finished):
    report = json.loads((finished / "report.json").read_text())
    scores = {model["role"]: model["scores"]["accuracy"]["value"] for model in report["models"]}
    assert min(scores[role] for role in ("teacher", "student", "student_ce_only")) > 0.9
    assert {"export:safetensors", "export:onnx", "export:onnx-int8"} <= set(scores)
    for name in ("onnx", "onnx-int8"):
        assert abs(scores[f"export:{name}"] - scores["student"]) < 0.05


@pytest.mark.parametrize("form", ["safetensors", "onnx", "onnx-int8"])
@pytest.mark.thorough
def test_a_deployed_model_takes_pairs(finished, form):
    lines = "".join(json.dumps({"text": one, "pair": two}) + "\n" for one, two in PAIRS)
    done = commands.predict(str(finished / "exports" / form), lines=lines)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    right = labels_of_the_student(finished)
    assert sum(row["label"] == label for row, label in zip(found, right, strict=True)) >= len(right) - (form[-1] == "8")
    assert [row["pair"] for row in found] == [two for _, two in PAIRS]


@pytest.mark.thorough
def test_a_pair_on_the_command_line_and_what_is_none(finished):
    folder = str(finished / "exports/onnx")

    def predict(*arguments: str, lines: str | None = None) -> CompletedProcess[str]:
        return commands.predict(folder, *arguments, lines=lines)

    labels = [json.loads(predict(*pair).stdout)["label"] for pair in (("good film", "awful"), ("awful", "good film"))]
    assert labels == ["bad", "good"]
    for done, message in (
        (predict("good film"), "reads pairs of texts; give two"),
        (predict(lines="good film\n"), "not a JSON object with both texts"),
        (predict(lines='{"text": "good film"}\n'), "no text under 'other' or 'pair'; its columns are text"),
    ):
        assert (done.returncode, done.stdout) == (2, "")
        assert message in " ".join(done.stderr.split())


@pytest.mark.thorough
def test_the_cards_code_takes_pairs(finished):
    (code,) = re.findall(r"```python\n(.*?)```", (finished / "exports/onnx/README.md").read_text(), re.S)
    given = '[("a first text", "what belongs to it"), ("a second one", "and its own")]'
    assert given in code
    done = commands.python("-c", code.replace(given, repr(PAIRS)), folder=finished / "exports/onnx")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == labels_of_the_student(finished)


@pytest.mark.slow
def test_every_split_ends_in_the_same_student_cached_or_online(tmp_path):
    """Traps 2, 3, 5: micro-batches, processes and where soft targets come from are no part of the result."""
    equality.assert_splits_are_equal(workspace(tmp_path, **equality.EXACT, distil__label_smoothing=0.1))
