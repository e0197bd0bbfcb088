"""Vectors of texts from recipe to deployment: scores, exports, answers, and a student narrower than its teacher."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support import commands, equality, tiny, tiny_tasks

FORMS = ("safetensors", "onnx", "onnx-int8")
TEXTS = ["the good film", "a story and the music of a scene", "dull"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    other = {"model": str(tiny.save_model(folder / "other", seed=5))}
    recipe = tiny_tasks.workspace(folder, "embedding", student=other, export__formats=list(FORMS))
    assert commands.run(recipe, apart=True) == 0
    return folder / "runs/tiny"


def right(folder: Path) -> np.ndarray:
    """By transformers alone: the mean of a text's last hidden states, of length 1."""
    model = transformers.AutoModel.from_pretrained(str(folder)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS]
    return torch.nn.functional.normalize(torch.stack(found), dim=-1).numpy()


@pytest.mark.thorough
def test_the_student_brings_together_what_its_teacher_does(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["metric"] == "neighbours"
    scores = {model["role"]: model["scores"] for model in report["models"]}
    assert "student_ce_only" not in scores, "without labels there is no such baseline"
    for metric in ("neighbours", "similarity", "cosine"):
        assert scores["teacher"][metric]["value"] == pytest.approx(1)
    for role in ("student", *(f"export:{form}" for form in FORMS)):
        assert scores[role]["cosine"]["value"] > 0.95, role
        assert scores[role]["similarity"]["value"] > 0.9, role
        assert scores[role]["neighbours"]["value"] > scores["untrained"]["neighbours"]["value"] + 0.05, role
    assert scores["majority"]["neighbours"]["value"] == 0
    assert "Of the texts nearest to one by the teacher" in (finished / "report.md").read_text()
    parity = report["exports"]["onnx"]["parity"]
    assert parity["metric_export"] == pytest.approx(1, abs=1e-6)
    assert report["exports"]["onnx-int8"]["parity"]["metric_export"] < 1 - 1e-6, "int8 is measured, too"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.thorough
def test_a_deployed_model_gives_vectors(finished, form):
    done = commands.predict(str(finished / "exports" / form), *TEXTS)
    assert done.returncode == 0, done.stderr
    found = np.array([json.loads(line)["vector"] for line in done.stdout.splitlines()])
    vectors = right(finished / "exports/safetensors")
    if form == "onnx-int8":
        assert (found * vectors).sum(-1).min() > 0.98
    else:
        np.testing.assert_allclose(found, vectors, atol=1e-5)


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
@pytest.mark.thorough
def test_the_cards_code_gives_vectors(finished, form):
    folder = finished / "exports" / form
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    code = code.replace('["a first text", "and a second one"]', repr(TEXTS))
    last = code.rstrip().splitlines()[-1]
    assert last.startswith("print(")
    code = code.replace(last, f"import numpy\nnumpy.save('found.npy', numpy.asarray({last[6:-1]}))")
    done = commands.python("-c", code, folder=folder)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(folder / "found.npy"), right(finished / "exports/safetensors"), atol=1e-5)


@pytest.mark.thorough
def test_a_narrower_student_learns_through_a_matrix_that_is_dropped(tmp_path):
    tiny.save_model(tmp_path / "small", hidden_size=32)
    fit = {**equality.EXACT["distil__fit"], "max_steps": 4}
    recipe = tiny_tasks.workspace(
        tmp_path, "embedding", **{**equality.EXACT, "distil__fit": fit}, student={"model": str(tmp_path / "small")}
    )
    ways = ((1, []), (2, ["distil.fit.micro_batch_size=3"]))
    equality.STEPS, steps = 4, equality.STEPS
    try:
        equality.assert_splits_are_equal(recipe, ways)
    finally:
        equality.STEPS = steps
    assert commands.run(recipe, "--until", "evaluate") == 0
    (folder,) = (tmp_path / "runs/tiny").glob("distil-*/model")
    model = transformers.AutoModel.from_pretrained(str(folder))
    assert model.config.hidden_size == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distil__alpha": 0.5}, "distil.alpha: without labels there is only the teacher: write 1"),
        ({"distil__temperature": 2}, "distil.temperature: vectors have no temperature: write 1"),
        (
            {"teacher__fit": {"epochs": 1, "batch_size": 4}, "teacher__optim": {"lr": 0.1}},
            "teacher.fit: without labels",
        ),
        ({"distil__divergence": {"kind": "jsd"}}, "distil.divergence: is for classes; see task.loss"),
    ],
)
def test_what_needs_labels_is_refused(tmp_path, capsys, changes, message):
    assert commands.run(tiny_tasks.workspace(tmp_path, "embedding", **changes), verb="check") == 2
    assert message in capsys.readouterr().err
