"""Tune the (quantized) teacher on the labels, and stop the run if it is no better than chance.

Leaves: `adapter/` (or `model/`), `heads.json`, `train_log.jsonl`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distilpeft import models
from distilpeft.artifact import Artifact
from distilpeft.errors import GateError
from distilpeft.losses import ce_sum
from distilpeft.pair import new_teacher, save_teacher, teacher_source, tokenizer_digest
from distilpeft.recipe import Recipe
from distilpeft.runtime import Runtime
from distilpeft.scoring import majority_share, validator
from distilpeft.tasks import TaskData
from distilpeft.train import Work, train


def run(runtime: Runtime, recipe: Recipe, data: TaskData, out: Artifact) -> dict[str, Any]:
    """Tune the teacher into `out.partial`.

    Returns:
        Figures for the manifest: of the training, and how it compares with the untuned base on validation rows.

    Raises:
        GateError: it is not finite, or does not beat both the majority class and the untuned base on the
            validation rows; the message holds the figures.
    """
    source = teacher_source(recipe)
    tokenizer = models.load_tokenizer(source)
    model, heads = new_teacher(runtime, recipe, tokenizer)
    rows = data.tokens("train", tokenizer, tokenizer_digest(source))
    held_out = data.tokens("validation", tokenizer, tokenizer_digest(source))

    def loss_sum(wrapped: nn.Module, batch: dict[str, Any]) -> Tensor:
        with runtime.autocast(recipe.teacher.fit.precision):
            outputs = wrapped(**batch["inputs"])
        return ce_sum(data.task.row_logits(outputs), batch["labels_N"])

    validate = validator(runtime, recipe, data, held_out, recipe.teacher.fit.precision)
    work = Work(
        label="teacher",
        fit=recipe.teacher.fit,
        optim=recipe.teacher.optim,
        seed=recipe.seed,
        lengths_N=rows.lengths_N,
        load_batch=rows.load_batch,
        loss_sum=loss_sum,
        count_rows=data.task.count_rows,
        validate=validate,
        folder=out.partial,
    )
    figures = train(runtime, model, work)
    figures["tuned"] = validate(model)
    figures["untuned"] = figures["validations"][0]
    figures["majority"] = majority_share(rows.labels_N, held_out.labels_N)
    _gate(runtime, recipe, figures)
    figures |= {
        "num_parameters": models.num_parameters(model),
        "num_trainable": sum(parameter.numel() for parameter in models.trainable(model).values()),
        "size_bytes": models.size_bytes(model),
        "train_rows": len(rows.lengths_N),
        "truncated_rows": rows.num_truncated,
        "duplicates": data.duplicates,
        "commit": getattr(model.config, "_commit_hash", None),
    }
    if runtime.is_main:
        save_teacher(model, out.partial, heads)
    return figures


def _gate(runtime: Runtime, recipe: Recipe, figures: dict[str, Any]) -> None:
    """A teacher that is no better than a guess would supervise to the end, and cost days."""
    tuned, untuned, majority = figures["tuned"], figures["untuned"], figures["majority"]
    if tuned["finite"] and tuned["accuracy"] > majority and tuned["accuracy"] > untuned["accuracy"]:
        return
    found = f"{tuned['accuracy']:.4f}" if tuned["finite"] else "not finite"
    message = (
        f"the tuned teacher is no teacher: its validation accuracy is {found}; the untuned base has "
        f"{untuned['accuracy']:.4f}, the majority class {majority:.4f}. Tune it longer or with another lr; "
        f"teacher.gate: warn goes on all the same"
    )
    if recipe.teacher.gate == "stop":
        raise GateError(message)
    runtime.say(f"  warning: {message}")
