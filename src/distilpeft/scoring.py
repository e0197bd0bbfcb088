"""From a model and rows to scores: the one path that validation, gates and evaluation take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from distilpeft.data import length_order
from distilpeft.metrics import FUNCTIONS, softmax
from distilpeft.predict import predict
from distilpeft.recipe import Precision, Recipe
from distilpeft.runtime import Bar, Runtime
from distilpeft.tasks import TaskData, Tokens


def logits_of(
    runtime: Runtime, model: nn.Module, data: TaskData, rows: Tokens, *, precision: Precision,
    micro_batch_size: int, limit: int | None = None, bar: Bar | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Logits [N, C] of the first `limit` rows of a split (default: all), in the order of row ids."""
    num_rows = min(limit or len(rows.lengths_N), len(rows.lengths_N))
    order = length_order(rows.lengths_N, 0, num_rows)
    found = predict(
        runtime, model, order, rows.load_batch, data.task.row_logits,
        micro_batch_size=micro_batch_size, precision=precision, bar=bar,
    )  # fmt: skip
    logits_NC = np.empty_like(found)
    logits_NC[order] = found
    return logits_NC


def validator(
    runtime: Runtime, recipe: Recipe, data: TaskData, rows: Tokens, precision: Precision
) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a model to all built-in metrics on these rows, and whether its logits are finite."""

    def validate(model: nn.Module) -> dict[str, Any]:
        """Scores of the bare model; all 0 and `finite` 0 where a logit is not finite."""
        size = recipe.evaluate.micro_batch_size
        logits_NC = logits_of(runtime, model, data, rows, precision=precision, micro_batch_size=size)
        if not np.isfinite(logits_NC).all():
            return {"finite": 0.0, **dict.fromkeys(FUNCTIONS, 0.0)}
        probabilities_NC = softmax(logits_NC)
        return {
            "finite": 1.0,
            **{name: score(probabilities_NC, rows.labels_N) for name, score in FUNCTIONS.items()},
        }

    return validate


def majority_share(train_labels_N: NDArray[np.int64], labels_N: NDArray[np.int64]) -> float:
    """Accuracy of always answering the class that is most frequent in training."""
    return float((labels_N == np.bincount(train_labels_N).argmax()).mean())
