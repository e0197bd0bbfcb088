"""Train a student on `alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE`, or as one of those it is compared with.

Leaves: `model/`, an ordinary transformers model with its tokenizer, and `train_log.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distilpeft.distillation.losses import Loss
from distilpeft.distillation.projections import drop_projections
from distilpeft.distillation.sparse import Sparse
from distilpeft.distillation.store import SoftTargets
from distilpeft.machine.artifact import Artifact, Figures
from distilpeft.machine.runtime import Runtime
from distilpeft.models import vocabulary, weights
from distilpeft.models.context import Context
from distilpeft.models.pair import MODEL, Loaded
from distilpeft.models.soft_targets import open_targets
from distilpeft.models.student import new_student, save_student
from distilpeft.models.teacher import load_teacher
from distilpeft.planning.roles import ARMS, CE_LONG, CE_ONLY, HARD, LABELLED, STUDENT
from distilpeft.recipe import Recipe
from distilpeft.recipe.distil import Divergence
from distilpeft.recipe.training import Fit
from distilpeft.tasks.checked_rows import VIEWS
from distilpeft.tasks.rows import TAUGHT, Tokens
from distilpeft.tasks.task import Batch, Task
from distilpeft.training.features import FeatureLoss
from distilpeft.training.rounding import Rounding, attach
from distilpeft.training.scoring import Soft, soft_of, soft_of_rows, validator
from distilpeft.training.step import Watch, Work, steps_per_epoch, total_steps
from distilpeft.training.tracking import tracked
from distilpeft.training.train import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LABELS = {
    STUDENT: "distil", CE_ONLY: "CE-only", CE_LONG: "CE-only, as long", HARD: "hard labels", LABELLED: "labelled rows",
}  # fmt: skip
"""What a training is called while it runs."""
MOST_NAMED = 20
"""New weights whose names the manifest holds; of more their number."""
INNER = 1
"""Stream of the random numbers that projections start with, next to the seed."""


@dataclass(frozen=True)
class Supervision:
    """What a student learns from besides labels.

    Attributes:
        train: what the teacher knows of a training batch, from disk or by running it.
        validation: the same of a validation batch, where validation asks the teacher.
        teacher: the running model, if one runs.
    """

    train: Soft | None = None
    validation: Soft | None = None
    teacher: PreTrainedModel = None


def run(
    context: Context, *, role: str, teacher: Artifact | None, targets: Path | None, out: Artifact,
    watch: Watch | None = None,
) -> Figures:  # fmt: skip
    """Train a student into `out.partial`.

    Args:
        context: the run, with the recipe's `student`, `distil` and `targets` sections.
        role: which student, see `roles.ARMS`.
        teacher: the tuned teacher; needed by `from_teacher`, by `static` and by online targets.
        targets: folder of cached soft targets; None computes them online (or not at all if alpha is 0).
        out: where the student goes.
        watch: sees every validation, and may raise.

    Returns:
        Figures for the manifest.
    """
    recipe, arm = context.recipe, ARMS[role]
    alpha = 0.0 if arm.teacher is None else recipe.distil.alpha
    student = new_student(context, teacher.path if teacher else None)
    rows = context.data.tokens(TAUGHT if arm.unlabelled else "train", student.reader)
    if arm.teacher is not None and recipe.data.views is not None:
        rows = rows.fixed()
    fit = recipe.distil.ce_only_fit if role == CE_ONLY else recipe.distil.fit
    if arm.equal_steps:
        fit = _as_long(fit, len(context.data.tokens(TAUGHT, student.reader).lengths_N), len(rows.lengths_N))
    held_out = context.data.tokens("validation", student.reader)
    supervision = _supervision(context, teacher, targets) if alpha > 0 else Supervision()

    loss = Loss.of(recipe.distil, alpha)
    if arm.teacher == "hard":
        # The divergence from a distribution with all of its probability on one class is that class's cross-entropy.
        loss = replace(loss, temperature=1.0, divergence=Divergence())
        supervision = replace(supervision, train=_hardened(context.task, supervision.train))
    loss_sum = _loss(context, student, supervision, loss, inner=arm.teacher == "soft" and alpha > 0)
    validate = validator(context, held_out, recipe.distil.fit.precision, supervision.validation)
    rounding = _rounding(recipe, student.model)
    work = Work(
        label=LABELS[role],
        fit=fit,
        optim=recipe.distil.optim,
        seed=recipe.seed,
        lengths_N=rows.lengths_N,
        load_batch=rows.load_batch,
        loss_sum=loss_sum,
        count_rows=context.task.count_rows,
        count_labelled=context.task.count_labelled if rows.num_labelled is not None else None,
        validate=validate if rounding is None else rounding.during(validate),
        before_step=None if rounding is None else _rounds_from(rounding, recipe, total_steps(len(rows.lengths_N), fit)),
        folder=out.partial,
        monitor=_monitor(recipe, alpha),
        watch=watch,
    )
    start = _start(context, student, rows)
    with tracked(context.runtime, recipe, out) as track:
        figures = train(context.runtime, student.model, replace(work, track=track))

    drop_projections(student.model)
    if rounding is not None:
        rounding.remove()
    if context.runtime.is_main:
        save_student(recipe, student.model, student.tokenizer, out.partial / MODEL)
    return figures | start


def _loss(
    context: Context, student: Loaded, supervision: Supervision, loss: Loss, *, inner: bool
) -> Callable[[nn.Module, Batch], Tensor]:
    """The function that the loop differentiates; gives the student what only training needs."""
    recipe, task, runtime = context.recipe, context.task, context.runtime
    fit = recipe.distil.fit
    runtime.seed(recipe.seed, INNER)  # of what only training has, whatever was loaded before it
    if not recipe.kind.has_labels:
        task.attach(student.model, task.vocabulary(supervision.teacher, recipe.data.max_tokens))
    terms = _inner(recipe, student.model, supervision.teacher) if inner else None

    def loss_sum(bare: nn.Module, batch: Batch) -> Tensor:
        known = supervision.train(batch) if supervision.train else None
        with runtime.autocast(fit.precision):
            total = task.loss_sum(bare, batch, loss, known)
            if terms is not None:
                total = total + terms.sum(bare, batch, task.count_rows(batch))
        return total

    return loss_sum


def _rounding(recipe: Recipe, student: PreTrainedModel) -> Rounding | None:
    """What lets the student round as the export will that it is trained for."""
    quantization = recipe.distil.quantization
    return None if quantization is None else attach(student, quantization.form)


def _rounds_from(rounding: Rounding, recipe: Recipe, total: int) -> Callable[[int], None]:
    """Switches the rounding on for the last share of the steps."""
    assert recipe.distil.quantization is not None
    first = total - max(1, round(recipe.distil.quantization.share * total))

    def switch(step: int) -> None:
        rounding.is_on = step >= first

    return switch


def _hardened(task: Task, soft: Soft | None) -> Soft:
    """Of soft targets, only the likeliest class."""
    assert soft is not None
    return lambda batch: task.hardened(soft(batch))


def _as_long(fit: Fit, num_taught: int, num_rows: int) -> Fit:
    """A fit on these rows that takes as many steps, and is validated as often, as the recipe's on all."""
    steps = total_steps(num_taught, fit)
    return fit.model_copy(
        update={
            "epochs": math.ceil(steps / steps_per_epoch(num_rows, fit)),
            "max_steps": steps,
            "validate_every": fit.validate_every or steps_per_epoch(num_taught, fit),
        }
    )


