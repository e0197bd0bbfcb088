"""A tag for each word: rows, the loss against PyTorch's own in float64, and scores against seqeval's and sklearn's."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import seqeval.metrics
import torch
from sklearn import metrics as sk
from support import tiny
from support.rows import checked
from torch.nn.functional import cross_entropy, kl_div

from distilpeft.distillation.losses import Loss
from distilpeft.errors import InputError
from distilpeft.metrics import classification as classifier
from distilpeft.metrics.significance import Added
from distilpeft.recipe.task import TokenClassification
from distilpeft.tasks import token_classification as task_
from distilpeft.tasks.rows import Tokens
from distilpeft.tasks.token_classification import TokenClassificationTask

NAMES = ("O", "B-MOOD", "I-MOOD")
TASK = TokenClassification(kind="token_classification", words="words", tags="tags", labels=NAMES)
WORDS = [["the", "good", "great", "film"], ["awful", "story"], ["film"], ["a", "dull", "scene", "and", "good", "music"]]
TAGS = [["O", "B-MOOD", "I-MOOD", "O"], ["B-MOOD", "O"], ["O"], ["O", "B-MOOD", "O", "O", "B-MOOD", "O"]]


def rows_of(words=WORDS, tags=TAGS, features=None):
    return datasets.Dataset.from_dict({"words": words, "tags": tags}, features=features)


def encoded(rows, max_tokens=16):
    rows = checked(TokenClassificationTask(TASK), rows, "rows.jsonl")
    return TokenClassificationTask(TASK).encode(rows[:], tiny.tokenizer(), max_tokens)


def tokens(max_tokens=16):
    found = datasets.Dataset.from_dict(
        encoded(rows_of(), max_tokens), features=TokenClassificationTask(TASK).features()
    )
    return Tokens(TokenClassificationTask(TASK), found, tiny.tokenizer())


class Model(torch.nn.Module):
    """Says for a token what a table says for its id."""

    def __init__(self, seed=0):
        super().__init__()
        table = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(tiny.WORDS), 3)) * 2)
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table[input_ids])


def test_words_become_tokens_with_the_place_and_class_of_each():
    found = encoded(rows_of())
    assert found["input_ids"][1] == [2, tiny.WORDS.index("awful"), tiny.WORDS.index("story"), 3]
    assert found["at"] == [[1, 2, 3, 4], [1, 2], [1], [1, 2, 3, 4, 5, 6]]
    assert found["label"][0] == [0, 1, 2, 0]
    assert found["num_words"] == [4, 2, 1, 6]
    assert set(found) == set(TokenClassificationTask(TASK).features())


def test_words_beyond_the_limit_are_left_out_and_the_row_is_counted():
    found = encoded(rows_of(), max_tokens=5)
    assert found["num_words"] == [3, 2, 1, 3]
    assert found["label"][3] == [0, 1, 0]
    assert found["truncated"] == [True, False, False, True]


def test_a_hubs_list_of_classes_that_numbers_them_otherwise_is_read_by_its_names():
    names = ["I-MOOD", "O", "B-MOOD"]
    features = datasets.Features(
        {"words": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    assert encoded(rows_of([["a", "good", "great"]], [[1, 2, 0]], features))["label"] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        ([["a", "b"]], [["O"]], "row 1: 2 words in 'words', but 1 tags in 'tags'"),
        ([["a"], []], [["O"], []], r"row 2: column 'words' holds \[\], not a list with an entry per word"),
        (["a film"], [["O", "O"]], "row 1: column 'words' holds 'a film', not a list"),
        ([["a", " "]], [["O", "O"]], "row 1: word 2 of 'words' is empty or no text"),
        (
            [["a", "b"]],
            [["O", "B-ORG"]],
            "row 1: label 'B-ORG' is none of task.labels .O, B-MOOD, I-MOOD..*1 bad rows of 1: 1",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(words, tags, message):
    with pytest.raises(InputError, match=message):
        encoded(rows_of(words, tags))


def test_the_loss_counts_words_and_nothing_else_and_its_gradient_is_right():
    """In float64, against PyTorch's own losses over words picked one by one."""
    model, teacher, rows = Model(0), Model(1), tokens()
    batch = rows.load_batch(np.arange(4))
    soft = task_.word_logits(teacher, batch).detach()
    found = TokenClassificationTask(TASK).loss_sum(model, batch, Loss(0.7, 2.0), soft)
    (grad,) = torch.autograd.grad(found, model.table)
    words = [(tiny.WORDS.index(word), NAMES.index(tag)) for row, tags in zip(WORDS, TAGS, strict=True)
             for word, tag in zip(row, tags, strict=True)]  # fmt: skip
    ids, labels = (torch.tensor(column) for column in zip(*words, strict=True))
    assert TokenClassificationTask(TASK).count_rows(batch) == len(words) == 13
    log_q, p = torch.log_softmax(model.table[ids] / 2, -1), torch.softmax(teacher.table[ids] / 2, -1).detach()
    right = 0.7 * 4 * kl_div(log_q, p, reduction="sum") + 0.3 * cross_entropy(model.table[ids], labels, reduction="sum")
    (right_grad,) = torch.autograd.grad(right, model.table)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, right_grad, rtol=1e-10, atol=1e-12)


