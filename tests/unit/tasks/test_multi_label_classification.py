"""Several classes for a text: rows, the Bernoulli loss against PyTorch's own, and scores against scikit-learn's."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from support import tiny
from support.rows import checked
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from distilpeft.distillation.losses import Loss
from distilpeft.errors import InputError
from distilpeft.recipe.task import MultiLabelClassification
from distilpeft.tasks import multi_label_classification as task_
from distilpeft.tasks.multi_label_classification import MultiLabelTask

NAMES = ("praise", "blame", "music")
TASK = MultiLabelClassification(kind="multi_label_classification", text="text", label="moods", labels=NAMES)
TEXTS = TASK.model_copy(update={"separator": "|"})
ONE_HOT = TASK.model_copy(update={"label_is": "one_hot"})
TWO = TASK.model_copy(update={"labels": NAMES[:2]})
RNG = np.random.default_rng(4)
LOGITS, LABELS = RNG.normal(size=(60, 3)) * 2, RNG.integers(0, 2, (60, 3))


def rows_of(cells, features=None):
    return datasets.Dataset.from_dict({"text": ["good film"] * len(cells), "moods": cells}, features=features)


def encoded(task, cells, features=None):
    rows = rows_of(cells, features)
    rows = checked(MultiLabelTask(task), rows, "rows.jsonl")
    return MultiLabelTask(task).encode(rows[:], tiny.tokenizer(), 16)["label"]


def scored_rows(labels=LABELS):
    column = np.empty(len(labels), dtype=object)
    column[:] = [row.tolist() for row in labels]
    return SimpleNamespace(column=lambda name: column, lengths_N=np.ones(len(labels)))


def test_a_list_of_names_or_of_indices_becomes_a_yes_or_no_for_each_class():
    assert encoded(TASK, [["blame"], [], ["music", "praise"]]) == [[0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert encoded(TASK, [[0, 2], [1]]) == [[1, 0, 1], [0, 1, 0]]


def test_a_text_is_split_at_the_separator():
    assert encoded(TEXTS, ["blame| music", "", None, "praise"]) == [[0, 1, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_a_hubs_list_of_classes_that_numbers_them_otherwise_is_read_by_its_names():
    feature = datasets.List(datasets.ClassLabel(names=["music", "praise", "blame"]))
    features = datasets.Features({"text": datasets.Value("string"), "moods": feature})
    assert encoded(TASK, [[0], [1, 2]], features) == [[0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("kind", [int, float, bool, str])
def test_lists_with_0_or_1_for_each_class_are_read_as_such(kind):
    cells = [[kind(cell) for cell in row] for row in ([1, 1, 1], [0, 0, 0], [0, 1, 0])]
    cells = cells if kind is not str else [["1", "1", "1"], ["0", "0", "0"], ["0", "1", "0"]]
    assert encoded(TASK, cells) == [[1, 1, 1], [0, 0, 0], [0, 1, 0]]
    assert encoded(ONE_HOT, cells) == [[1, 1, 1], [0, 0, 0], [0, 1, 0]]


def test_two_classes_need_to_be_told_apart_by_the_recipe():
    assert encoded(TWO.model_copy(update={"label_is": "one_hot"}), [[0, 1], [1, 1]]) == [[0, 1], [1, 1]]
    assert encoded(TWO.model_copy(update={"label_is": "index"}), [[0, 1], [0, 1]]) == [[1, 1], [1, 1]]


def test_lists_of_ids_with_other_lengths_stay_ids():
    assert encoded(TASK, [[0, 1, 2], [1], []]) == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("task", "cells", "message"),
    [
        (TASK, [["praise"], ["joy", "fear"]], "row 2: label 'joy' is none of task.labels .*1 bad rows of 2: 2"),
        (TASK, ["praise|blame"], "row 1: column 'moods' holds 'praise|blame', not a list.*task.separator"),
        (TEXTS, [["praise"]], "row 1: column 'moods' holds .'praise'., not a text"),
        (TASK, [["praise", "7"]], "label '7' is none"),
        (TASK, [[0, 2, 2], [1]], r"row 1: \[0, 2, 2\] names a class twice"),
        (TASK, [[0.0, 2.0], [1.0]], r"row 1: a list of classes holds names or whole numbers, not \[0.0, 2.0\]"),
        (TASK, [[0, 3], [1]], "row 1: label 0 is none of .*3 is beyond the last position, 2"),
        (
            TASK.model_copy(update={"label_is": "one_hot"}),
            [[1, 0, 1], [0, 2, 0]],
            "row 2: label .0, 2, 0. is not a list of 3",
        ),
        (TWO, [[0, 1], [1, 1]], "row 1: .0, 1. may be 0 and 1 for each of the two classes, or a list of ids.*one_hot"),
    ],
)
def test_rows_that_cannot_be_used_are_named(task, cells, message):
    with pytest.raises(InputError, match=message):
        encoded(task, cells)


COLUMNS = TASK.model_copy(update={"label": None})


def column_rows(**columns):
    return datasets.Dataset.from_dict({"text": ["good film"] * 3, **columns})


def test_every_class_may_have_a_column_of_its_own():
    rows = column_rows(praise=[1, 0, 1], blame=["0", "1", "1.0"], music=[True, False, True])
    rows = checked(MultiLabelTask(COLUMNS), rows, "rows.csv")
    found = MultiLabelTask(COLUMNS).encode(rows[:], tiny.tokenizer(), 16)["label"]
    assert found == [[1, 0, 1], [0, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"praise": [0, 1, 2], "blame": [0, 0, 1], "music": [0, 0, 0]},
            "row 3: column 'praise' holds 2, neither 0 nor",
        ),
        ({"praise": [0, 1, 1], "blame": [0, None, 1], "music": [0, 0, 0]}, "row 2: column 'blame' holds None"),
        ({"praise": [0, 1, 1], "music": [0, 0, 0]}, "task.labels: rows.csv has no column 'blame'"),
    ],
)
def test_columns_that_cannot_be_used_are_named(columns, message):
    with pytest.raises(InputError, match=message):
        checked(MultiLabelTask(COLUMNS), column_rows(**columns), "rows.csv")


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_and_its_gradient_are_those_of_bernoulli_variables(temperature):
    """In float64, against cross-entropies that PyTorch computes: KL(p || q) is H(p, q) - H(p)."""
    z = torch.tensor(LOGITS, requires_grad=True)
    teacher, labels = torch.tensor(RNG.normal(size=LOGITS.shape)), torch.tensor(LABELS)
    model = lambda **inputs: SimpleNamespace(logits=z)  # noqa: E731
    loss = Loss(0.7, temperature)
    found = MultiLabelTask(TASK).loss_sum(model, {"inputs": {}, "labels_N": labels}, loss, teacher)
    (grad,) = torch.autograd.grad(found, z)
    p = torch.sigmoid(teacher / temperature)
    kl = bce(z / temperature, p, reduction="sum") - bce(teacher / temperature, p, reduction="sum")
    right = 0.7 * temperature**2 * kl + 0.3 * bce(z, labels.double(), reduction="sum")
    (right_grad,) = torch.autograd.grad(right, z)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, right_grad, rtol=1e-10, atol=1e-12)
    assert MultiLabelTask(TASK).count_rows({"labels_N": labels}) == labels.numel()


def test_scores_are_those_of_scikit_learn():
    found = MultiLabelTask(TASK).metrics(LOGITS, scored_rows())
    chosen, p = (LOGITS > 0).astype(int), 1 / (1 + np.exp(-LOGITS))
    for average in ("samples", "micro", "macro"):
        right = sk.f1_score(LABELS, chosen, average=average, zero_division=1.0 if average == "samples" else 0.0)
        assert found[f"{average}_f1"] == pytest.approx(right)
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(LABELS, chosen))
    assert found["accuracy"] == pytest.approx(1 - sk.hamming_loss(LABELS, chosen))
    assert found["log_loss"] == pytest.approx(np.mean([sk.log_loss(LABELS[:, c], p[:, c]) for c in range(3)]))


def test_intervals_hold_the_scores_and_what_rows_add_gives_the_score():
    rows = scored_rows()
    found = MultiLabelTask(TASK).scores(("samples_f1", "micro_f1", "ece", "log_loss"), LOGITS, rows)
    for name, score in found.items():
        assert score["value"] == MultiLabelTask(TASK).metrics(LOGITS, rows)[name]
        assert score["low"] < score["value"] < score["high"]
    sums, weights = MultiLabelTask(TASK).added(LOGITS, rows)
    assert sums.sum() / weights.sum() == pytest.approx(found["samples_f1"]["value"])


def test_a_row_without_classes_that_gets_none_is_right():
    chosen = np.array([[False, False], [True, False], [False, False]])
    right = np.array([[False, False], [False, False], [True, False]])
    assert task_.samples_f1(chosen, right).tolist() == [1.0, 0.0, 0.0]


def test_the_answer_as_often_as_in_training_has_the_shares_of_the_classes():
    labels = np.array([[1, 0, 0], [1, 0, 1], [1, 0, 0], [1, 1, 0]])
    found = MultiLabelTask(TASK).majority_values(scored_rows(labels), scored_rows())
    assert found.shape == (60, 3)
    assert 1 / (1 + np.exp(-found[0])) == pytest.approx([5 / 6, 2 / 6, 2 / 6], abs=1e-6)


def test_distance_from_the_teacher_is_per_decision():
    other = RNG.normal(size=LOGITS.shape)
    found = MultiLabelTask(TASK).against_teacher(LOGITS, other, None)
    p, q = (1 / (1 + np.exp(-one)) for one in (other, LOGITS))
    assert found["kl"] == pytest.approx((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())
    assert found["top1_agreement"] == ((other > 0) == (LOGITS > 0)).mean()
