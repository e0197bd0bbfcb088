"""A number for each text, or pair of texts; every row counts once.

The loss is `alpha * (student - teacher)^2 + (1 - alpha) * (student - label)^2`, up to a constant the KL of normal
distributions of one width around these numbers. Columns after `encode`: those of `text_rows`, and label.

    B  rows of a batch    N  rows
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.recipe.task import Regression
from distilpeft.tasks import text_rows
from distilpeft.tasks.text_rows import logits as measured
from distilpeft.tasks.text_rows import one_each as num_positions
from distilpeft.tasks.text_rows import texts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distilpeft.distillation.losses import Loss

__all__ = ["num_positions", "texts"]  # the rows' part of what every task has
AUTO_CLASS = "AutoModelForSequenceClassification"
PEFT_TASK = "SEQ_CLS"
TRAIN_HEADS = True  # the head comes without pretrained weights
BOUNDS = {
    "r2": (-np.inf, 1.0), "pearson": (-1.0, 1.0), "spearman": (-1.0, 1.0), "rmse": (0.0, np.inf), "mae": (0.0, np.inf)
}  # fmt: skip
Values = NDArray[np.floating[Any]]
Doubles = NDArray[np.float64]


def features(task: Regression) -> datasets.Features:
    """Columns after `encode`."""
    return text_rows.features(task, label=datasets.Value("float64"))


def model_options(task: Regression) -> dict[str, Any]:
    """Configuration values of a model for this task."""
    del task
    return {"problem_type": "regression", "num_labels": 1}


def check_columns(task: Regression, rows: datasets.Dataset, origin: str) -> None:
    """Refuse data without the recipe's columns; see `text_rows.check_columns`."""
    text_rows.check_columns({"text": task.text, "pair": task.pair, "label": task.label}, rows, origin)


def faults(task: Regression, rows: datasets.Dataset) -> Iterator[str | None]:
    """Why each row cannot be used; see `text_classification.faults`."""
    own = (
        f"column {task.label!r} holds {cell!r}, which is no number" if number(cell) is None else None
        for cell in text_rows.cells(rows, task.label)
    )
    return text_rows.first_of(text_rows.text_faults(rows, task.text, task.pair), own)


def learnable(task: Regression, rows: datasets.Dataset) -> str | None:
    """Why nothing can be learnt from these training rows; see `text_classification.learnable`."""
    found = {number(cell) for cell in text_rows.cells(rows, task.label)}
    return f"column {task.label!r} holds {found.pop()} in every row" if len(found) == 1 else None


def number(cell: Any) -> float | None:
    """A label cell as a number, None if it is none."""
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def encode(
    task: Regression, features: datasets.Features, batch: dict[str, list[Any]], tokenizer: Any, max_tokens: int
) -> dict[str, list[Any]]:
    """Tokens and numbers of rows that have no fault; see `text_rows.encode`."""
    del features
    return {
        **text_rows.encode(task, batch, tokenizer, max_tokens),
        "label": [number(cell) for cell in batch[task.label]],
    }


def collate(rows: dict[str, list[Any]], tokenizer: Any) -> dict[str, Any]:
    """A batch: `inputs`, see `text_rows.inputs`; `labels_N`: numbers."""
    import torch

    return {"inputs": text_rows.inputs(rows, tokenizer), "labels_N": torch.tensor(rows["label"], dtype=torch.float32)}


def count_rows(batch: dict[str, Any]) -> int:
    """How many rows of a collated batch the loss counts: here all."""
    return len(batch["labels_N"])


def prepare(task: Regression, model: Any) -> None:
    """Nothing to find out: the number is the model's output."""


def soft(teacher: nn.Module, batch: dict[str, Any]) -> Tensor:
    """What the frozen teacher knows of a batch: its numbers, [B, 1]."""
    return measured(teacher, batch).float()


def vocabulary(task: Regression, teacher: Any, max_tokens: int) -> int:
    """Numbers in a soft target: one."""
    del task, teacher, max_tokens
    return 1


