"""A number for a text: rows, the loss in float64, and scores against scikit-learn's and scipy's."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from support import tiny
from support.rows import checked

from distilpeft.distillation.losses import Loss
from distilpeft.distillation.store import row_hashes
from distilpeft.errors import InputError
from distilpeft.recipe.task import Regression
from distilpeft.tasks.regression import RegressionTask

TASK = Regression(kind="regression", text="text", label="mood")
RNG = np.random.default_rng(4)
LABELS = RNG.normal(3, 2, 50)
VALUES = (LABELS + RNG.normal(0, 1, 50))[:, None]
ROWS = SimpleNamespace(column=lambda name: LABELS, lengths_N=np.ones(50))


def rows_of(cells):
    rows = datasets.Dataset.from_dict({"text": ["good film"] * len(cells), "mood": cells})
    return checked(RegressionTask(TASK), rows)


def test_numbers_are_read_also_where_they_are_written_as_text():
    rows = rows_of(["1.5", "-2", "3e-1"])
    found = RegressionTask(TASK).encode(rows[:], tiny.tokenizer(), 16)
    assert found["label"] == [1.5, -2.0, 0.3]
    assert set(found) == set(RegressionTask(TASK).features())


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            ["1", "high", "low"],
            r"rows.csv: row 2: column 'mood' holds 'high', which is not a number \(2 bad rows",
        ),
        ([1.0, None], "row 2: column 'mood' holds None"),
        ([1.0, float("nan")], "row 2: column 'mood' holds nan"),
        ([1.0, float("inf")], "row 2"),
        ([True, False], "row 1: column 'mood' holds True"),
    ],
)
def test_rows_that_cannot_be_used_are_named(cells, message):
    with pytest.raises(InputError, match=message):
        rows_of(cells)


def test_the_loss_is_the_weighted_sum_of_squares_and_its_gradient_is_right():
    z = torch.tensor(VALUES, requires_grad=True)
    teacher, labels = torch.tensor(RNG.normal(size=(50, 1))), torch.tensor(LABELS)
    model = lambda **inputs: SimpleNamespace(logits=z)  # noqa: E731
    for alpha, known in ((0.7, teacher), (0.0, None), (1.0, teacher)):
        found = RegressionTask(TASK).loss_sum(model, {"inputs": {}, "labels_N": labels}, Loss(alpha), known)
        (grad,) = torch.autograd.grad(found, z)
        target = labels[:, None] if known is None else alpha * known + (1 - alpha) * labels[:, None]
        right = alpha * np.square(VALUES - teacher.numpy()).sum() + (1 - alpha) * np.square(VALUES[:, 0] - LABELS).sum()
        assert found.item() == pytest.approx(right, rel=1e-12)
        torch.testing.assert_close(grad, 2 * (z.detach() - target), rtol=1e-10, atol=1e-12)


def test_half_precision_is_summed_in_float32():
    z = torch.full((3000, 1), 300.0, dtype=torch.float16)
    model = lambda **inputs: SimpleNamespace(logits=z)  # noqa: E731
    found = RegressionTask(TASK).loss_sum(model, {"inputs": {}, "labels_N": torch.zeros(3000)}, Loss(0.0), None)
    assert float(found) == pytest.approx(3000 * 300.0**2)


def test_scores_are_those_of_scikit_learn_and_scipy():
    found = RegressionTask(TASK).metrics(VALUES, ROWS)
    values = VALUES[:, 0]
    assert found == pytest.approx({
        "r2": sk.r2_score(LABELS, values), "pearson": stats.pearsonr(LABELS, values).statistic,
        "spearman": stats.spearmanr(LABELS, values).statistic,
        "rmse": sk.root_mean_squared_error(LABELS, values), "mae": sk.mean_absolute_error(LABELS, values),
    })  # fmt: skip
    sums, weights = RegressionTask(TASK).added(VALUES, ROWS)
    assert sums.sum() / weights.sum() == pytest.approx(found["r2"])


def test_an_answer_that_is_always_the_same_scores_zero_and_never_breaks():
    found = RegressionTask(TASK).metrics(np.full((50, 1), LABELS.mean()), ROWS)
    assert found["r2"] == pytest.approx(0, abs=1e-12)
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    assert np.isfinite(
        [score["low"] for score in RegressionTask(TASK).scores(("pearson",), VALUES * 0, ROWS).values()]
    ).all()


def test_a_rows_hash_tells_numbers_apart_that_are_equal_as_integers():
    def of(*labels):
        columns = {"input_ids": [[1, 2]] * 2, "num_tokens": [2, 2], "truncated": [False] * 2, "label": list(labels)}
        return row_hashes(datasets.Dataset.from_dict(columns, features=RegressionTask(TASK).features())).tolist()

    assert of(0.25, 0.5)[0] != of(0.75, 0.5)[0]
    assert of(0.25, 0.5)[1] == of(0.75, 0.5)[1]


def test_numbers_that_are_all_the_same_teach_nothing():
    assert RegressionTask(TASK).nothing_to_learn(rows_of([2.0, 2.0])) == "column 'mood' holds 2.0 in every row"
    assert RegressionTask(TASK).nothing_to_learn(rows_of([2.0, 2.5])) is None
