"""Static students from recipe to deployment: every kind of task, every form of export, and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from support import commands, equality, tiny, tiny_tasks

from distilpeft.recipe.export import FORMS as KNOWN

FORMS = ("safetensors", "onnx", "onnx-int8")
OPEN_ELSEWHERE = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("model2vec", "sentence_transformers")),
    reason="needs the extra static",
)
SENTENCES = ["the good film and a story", "an awful actor of the scene", "a superb script"]
PAIRS = [("the good film", "a dull story"), ("weak", "a lovely scene of the music"), ("the actor", "fine")]
FIT = {"epochs": 15, "batch_size": 16, "micro_batch_size": 16, "precision": "fp32"}
STATIC = {"dim": 16, "hidden": 8, "weighting": "sif"}
KINDS = ("text_classification", "pairs", "multi_label_classification", "regression", "embedding")
LEARNT = {
    "text_classification": ("accuracy", 0.9), "pairs": ("accuracy", 0.7), "embedding": ("similarity", 0.6),
    "multi_label_classification": ("samples_f1", 0.9), "regression": ("r2", 0.7),
}  # fmt: skip
"""Kind of task → metric, and what a static student reaches at least."""


def tiers(kinds: Sequence[str], thorough: set[str]) -> list:
    """Kinds of task that CI runs, and others that only the complete suite does."""
    marks = {True: pytest.mark.thorough, False: pytest.mark.slow}
    return [pytest.param(kind, marks=marks[kind in thorough]) for kind in kinds]


def workspace(folder: Path, kind: str, static: dict | None = None, **changes: object) -> Path:
    settings = {
        "student": {"static": {"dim": 16} if static is None else static}, "distil__optim": {"lr": 0.01},
        "distil__fit": FIT, "export__formats": list(FORMS), **changes,
    }  # fmt: skip
    if kind not in ("text_classification", "pairs"):
        return tiny_tasks.workspace(folder, kind, **settings)
    recipe = commands.workspace(folder, **settings, **({"task__pair": "other"} if kind == "pairs" else {}))
    if kind == "pairs":
        with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "other", "label"), *tiny.pairs(400)])
    return recipe


def texts_of(kind: str) -> list:
    return PAIRS if kind == "pairs" else SENTENCES


def outputs(folder: Path, kind: str) -> np.ndarray:
    """What the exported student says, by transformers alone."""
    auto = "AutoModel" if kind == "embedding" else "AutoModelForSequenceClassification"
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts_of(kind):
        with torch.no_grad():
            out = model(**tokenizer(*(text if kind == "pairs" else (text,)), return_tensors="pt"))
        found.append(torch.nn.functional.normalize(out.pooler_output[0], dim=0) if kind == "embedding"
                     else out.logits[0])  # fmt: skip
    return torch.stack(found).numpy()


def numbers(answer: dict) -> list[float]:
    """The numbers of an answer."""
    if "vector" in answer:
        return answer["vector"]
    return [answer["value"]] if "value" in answer else list(answer["probabilities"].values())


def expected(kind: str, found: np.ndarray) -> np.ndarray:
    """The same from outputs."""
    if kind in ("embedding", "regression"):
        return found
    if kind == "multi_label_classification":
        return 1 / (1 + np.exp(-found))
    return torch.from_numpy(found).softmax(-1).numpy()


def predicted(folder: Path, kind: str) -> np.ndarray:
    from distilpeft.export.bundle import Bundle

    return np.array([numbers(answer) for answer in Bundle(folder).answers(texts_of(kind))])


def shown(folder: Path, values: str) -> np.ndarray:
    """What the card's code computes, by the name of a variable, for our texts."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    pairs = "what belongs to it" in code
    given = re.search(r"texts = (.*)", code)[1]
    code = code.replace(given, repr(PAIRS if pairs else SENTENCES))
    done = commands.python("-c", f"{code}\nimport numpy\nnumpy.save('found.npy', {values})", folder=folder)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "found.npy")


def run(folder: Path, kind: str, static: dict | None = None, forms: tuple[str, ...] = FORMS) -> Path:
    assert commands.run(workspace(folder, kind, static, export__formats=list(forms))) == 0
    return folder / "runs/tiny"


def check(finished: Path, kind: str) -> None:
    """It has learnt, every form of it passed its gate, and the deployed ones answer as the student does."""
    report = json.loads((finished / "report.json").read_text())
    scores = {model["role"]: model["scores"] for model in report["models"]}
    metric, least = LEARNT[kind]
    assert scores["student"][metric]["value"] > least
    right = expected(kind, outputs(finished / "exports/safetensors", kind))
    for form, export in report["exports"].items():
        assert export["parity"]["metric_kept"] > 0.98, form
        tolerance = 0.1 if form == "onnx-int8" else 1e-4
        np.testing.assert_allclose(predicted(finished / "exports" / form, kind), right, atol=tolerance, err_msg=form)


