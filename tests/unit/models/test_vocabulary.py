"""A cut vocabulary counted in real rows, and language models' soft targets over the ids that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import tiny, tiny_lm, tiny_words
from torch import nn

from distilpeft.distillation.codec import Layout
from distilpeft.distillation.fused import Head, Running, linear_distil_sum, linear_scores, soft_value_and_grad
from distilpeft.distillation.losses import Loss
from distilpeft.distillation.sparse import Sparse, keep
from distilpeft.errors import InputError
from distilpeft.models import vocabulary
from distilpeft.models.context import pair_of
from distilpeft.models.pair import CutVocabulary
from distilpeft.planning.inputs import data_digest
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.rows import TAUGHT, RowReader, TaskData
from distilpeft.training.scoring import over_kept


def data_of(folder: Path, tree: dict) -> TaskData:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    recipe = load_recipe(path)
    return TaskData(recipe, data_digest(recipe), folder / "cache")


@pytest.fixture
def language(tmp_path) -> TaskData:
    tiny_words.save_language_model(tmp_path / "base")
    tiny_lm.write_jsonl(tmp_path / "rows.jsonl", tiny_lm.chats(40))
    task = {"kind": "causal_lm", "messages": "messages"}
    return data_of(tmp_path, tiny_lm.recipe_tree(tmp_path, task=task, student__vocabulary={"from": "data"}))


def test_chats_keep_their_tokens_by_other_ids_and_the_templates_tokens_stay(language):
    pair = pair_of(language.recipe, language)
    before, after = (language.tokens(TAUGHT, reader) for reader in (pair.cut.before, pair.cut.reader))
    assert len(pair.cut.kept_K) < len(tiny_words.bytelevel())
    for old, new in zip(before.dataset, after.dataset, strict=True):
        assert pair.cut.kept_K[new["input_ids"]].tolist() == old["input_ids"]
        assert new["target"] == old["target"]
        assert new["num_bytes"] == old["num_bytes"]
    tokenizer = pair.cut.reader.tokenizer
    assert tokenizer.chat_template == tiny_lm.TEMPLATE
    assert set(tiny_lm.SPECIAL) <= set(tokenizer.get_vocab())
    assert tokenizer.decode(tokenizer("élan vital 東")["input_ids"]) == "élan vital 東", "all bytes are there"


def test_a_second_look_reads_the_same_cut_from_disk(language, monkeypatch):
    first = pair_of(language.recipe, language)
    monkeypatch.setattr(vocabulary.kept, "kept_ids", None)
    second = pair_of(language.recipe, language)
    assert second.cut.kept_K.tolist() == first.cut.kept_K.tolist()
    assert second.student_reader.digest == first.student_reader.digest


def test_the_teacher_reads_the_ids_that_it_knows(language):
    pair = pair_of(language.recipe, language)
    ids = np.arange(3)
    ours, theirs = (language.tokens(TAUGHT, reader).load_batch(ids) for reader in (pair.cut.reader, pair.cut.before))
    assert not torch.equal(ours["inputs"]["input_ids"], theirs["inputs"]["input_ids"])
    torch.testing.assert_close(pair.cut.as_before(ours)["inputs"], theirs["inputs"])
    torch.testing.assert_close(ours["at_N"], theirs["at_N"])


KEPT = np.array([0, 2, 3, 7, 11, 15, 21])  # the last is a token of the student's alone
RNG = torch.Generator().manual_seed(0)
STATES, TEACHER = (torch.randn(5, 8, generator=RNG, dtype=torch.float64) for _ in range(2))
LABELS = torch.tensor([0, 6, 3, 2, 5])


def heads() -> tuple[Head, Head]:
    made = [nn.Linear(8, size, bias=False).double() for size in (len(KEPT), 20)]
    for head in made:
        nn.init.normal_(head.weight, generator=RNG)
    return Head(made[0]), Head(made[1])


def reference(student_NV: torch.Tensor, teacher_NV: torch.Tensor, loss: Loss) -> torch.Tensor:
    """T^2 KL between both renormalised over the ids that both have, with labels over all of the student's ids."""
    width = teacher_NV.shape[-1]
    both = np.array([one for one in KEPT if one < width])
    log_q_NV = torch.log_softmax(student_NV[:, : len(both)] / loss.temperature, -1)
    log_p_NV = torch.log_softmax(teacher_NV[:, both.tolist()] / loss.temperature, -1)
    divergence = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum()
    labels = nn.functional.cross_entropy(student_NV, LABELS, reduction="sum")
    return loss.alpha * loss.temperature**2 * divergence + (1 - loss.alpha) * labels