def values_of(model, rows, sizes=(4,)):
    edges = np.cumsum([0, *sizes])
    with torch.no_grad():
        parts = [
            TokenClassificationTask(TASK).measure(model, rows.load_batch(np.arange(*pair))) for pair in pairwise(edges)
        ]
    width = max(part.shape[-1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[-1]))) for part in parts])


@pytest.mark.parametrize("max_tokens", [16, 5])
def test_scores_are_those_of_seqeval_and_scikit_learn(max_tokens):
    model, rows = Model(), tokens(max_tokens)
    found = TokenClassificationTask(TASK).metrics(values_of(model, rows), rows)
    there = [tags[: max_tokens - 2] for tags in TAGS]
    logits = [
        np.array([model.table[tiny.WORDS.index(word)].tolist() for word in row[: max_tokens - 2]]) for row in WORDS
    ]
    told = [[NAMES[i] for i in row.argmax(-1)] for row in logits]
    for name in ("precision", "recall", "f1"):
        right = getattr(seqeval.metrics, f"{name}_score")(there, told, zero_division=0)
        assert found[f"entity_{name}"] == pytest.approx(right)
    flat = np.concatenate(logits)
    p = np.exp(flat) / np.exp(flat).sum(-1, keepdims=True)
    labels = np.array([NAMES.index(tag) for row in there for tag in row])
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, flat.argmax(-1)))
    assert found["log_loss"] == pytest.approx(sk.log_loss(labels, p, labels=[0, 1, 2]), rel=1e-5)
    assert found["ece"] == pytest.approx(classifier.ece(p, labels), rel=1e-5)


def test_scores_do_not_depend_on_how_rows_were_batched():
    model, rows = Model(), tokens()
    whole, parted = (values_of(model, rows, sizes) for sizes in ((4,), (2, 1, 1)))
    np.testing.assert_array_equal(whole, parted)


def test_what_rows_add_gives_the_score_and_the_interval_holds_it():
    model, rows = Model(), tokens()
    values = values_of(model, rows)
    score = TokenClassificationTask(TASK).scores(("entity_f1", "accuracy"), values, rows)
    assert score["entity_f1"]["num_rows"] == 13
    added = Added(*TokenClassificationTask(TASK).added(values, rows))
    assert added.score(np.ones((1, 4)))[0] == pytest.approx(score["entity_f1"]["value"])
    assert score["accuracy"]["low"] <= score["accuracy"]["value"] <= score["accuracy"]["high"]


def test_distance_from_the_teacher_and_calibration_are_over_words():
    rows = tokens()
    ours, theirs = (values_of(Model(seed), rows) for seed in (0, 1))
    found = TokenClassificationTask(TASK).against_teacher(ours, theirs, rows)
    ids = [tiny.WORDS.index(word) for row in WORDS for word in row]
    log_q, log_p = (torch.log_softmax(Model(seed).table[ids], -1).detach() for seed in (0, 1))
    right = kl_div(log_q, log_p, reduction="sum", log_target=True) / len(ids)
    assert found["kl"] == pytest.approx(float(right), rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean()))
    assert sum(TokenClassificationTask(TASK).calibration(ours, rows)["count"]) == 13


def test_the_answer_as_often_as_in_training_finds_no_entity():
    rows = tokens()
    found = TokenClassificationTask(TASK).metrics(TokenClassificationTask(TASK).majority_values(rows, rows), rows)
    assert found["entity_f1"] == 0
    assert found["accuracy"] == pytest.approx(8 / 13)
