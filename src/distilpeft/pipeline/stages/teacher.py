"""Tune the (quantized) teacher on the labels, and stop the run if it is no better than chance.

Leaves: `adapter/` (or `model/`), `heads.json`, `train_log.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from distilpeft.distillation.losses import Loss
from distilpeft.errors import GateError
from distilpeft.machine.artifact import Artifact, Figures
from distilpeft.machine.runtime import Runtime
from distilpeft.models import weights
from distilpeft.models.context import Context
from distilpeft.models.teacher import new_teacher, save_teacher
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import LOWER_IS_BETTER
from distilpeft.tasks.rows import Tokens
from distilpeft.tasks.task import Batch
from distilpeft.training.scoring import validator
from distilpeft.training.step import Work
from distilpeft.training.tracking import tracked
from distilpeft.training.train import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(context: Context, out: Artifact) -> Figures:
    """Tune the teacher into `out.partial`.

    Returns:
        Figures for the manifest: of the training, and how it compares with the untuned base on validation rows.

    Raises:
        GateError: it is not finite, or does not beat both the majority class and the untuned base on the
            validation rows (one without a fault need not be beaten, only equalled); the message holds the figures.
    """
    recipe, reader = context.recipe, context.pair.teacher_reader
    rows = context.data.tokens("train", reader)  # a row that cannot be used shows here, early
    held_out = context.data.tokens("validation", reader)

    model, heads = new_teacher(context)
    sizes = {
        "num_parameters": weights.num_parameters(model),
        "num_trainable": sum(parameter.numel() for parameter in weights.trainable(model).values()),
        "size_bytes": weights.size_bytes(model),
    }

    validate = validator(context, held_out, recipe.teacher.precision)
    if recipe.teacher.fit is None:
        figures: Figures = {"tuned": validate(model)}
    else:
        figures = _tune(context, rows, model, validate, out)
        figures["untuned"] = figures["validations"][0]

    figures["majority"] = _majority(context, rows, held_out)
    _gate(context.runtime, recipe, figures)

    if context.runtime.is_main:
        save_teacher(model, out.partial, heads, tuned=recipe.teacher.fit is not None)
    return figures | {
        **sizes,
        "train_rows": len(rows.lengths_N),
        "truncated_rows": rows.num_truncated,
        "duplicates": context.data.duplicates,
        "skipped_rows": context.data.skipped,
        "commit": getattr(model.config, "_commit_hash", None),
    }


def _tune(
    context: Context,
    rows: Tokens,
    model: PreTrainedModel,
    validate: Callable[[nn.Module], dict[str, float]],
    out: Artifact,
) -> Figures:
    """Train the teacher on the labels; the training's figures, with those of the weights that are kept as `tuned`."""
    recipe, task = context.recipe, context.task
    fit, optim = recipe.teacher.fit, recipe.teacher.optim
    assert fit is not None
    assert optim is not None

    def loss_sum(bare: nn.Module, batch: Batch) -> Tensor:
        with context.runtime.autocast(fit.precision):
            return task.loss_sum(bare, batch, Loss(), None)

    work = Work(
        label="teacher", fit=fit, optim=optim, seed=recipe.seed, lengths_N=rows.lengths_N, load_batch=rows.load_batch,
        loss_sum=loss_sum, count_rows=task.count_rows, validate=validate, folder=out.partial,
        monitor=recipe.monitor(fit),
    )  # fmt: skip
    with tracked(context.runtime, recipe, out) as track:
        figures = train(context.runtime, model, replace(work, track=track))
    figures["tuned"] = figures.pop("kept")
    return figures


def _majority(context: Context, rows: Tokens, held_out: Tokens) -> dict[str, float]:
    """The finite metrics of the best answer that looks at no row."""
    metrics = context.task.metrics(context.task.majority_values(rows, held_out), held_out)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _gate(runtime: Runtime, recipe: Recipe, figures: Figures) -> None:
    """A teacher that is no better than a guess would supervise to the end, and cost days."""
    name = recipe.kind.main
    sign = -1 if name in LOWER_IS_BETTER else 1
    tuned, untuned, majority = figures["tuned"], figures.get("untuned", {}), figures["majority"]
    lead, start = (sign * (tuned[name] - scores.get(name, -sign * math.inf)) for scores in (majority, untuned))
    # A model that begins with a finished head may have nothing left to gain.
    perfect = tuned[name] == (0.0 if sign < 0 else 1.0)
    if tuned["finite"] and lead > 0 and (start > 0 or (perfect and start == 0)):
        return
    score = f"{tuned[name]:.4f}" if tuned["finite"] else "not finite"
    guesses = {"language": "the class-frequency baseline", "values": "the training rows' mean"}
    guess = guesses.get(recipe.kind.family, "the majority class")
    before = f"the untuned base has {untuned.get(name, math.nan):.4f}, " if untuned else ""
    remedy = (
        "Tune it longer or with another lr"
        if untuned
        else "It is used without tuning: are the classes in its own order?"
    )
    message = (
        f"the {'tuned ' if untuned else ''}teacher is no better than chance: its validation {name} is {score}; {before}"
        f"{guess} {majority[name]:.4f}. {remedy}; set teacher.gate: warn to continue anyway"
    )
    if recipe.teacher.gate == "stop":
        raise GateError(message)
    runtime.say(f"  warning: {message}")