def cut() -> CutVocabulary:
    reader = RowReader(None, "x")
    return CutVocabulary(reader, reader, KEPT)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("way", ["running", "full", "top_k"])
def test_the_loss_is_over_the_ids_that_both_have_renormalised_whichever_way_targets_come(way, temperature):
    student, teacher = heads()
    loss = Loss(0.7, temperature)
    soft = over_kept(Running(TEACHER, teacher), cut())
    count = int((KEPT < 20).sum())
    if way == "running":
        states = STATES.clone().requires_grad_()
        value = linear_distil_sum(states, student, LABELS, soft, loss, chunk_rows=2)
        value.backward()
        grad = states.grad
        tolerance = 1e-10
    else:
        layout = Layout(way, count, 32, (temperature,) if way == "top_k" else (), count if way == "top_k" else 0)
        kept = keep(soft[slice(0, 5)].detach(), layout)
        assert kept.ids_M.max(initial=0) < count
        stored = torch.from_numpy(kept.values).double() if way == "full" else Sparse.of(kept, layout, temperature)
        value, grad_NV = soft_value_and_grad(student.logits(STATES).detach(), LABELS, stored, loss)
        grad = grad_NV @ student.module.weight
        tolerance = 1e-5  # stored in float32
    states = STATES.clone().requires_grad_()
    expected = reference(student.logits(states), teacher.logits(TEACHER).detach(), loss)
    expected.backward()
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.detach(), states.grad, rtol=tolerance, atol=tolerance)


def test_scores_compare_both_over_the_ids_that_both_have():
    student, teacher = heads()
    found = linear_scores(STATES, student, LABELS, over_kept(Running(TEACHER, teacher), cut()))
    both = KEPT[KEPT < 20].tolist()
    log_q = torch.log_softmax(student.logits(STATES)[:, : len(both)], -1)
    log_p = torch.log_softmax(teacher.logits(TEACHER)[:, both], -1)
    torch.testing.assert_close(found["kl"], (log_p.exp() * (log_p - log_q)).sum(-1))
    torch.testing.assert_close(found["agree"], (log_p.argmax(-1) == log_q.argmax(-1)).double())


def test_a_tokenizer_written_in_python_is_refused_in_one_line(tmp_path):
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match=r"student.vocabulary: Slow, the tokenizer of it, is written in Python"):
        vocabulary.spec_of(Slow(), "it")


def test_a_cut_follows_the_unlabelled_rows_and_counts_none_that_models_are_judged_on(tmp_path):
    tiny_words.save_classifier(tmp_path / "base")
    tiny.write_csv(tmp_path / "rows.csv", 60)
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the zebra", "a film")))
    changes = {"student__vocabulary": {"from": "data"}, "data__unlabelled": {"source": str(tmp_path / "more.jsonl")}}
    plain, more = (
        data_of(tmp_path, tiny.recipe_tree(tmp_path, **given))
        for given in ({"student__vocabulary": {"from": "data"}}, changes)
    )
    pieces = [set(pair_of(data.recipe, data).student_reader.tokenizer.get_vocab()) for data in (plain, more)]
    assert pieces[1] - pieces[0] == {"zebra"}