def loss_sum(model: nn.Module, batch: dict[str, Any], loss: Loss, soft: Tensor | None) -> Tensor:
    """The loss summed over rows."""
    from distilpeft.distillation.losses import squared_sum

    known = None if soft is None else soft.squeeze(-1)
    return squared_sum(measured(model, batch).squeeze(-1), batch["labels_N"], known, loss)


def measure(model: nn.Module, batch: dict[str, Any], soft: Tensor | None = None) -> Tensor:
    """What the scores of a row are computed from: its number, [B, 1]."""
    del soft
    return measured(model, batch)


def answers(values_N1: Values, labels_N: Values) -> tuple[Values, Values]:
    """Outputs and labels as the export's gate compares them: numbers."""
    return values_N1, labels_N


def majority_values(task: Regression, train: Any, rows: Any) -> NDArray[np.float32]:
    """`measure` of the answer that is always the training rows' mean, [N, 1]."""
    return np.tile(usual(task, train), (len(rows.lengths_N), 1)).astype(np.float32)


def usual(task: Regression, train: Any) -> Doubles:
    """What a new head begins with: the labels' mean in training, [1]."""
    del task
    mean: float = train.column("label").mean()
    return np.array([mean])


def _metrics(values_N: Doubles, labels_N: Doubles) -> dict[str, float]:
    from scipy.stats import rankdata

    gap_N, spread_N = values_N - labels_N, labels_N - labels_N.mean()
    total = float(np.square(spread_N).sum())
    return {
        "r2": 1 - float(np.square(gap_N).sum()) / total if total else 0.0,
        "pearson": _correlation(values_N, labels_N),
        "spearman": _correlation(rankdata(values_N), rankdata(labels_N)),
        "rmse": float(np.sqrt(np.square(gap_N).mean())),
        "mae": float(np.abs(gap_N).mean()),
    }


def _correlation(one_N: Doubles, two_N: Doubles) -> float:
    """Pearson's; 0 where either side is always the same."""
    if np.ptp(one_N) == 0 or np.ptp(two_N) == 0:
        return 0.0
    one_N, two_N = one_N - one_N.mean(), two_N - two_N.mean()
    return float(one_N @ two_N) / math.sqrt(float(one_N @ one_N) * float(two_N @ two_N))


def metrics(task: Regression, values_N1: Values, rows: Any) -> dict[str, float]:
    """All metrics; R² is the share of the labels' variance that the numbers explain, below 0 if the mean is nearer."""
    del task
    return _metrics(values_N1[:, 0].astype(np.float64), rows.column("label"))


def scores(task: Regression, names: tuple[str, ...], values_N1: Values, rows: Any) -> dict[str, dict[str, Any]]:
    """Metric → value, 95 % interval and number of rows."""
    from distilpeft.metrics.classification import scored

    del task
    values_N, labels_N = values_N1[:, 0].astype(np.float64), rows.column("label")
    return scored(lambda draw: _metrics(values_N[draw], labels_N[draw]), names, len(values_N), BOUNDS)


def added(task: Regression, values_N1: Values, rows: Any) -> tuple[Doubles, Doubles]:
    """What each row adds to the variance that is explained, and to all of it: their ratio is R²."""
    del task
    labels_N = rows.column("label")
    all_N = np.square(labels_N - labels_N.mean())
    return all_N - np.square(values_N1[:, 0].astype(np.float64) - labels_N), all_N


def calibration(task: Regression, values_N1: Values, rows: Any) -> dict[str, list[float]] | None:
    """Numbers come without a confidence."""
    del task, values_N1, rows
    return None


def against_teacher(task: Regression, values_N1: Values, teacher_N1: Values, rows: Any) -> dict[str, float]:
    """How far the numbers are from the teacher's: `rmse` and `pearson`."""
    del task, rows
    found = _metrics(values_N1[:, 0].astype(np.float64), teacher_N1[:, 0].astype(np.float64))
    return {name: found[name] for name in ("rmse", "pearson")}


def samples(model: Any, tokenizer: Any, rows: Any, count: int, max_new_tokens: int) -> list[dict[str, str]]:
    """It writes nothing."""
    del model, tokenizer, rows, count, max_new_tokens
    return []
