"""Word tags of a pair with different tokenizers: words are matched, not tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from support import commands, tiny, tiny_lm, tiny_tasks
from transformers import BertForTokenClassification

from distilpeft.distillation.store import SoftTargets
from distilpeft.machine.runtime import Runtime
from distilpeft.models import loading
from distilpeft.models.pair import Pair, tokenizer_digest
from distilpeft.models.teacher import load_teacher
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.rows import RowReader, TaskData


def workspace(folder: Path, **changes: object) -> Path:
    """The student reads bytes."""
    letters = tiny_lm.tokenizer()
    BertForTokenClassification(tiny.config(vocab_size=len(letters))).bert.save_pretrained(str(folder / "bytes"))
    letters.save_pretrained(str(folder / "bytes"))
    short = {"epochs": 1, "max_steps": 3, "batch_size": 8, "precision": "fp32"}
    settings = {
        "student": {"model": str(folder / "bytes")}, "data__max_tokens": 60, "teacher__fit": short,
        "distil__fit": short, "teacher__gate": "warn", "distil__alpha": 1.0, **changes,
    }  # fmt: skip
    recipe = tiny_tasks.workspace(folder, "token_classification", **settings)
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(60):
            words = rng.choices(["film", "story", "good", "bad"], k=rng.randint(1, 6))
            tags = [{"good": "B-GOOD", "bad": "B-BAD"}.get(word, "O") for word in words]
            file.write(json.dumps({"words": words, "tags": tags, "long": len(words) > 3}) + "\n")
    return recipe


def test_the_soft_targets_of_a_row_are_those_of_its_words_whatever_the_tokens(tmp_path):
    path = workspace(tmp_path)
    assert commands.run(path, "--until", "distil") == 0
    recipe = load_recipe(path)
    plan = make_plan(recipe, tmp_path / "runs")
    runtime, data = Runtime("test"), TaskData(recipe, plan.data_digest, tmp_path / "cache")
    teacher = load_teacher(runtime, Pair(recipe), plan.artifacts["teacher"].path, "fp32")
    store = SoftTargets(plan.artifacts["targets"].path)
    letters = loading.load_tokenizer(tiny_source := loading.Source(str(tmp_path / "bytes"), tmp_path / "bytes"))
    bytewise = data.tokens("train", RowReader(letters, tokenizer_digest(tiny_source)))
    own = data.tokens("train", teacher.reader)
    ids = np.array([5, 2, 11])
    assert bytewise.lengths_N[ids].sum() > 2 * own.lengths_N[ids].sum(), "many more tokens for the same words"
    right = data.task.soft(teacher.model, own.load_batch(ids))
    batch = bytewise.load_batch(ids)
    assert len(batch["labels_N"]) == len(right)
    np.testing.assert_allclose(store.lookup(ids).values, right.numpy(), atol=1e-5)
    assert batch["labels_N"].tolist() == own.load_batch(ids)["labels_N"].tolist()
    assert Pair(recipe).architecture.auto_class.__name__ == "AutoModelForTokenClassification"


def test_a_row_of_which_one_reads_fewer_words_is_named_before_anything_is_trained(tmp_path, capsys):
    path = workspace(tmp_path, data__max_tokens=12)
    assert commands.run(path) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "data.max_tokens: of row" in told
    assert "their tokenizers need different numbers of tokens" in told
    assert not list((tmp_path / "runs/tiny").glob("teacher-*"))
