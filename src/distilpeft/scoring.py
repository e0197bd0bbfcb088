"""From a model and rows to scores: the one path that validation, gates, evaluation and export take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import nn

from distilpeft.data.batches import length_order
from distilpeft.machine.runtime import Bar, Runtime
from distilpeft.models.pair import Loaded
from distilpeft.predict import Measure, predict
from distilpeft.recipe import Recipe
from distilpeft.recipe.training import Precision
from distilpeft.tasks.rows import TaskData, Tokens

Soft = Callable[[dict[str, Any]], Any]
"""Batch on the device → what the teacher knows of it, in the task's form."""


def values_of(
    runtime: Runtime, model: nn.Module, rows: Tokens, measure: Measure, *, precision: Precision,
    micro_batch_size: int, limit: int | None = None, bar: Bar | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Numbers [N, K] that `measure` finds in the first `limit` rows of a split (default: all), by row id."""
    num_rows = min(limit or len(rows.lengths_N), len(rows.lengths_N))
    order = length_order(rows.lengths_N, 0, num_rows)
    found = predict(
        runtime, model, order, rows.load_batch, measure,
        micro_batch_size=micro_batch_size, precision=precision, bar=bar,
    )  # fmt: skip
    values_NK = np.empty_like(found)
    values_NK[order] = found
    return values_NK


def measure_with(data: TaskData, soft: Soft | None = None) -> Measure:
    """The task's `measure`, with a teacher where it is given one."""
    return lambda model, batch: data.task.measure(model, batch, soft(batch) if soft else None)


def soft_of(runtime: Runtime, data: TaskData, teacher: Loaded, precision: Precision) -> Soft:
    """What a frozen teacher knows of a batch, computed in its own precision."""
    import torch

    def soft(batch: dict[str, Any]) -> Any:
        with torch.no_grad(), runtime.autocast(precision):
            return data.task.soft(teacher.model, batch)

    return soft


def soft_of_rows(runtime: Runtime, data: TaskData, teacher: Loaded, precision: Precision, split: str) -> Soft:
    """The same of a split's rows as the teacher reads them, found by row id: it may have another tokenizer."""
    rows, soft = (
        data.tokens(split, teacher.tokenizer, teacher.tokenizer_digest),
        soft_of(runtime, data, teacher, precision),
    )

    def of_rows(batch: dict[str, Any]) -> Any:
        return soft(send_to_device(rows.load_batch(batch["row_ids_N"], batch["epoch"]), runtime.device))

    return of_rows


def validator(
    runtime: Runtime, recipe: Recipe, data: TaskData, rows: Tokens, precision: Precision, soft: Soft | None = None
) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a model to all built-in metrics on these rows, and whether its numbers are finite."""

    def validate(model: nn.Module) -> dict[str, Any]:
        """Scores of the bare model; only `finite` 0 where a number is not finite."""
        values_NK = values_of(
            runtime, model, rows, measure_with(data, soft),
            precision=precision, micro_batch_size=recipe.evaluate.micro_batch_size,
        )  # fmt: skip
        if not np.isfinite(values_NK).all():
            return {"finite": 0.0}
        found = {"finite": 1.0, **data.task.metrics(recipe.task, values_NK, rows)}
        return found if soft else {name: found[name] for name in ("finite", *recipe.kind.metrics)}

    return validate
