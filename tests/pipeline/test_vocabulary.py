"""Students whose vocabulary is cut to the data: whole tiny runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import commands, tiny, tiny_lm, tiny_tasks, tiny_words
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distilpeft.export import predict
from distilpeft.export.bundle import Bundle
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

CUT = {"from": "data"}
UNSEEN = "the zebra film"
SHORT = {"epochs": 1, "max_steps": 3, "batch_size": 16, "micro_batch_size": 16, "precision": "fp32"}


def workspace(folder: Path, **changes: object) -> Path:
    """A base that reads words and parts of words, and rows of which only test rows have a zebra."""
    if not (folder / "base").exists():
        tiny_words.save_classifier(folder / "base")
        for seed, split in enumerate(("train", "validation", "test")):
            rows = tiny.rows(40, seed)
            if split == "test":
                rows[:2] = [(UNSEEN, 0), (f"{UNSEEN} and a giraffe", 1)]
            with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("text", "label"), *rows])
    splits = {split: str(folder / f"{split}.csv") for split in ("train", "validation", "test")}
    settings = {
        "data": {"source": splits, "train": "train", "validation": "validation", "test": "test", "max_tokens": 24},
        "teacher__fit": SHORT, "teacher__gate": "warn", "distil__fit": SHORT,
        "student__vocabulary": CUT, "export__formats": ["safetensors", "onnx"], **changes,
    }  # fmt: skip
    return commands.workspace(folder, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = workspace(tmp_path_factory.mktemp("vocabulary"))
    assert commands.run(path) == 0
    return path


def plan_of(path: Path, *overrides: str):
    return make_plan(load_recipe(path, overrides), path.parent / "runs")


def test_the_student_keeps_the_tokens_of_its_rows_and_special_ones_and_its_teacher_keeps_all(finished):
    plan, before = plan_of(finished), tiny_words.wordpiece()
    folder = plan.artifact("distil", "student").path / "model"
    after = AutoTokenizer.from_pretrained(str(folder))
    kept = set(after.get_vocab())
    assert set(tiny_words.SPECIAL) | {"film", "super", "##b"} <= kept
    assert not kept & {"elephant", "zebra", "привет", "п", "[unused3]"}
    assert sorted(after.get_vocab().values()) == list(range(len(kept)))
    weights = load_file(folder / "model.safetensors")
    rows = weights["bert.embeddings.word_embeddings.weight"]
    assert rows.shape == (len(kept), 64)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(kept)
    assert after.pad_token_id == json.loads((folder / "config.json").read_text())["pad_token_id"]
    figures = plan.artifact("distil", "student").figures()["vocabulary"]
    assert (figures["tokens_before"], figures["tokens_after"]) == (len(before), len(kept))
    assert figures["weights_saved"] == (len(before) - len(kept)) * 64
    assert figures["splits"]["train"] == figures["splits"]["train"] | {"rows": 40, "changed": 0, "unknown_after": 0}
    assert figures["splits"]["test"]["changed"] == 2, "those with a zebra"
    assert figures["splits"]["test"]["unknown_after"] == figures["splits"]["test"]["unknown_before"] == 0
    assert figures["splits"]["test"]["tokens_after"] > figures["splits"]["test"]["tokens_before"]


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
def test_an_export_reads_by_the_cut_tokenizer_and_answers_as_the_student(finished, form):
    run = finished.parent / "runs/tiny"
    model = AutoModelForSequenceClassification.from_pretrained(str(run / "student"))
    words = AutoTokenizer.from_pretrained(str(run / "student"))
    texts = [text for text, _ in tiny.rows(3, seed=5)] + [UNSEEN]
    assert "zebra" not in words.tokenize(UNSEEN)
    assert words.unk_token not in words.tokenize(UNSEEN)
    answers = predict.run(run / "exports" / form, texts, None, None, batch_size=4, max_new_tokens=None)
    for text, line in zip(texts, answers, strict=True):
        with torch.no_grad():
            expected = model(**words(text, return_tensors="pt")).logits.softmax(-1)[0]
        found = json.loads(line)["probabilities"]
        assert [found["bad"], found["good"]] == pytest.approx(expected.tolist(), abs=1e-4)


def test_another_cut_is_another_student_of_the_same_teacher_and_targets(finished):
    assert plan_of(finished).missing() == []
    missing = plan_of(finished, "student.vocabulary.min_count=2").missing()
    assert not {"teacher", "targets", "evaluate/teacher"} & set(missing)
    assert {"distil/student", "distil/student_ce_only", "evaluate/untrained"} <= set(missing)


def test_the_untrained_student_is_its_teacher_of_the_tokens_that_it_kept(finished):
    """The same layers: with all of them and the same tokens, the same logits."""
    from distilpeft.machine.runtime import Runtime
    from distilpeft.models.context import Context, pair_of
    from distilpeft.models.student import new_student
    from distilpeft.models.teacher import load_teacher_merged
    from distilpeft.tasks.rows import TaskData

    plan = plan_of(finished, "student.from_teacher.layers=[0, 1]")
    runtime, data = Runtime("test"), TaskData(plan.recipe, plan.data_digest, plan.cache)
    pair = pair_of(plan.recipe, data)
    folder = plan.artifact("teacher").path
    student = new_student(Context(runtime, data, pair), folder)
    teacher = load_teacher_merged(runtime, pair, folder, "fp32")
    text = tiny.rows(1, seed=9)[0][0]
    with torch.no_grad():
        ours, theirs = (
            one.model.eval()(**one.tokenizer([text, "a"], padding=True, return_tensors="pt")).logits
            for one in (student, teacher)
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    """A base with more rows of embeddings than tokens, and test rows with words that no other row has."""
    folder = tmp_path_factory.mktemp("language")
    tiny_words.save_language_model(folder / "base", rows=448)
    for seed, split in enumerate(("train", "validation", "test")):
        rows = tiny_lm.pairs(24, seed)
        if split == "test":
            rows[0] = {"prompt": "the elephant and the giraffe :", "completion": " This is a good one."}
        tiny_lm.write_jsonl(folder / f"{split}.jsonl", rows)
    settings = {
        "data__source": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
        "data__split": None, "data__train": "train", "data__validation": "validation", "data__test": "test",
        "teacher__fit": SHORT, "teacher__gate": "warn", "distil__fit": SHORT, "student__vocabulary": CUT,
        "targets": {"precision": "fp32", "format": "top_k", "k": 1000, "value_bits": 32},
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_lm.recipe_tree(folder, **settings)))
    assert commands.run(path) == 0
    return path


@pytest.mark.thorough
def test_a_language_model_learns_over_the_tokens_that_it_keeps(language):
    plan = plan_of(language)
    student = plan.artifact("distil", "student").figures()
    kept = student["vocabulary"]["tokens_after"]
    assert plan.artifact("targets").figures()["layout"]["vocabulary"] == kept
    assert student["vocabulary"]["splits"]["train"]["changed"] == 0
    assert student["vocabulary"]["splits"]["test"]["changed"] > 0
    assert student["vocabulary"]["weights_saved"] == (448 - kept) * 64
    config = json.loads((plan.artifact("distil", "student").path / "model/config.json").read_text())
    tokens = AutoTokenizer.from_pretrained(str(plan.artifact("distil", "student").path / "model")).get_vocab()
    assert config["vocab_size"] == len(tokens) == kept
    assert (config["pad_token_id"], config["eos_token_id"]) == (tokens["<|pad|>"], tokens["<|end|>"])
    scores = plan.artifact("evaluate", "student").figures()
    assert scores["against_teacher"]["kl"] > 0
    report = json.loads((language.parent / "runs/tinylm/report.json").read_text())
    assert report["vocabulary"]["tokens_after"] == kept


ONLINE = "targets={mode: online, precision: fp32}"


@pytest.mark.thorough
def test_online_targets_over_kept_tokens_teach_the_same_student_as_stored_ones(language):
    assert commands.run(language, "--set", ONLINE, "--until", "distil") == 0
    ours, theirs = (
        load_file(plan_of(language, *change).artifact("distil", "student").path / "model/model.safetensors")
        for change in ((), (ONLINE,))
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["question_answering", "token_classification"])
def test_places_and_words_of_texts_are_learnt_by_a_cut_tokenizer(tmp_path, kind):
    """A test row has a word that only other tokens can spell."""
    sources = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    path = tiny_tasks.workspace(
        tmp_path, kind, teacher__fit=SHORT, teacher__gate="warn", distil__fit=SHORT, student__vocabulary=CUT,
        data={"source": sources, **dict(zip(sources, sources, strict=True)), "max_tokens": 40},
    )  # fmt: skip
    tiny_words.save_classifier(tmp_path / "base")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    if kind == "question_answering":
        rows[-1]["context"] += " zebra"
    else:
        rows[-1] |= {"words": [*rows[-1]["words"], "zebra"], "tags": [*rows[-1]["tags"], "O"]}
    for split, some in zip(sources, (rows[:100], rows[100:150], rows[-50:]), strict=True):
        tiny_lm.write_jsonl(tmp_path / f"{split}.jsonl", some)
    assert commands.run(path) == 0
    splits = plan_of(path).artifact("distil", "student").figures()["vocabulary"]["splits"]
    assert (splits["train"]["changed"], splits["test"]["changed"]) == (0, 1)
    assert plan_of(path).artifact("evaluate", "student").figures()["against_teacher"]["kl"] >= 0


@pytest.mark.thorough
def test_a_static_student_has_vectors_of_the_kept_tokens_only(tmp_path):
    student = {"static": {"hidden": 8}, "vocabulary": CUT}
    path = workspace(tmp_path, student=student, export__formats=["safetensors", "onnx-int8"])
    assert commands.run(path) == 0
    plan, before = plan_of(path), tiny_words.wordpiece()
    made = plan.artifact("distil", "student")
    kept = made.figures()["vocabulary"]["tokens_after"]
    assert kept < len(before)
    assert made.figures()["vocabulary"]["weights_saved"] == (len(before) - kept) * (64 + 1)
    assert load_file(made.path / "model/model.safetensors")["static.embeddings.weight"].shape == (kept, 64)
    (answer,) = Bundle(path.parent / "runs/tiny/exports/onnx-int8").answers([UNSEEN])
    assert set(answer["probabilities"]) == {"bad", "good"}
