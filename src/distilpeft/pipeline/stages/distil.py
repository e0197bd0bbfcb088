"""Train the student on `alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE`; alpha = 0 is the baseline.

Leaves: `model/`, an ordinary transformers model with its tokenizer, and `train_log.jsonl`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distilpeft.distillation.losses import Loss
from distilpeft.distillation.projections import drop_projections
from distilpeft.distillation.sparse import Sparse
from distilpeft.distillation.store import SoftTargets
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.runtime import Runtime
from distilpeft.models import weights
from distilpeft.models.pair import MODEL
from distilpeft.models.soft_targets import open_targets
from distilpeft.models.student import new_student, save_student
from distilpeft.models.teacher import load_teacher
from distilpeft.recipe import Recipe
from distilpeft.tasks.rows import TaskData
from distilpeft.tasks.task import Batch
from distilpeft.training.features import FeatureLoss
from distilpeft.training.scoring import Soft, soft_of, soft_of_rows, validator
from distilpeft.training.step import Watch, Work
from distilpeft.training.tracking import tracked
from distilpeft.training.train import train

MOST_NAMED = 20
"""New weights whose names the manifest holds; of more their number."""
INNER = 1
"""Of the random numbers that projections begin with, beside the seed."""


def run(
    runtime: Runtime, recipe: Recipe, data: TaskData, *, alpha: float, teacher: Artifact | None,
    targets: Path | None, out: Artifact, watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a student into `out.partial`.

    Args:
        runtime: the machine.
        recipe: its `student`, `distil` and `targets` sections.
        data: the rows.
        alpha: weight of the teacher; 0 for the CE-only baseline.
        teacher: the tuned teacher; needed by `from_teacher` and by online targets.
        targets: folder of cached soft targets; None computes them online (or not at all if alpha is 0).
        out: where the student goes.
        watch: sees every validation, and may raise.

    Returns:
        Figures for the manifest.
    """
    student = new_student(runtime, recipe, data, teacher.path if teacher else None)
    rows = data.tokens("train", student.tokenizer, student.tokenizer_digest)
    held_out = data.tokens("validation", student.tokenizer, student.tokenizer_digest)
    fit, task = recipe.distil.fit, data.task
    loss = Loss.of(recipe.distil, alpha)
    soft, live, teacher_model = _soft(runtime, recipe, data, teacher, targets) if alpha > 0 else (None, None, None)

    runtime.seed(recipe.seed, INNER)  # of what only training has, whatever was loaded before it
    if not recipe.kind.labels:
        task.attach(student.model, task.vocabulary(teacher_model, recipe.data.max_tokens))
    inner = _inner(recipe, student.model, teacher_model) if alpha > 0 else None

    def loss_sum(bare: nn.Module, batch: Batch) -> Tensor:
        known = soft(batch) if soft else None
        with runtime.autocast(fit.precision):
            found: Tensor = task.loss_sum(bare, batch, loss, known)
            if inner is not None:
                found = found + inner.sum(bare, batch, task.count_rows(batch))
        return found

    work = Work(
        label="distil" if alpha > 0 else "CE-only",
        fit=fit,
        optim=recipe.distil.optim,
        seed=recipe.seed,
        lengths_N=rows.lengths_N,
        load_batch=rows.load_batch,
        loss_sum=loss_sum,
        count_rows=task.count_rows,
        validate=validator(runtime, recipe, data, held_out, fit.precision, live),
        folder=out.partial,
        monitor=recipe.monitor(fit) if recipe.monitor(fit) != "kl" or alpha > 0 else recipe.kind.main,
        watch=watch,
    )
    num_parameters = weights.num_parameters(student.model)
    fresh = [] if recipe.student.from_teacher else getattr(student.model, "fresh", [])
    with tracked(runtime, recipe, out) as track:
        figures = train(runtime, student.model, replace(work, track=track))
    drop_projections(student.model)
    if runtime.is_main:
        save_student(student.model, student.tokenizer, out.partial / MODEL)
    return {
        **figures,
        "num_parameters": num_parameters,
        "start": {"from": origin(recipe), "new_weights": list(fresh) if len(fresh) <= MOST_NAMED else len(fresh)},
        "train_rows": len(rows.lengths_N),
        "truncated_rows": rows.num_truncated,
    }


def _soft(
    runtime: Runtime, recipe: Recipe, data: TaskData, teacher: Artifact | None, targets: Path | None
) -> tuple[Soft, Soft | None, Any]:
    """What the teacher knows of a batch, from disk or by running it; the same for validation; and the running model.

    The last two are None where validation does not ask for the teacher, and where none runs.

    Token-level targets need the very same tokens, so the teacher runs on the student's own batch, and targets on disk
    are checked against the student's rows. Over classes the two may have different tokenizers: the teacher reads the
    same rows, by row id, in its own.
    """
    assert teacher is not None
    if targets is not None:
        whose = teacher if recipe.targets.source is None else None
        kept = _kept(runtime, recipe, open_targets(recipe, data, targets, whose))
        if recipe.kind.labels:
            return kept, None, None
    precision = recipe.targets.precision
    loaded = load_teacher(runtime, recipe, teacher.path, precision, placed=True)
    if recipe.kind.language:
        live = soft_of(runtime, data, loaded, precision)
        return live, live, loaded.model
    beside = None if recipe.kind.labels else soft_of_rows(runtime, data, loaded, precision, "validation")
    train_rows = kept if targets is not None else soft_of_rows(runtime, data, loaded, precision, "train")
    return train_rows, beside, loaded.model


def origin(recipe: Recipe) -> str:
    """What the student was before it was trained, in words."""
    student = recipe.student
    if student.from_teacher is not None:
        return f"{student.from_teacher} of the teacher"
    return f"configuration of {student.from_config.model}" if student.from_config else str(student.model)


def _inner(recipe: Recipe, student: Any, teacher: Any) -> FeatureLoss | None:
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