def test_a_static_student_learns_and_every_export_answers_as_it_does(tmp_path, capsys):
    recipe = workspace(tmp_path, "text_classification", STATIC)
    assert commands.run(recipe, verb="check") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "student: a static model of the teacher's word embeddings, reduced to 16 units" in said
    finished = run(tmp_path, "text_classification", STATIC)
    check(finished, "text_classification")
    config = json.loads((finished / "student/config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["head_size"]) == ("distilpeft_static", 16, 8)
    assert_table_is_int8(finished)
    card = (finished / "exports/safetensors/README.md").read_text()
    assert "a static model of the teacher's word embeddings" in card


def assert_table_is_int8(finished: Path) -> None:
    """The vectors, which are nearly all of the file, take a byte each; their weights stay in float."""
    sizes = {}
    for form in ("onnx", "onnx-int8"):
        graph = onnx.load(str(finished / "exports" / form / KNOWN[form].file)).graph
        kinds = {tuple(one.dims): one.data_type for one in graph.initializer}
        assert kinds[len(tiny.WORDS), 16] == (onnx.TensorProto.UINT8 if form == "onnx-int8" else onnx.TensorProto.FLOAT)
        assert kinds[len(tiny.WORDS), 1] == onnx.TensorProto.FLOAT
        sizes[form] = sum(len(one.raw_data) for one in graph.initializer)
    assert sizes["onnx-int8"] < 0.5 * sizes["onnx"]


@pytest.mark.parametrize("kind", tiers(KINDS, {"pairs"}))
def test_every_kind_of_task_has_static_students(tmp_path, kind):
    finished = run(tmp_path, kind, {"weighting": "learned"} if kind == "embedding" else {})
    check(finished, kind)
    right = outputs(finished / "exports/safetensors", kind)
    found = shown(finished / "exports/safetensors", "logits")
    if kind == "embedding":
        found = found / np.linalg.norm(found, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, right, atol=1e-5)


@OPEN_ELSEWHERE
@pytest.mark.parametrize("kind", tiers([kind for kind in KINDS if kind != "pairs"], {"embedding"}))
def test_model2vec_opens_its_own_layout(tmp_path, kind):
    from model2vec import StaticModel
    from model2vec.inference import StaticModelPipeline

    finished = run(tmp_path, kind, {} if kind == "embedding" else {"hidden": 8}, ("safetensors", "model2vec"))
    check(finished, kind)
    folder = finished / "exports/model2vec"
    right = outputs(finished / "exports/safetensors", kind)
    if kind == "embedding":
        from sentence_transformers import SentenceTransformer

        np.testing.assert_allclose(
            StaticModel.from_pretrained(folder).encode(SENTENCES, normalize=True), right, atol=1e-5
        )
        model = SentenceTransformer(str(folder), device="cpu")
        assert type(model[0]).__name__ == "StaticEmbedding"
        np.testing.assert_allclose(model.encode(SENTENCES, normalize_embeddings=True), right, atol=1e-5)
        return
    pipeline = StaticModelPipeline.from_pretrained(folder)
    if kind == "regression":
        np.testing.assert_allclose(pipeline.predict(SENTENCES), right, atol=1e-5)
    else:
        np.testing.assert_allclose(pipeline.predict_proba(SENTENCES), expected(kind, right), atol=1e-5)
    assert not list(folder.glob("*.skops"))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["pairs", "embedding"])
def test_every_split_of_a_batch_ends_in_the_same_static_student(tmp_path, kind):
    settings = {**equality.EXACT, "teacher__gate": "warn"}
    if kind != "embedding":
        settings["teacher__fit"] = {"epochs": 1, "max_steps": 4, "batch_size": 16, "precision": "fp32"}
    equality.assert_splits_are_equal(workspace(tmp_path, kind, **settings))


REFUSED = {
    "two origins": ({"student": {"static": {}, "model": "x"}}, "give exactly one of model, from_teacher, from_config"),
    "lora": (
        {"student": {"static": {}, "lora": {"rank": 2}}},
        "student: static students have no layers for",
    ),
    "checkpointing": ({"student": {"static": {}, "gradient_checkpointing": True}}, "student: static students have no"),
    "wide": ({"student": {"static": {"dim": 65}}}, "student.static.dim: 65 are more than the 64 units"),
    "features": (
        {"distil__features": {"hidden": {"weight": 1}}, "targets": {"mode": "online"}},
        "distil.features: does not go with student.static",
    ),
    "shards": ({"parallel": "fsdp2"}, "parallel: a static student has no layers to shard"),
    "nf4": ({"export__formats": ["bnb-nf4"]}, "export.formats: bnb-nf4 quantizes layers"),
    "others as model2vec": (
        {"student": {"from_teacher": {"layers": [1]}}, "export__formats": ["model2vec"]},
        "export.formats: model2vec is for static students",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_static_students_do_not_have_is_refused_before_anything_runs(tmp_path, capsys, name):
    changes, message = REFUSED[name]
    assert commands.run(workspace(tmp_path, "text_classification", **changes), verb="check") == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("kind", ["token_classification", "question_answering", "seq2seq", "image_classification"])
def test_other_kinds_of_task_are_refused_in_one_line(tmp_path, capsys, kind):
    recipe = workspace(tmp_path, kind, student={"static": {}})
    assert commands.run(recipe, verb="check") == 2
    assert f"student.static: is not for {kind}: a static student has one vector" in capsys.readouterr().err


def test_vectors_have_no_head(tmp_path, capsys):
    assert commands.run(workspace(tmp_path, "embedding", {"hidden": 4}), verb="check") == 2
    assert "student.static.hidden: is for a head; the vectors of embedding have none" in capsys.readouterr().err


@OPEN_ELSEWHERE
def test_model2vec_has_no_layout_for_pairs(tmp_path, capsys):
    assert commands.run(workspace(tmp_path, "pairs", export__formats=["model2vec"]), verb="check") == 2
    assert "export.formats: model2vec holds models of one text; this task reads pairs" in capsys.readouterr().err