def _monitor(recipe: Recipe, alpha: float) -> str:
    """The metric that picks the checkpoint; without a teacher there is no distance to it."""
    asked = recipe.monitor(recipe.distil.fit)
    return asked if asked != "kl" or alpha > 0 else recipe.kind.main


def _start(context: Context, student: Loaded, rows: Tokens) -> Figures:
    """What the student was before it was trained, and its rows; for the manifest."""
    recipe, data = context.recipe, context.data
    fresh = [] if recipe.student.from_teacher else list(getattr(student.model, "fresh", []))
    figures: Figures = {
        "num_parameters": weights.num_parameters(student.model),
        "start": {"from": origin(recipe), "new_weights": fresh if len(fresh) <= MOST_NAMED else len(fresh)},
        "train_rows": len(rows.lengths_N),
    }
    if rows.num_labelled is not None:
        figures |= {"labelled_rows": rows.num_labelled, "held_out_rows": data.held_out}
        if data.num_rows(VIEWS):
            figures["view_rows"] = len(data.tokens(VIEWS, student.reader).lengths_N)
    if context.pair.cut is not None:
        figures["vocabulary"] = vocabulary.figures(context.pair, data, student.model.cut_weights)
    return figures | {"truncated_rows": rows.num_truncated}


def _supervision(context: Context, teacher: Artifact | None, targets: Path | None) -> Supervision:
    """Soft targets from disk, or from the running teacher.

    Token-level targets need the very same tokens, so the teacher runs on the student's own batch, and targets on disk
    are checked against the student's rows. Over classes the two may have different tokenizers: the teacher reads the
    same rows, by row id, in its own.
    """
    recipe = context.recipe
    assert teacher is not None
    kept = None
    if targets is not None:
        owner = teacher if recipe.targets.source is None else None
        kept = _kept(context.runtime, recipe, open_targets(context.pair, context.data, targets, owner))
        if recipe.kind.has_labels:
            return Supervision(kept)
    precision = recipe.targets.precision
    loaded = load_teacher(context.runtime, context.pair, teacher.path, precision, placed=True)
    if recipe.kind.is_language_model:
        live = soft_of(context, loaded, precision, context.pair.student_reader)
        return Supervision(live, live, loaded.model)
    beside = None if recipe.kind.has_labels else soft_of_rows(context, loaded, precision, "validation")
    return Supervision(kept or soft_of_rows(context, loaded, precision, TAUGHT), beside, loaded.model)


def origin(recipe: Recipe) -> str:
    """What the student was before it was trained, in words."""
    words = recipe.student.words
    return words if recipe.student.from_teacher is None else f"{words} of the teacher"


def _inner(recipe: Recipe, student: PreTrainedModel, teacher: PreTrainedModel) -> FeatureLoss | None:
    """The terms from inside the teacher, if the recipe has any."""
    if recipe.distil.features is None:
        return None
    return FeatureLoss(recipe.distil.features, student, teacher, by_token=recipe.kind.unit != "rows")


def _kept(runtime: Runtime, recipe: Recipe, store: SoftTargets) -> Soft:
    """Soft targets from disk, by row id: dense ones on the device, sparse ones moved chunk by chunk."""
    layout, temperature = store.layout, recipe.distil.temperature

    def soft(batch: Batch) -> Any:
        kept = store.lookup(batch["row_ids_N"])
        if layout.kind == "full":
            return torch.from_numpy(kept.values).to(runtime.device)
        return Sparse.of(kept, layout, temperature)

    return soft
