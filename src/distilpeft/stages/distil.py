"""Train the student on `alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE`; alpha = 0 is the baseline.

Leaves: `model/`, an ordinary transformers model with its tokenizer, and `train_log.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor, nn

from distilpeft import models
from distilpeft.artifact import Artifact
from distilpeft.losses import distil_sum
from distilpeft.pair import MODEL, load_teacher, new_student, save_student, teacher_source, tokenizer_digest
from distilpeft.recipe import Recipe
from distilpeft.runtime import Runtime
from distilpeft.scoring import validator
from distilpeft.soft_targets import SoftTargets, binding
from distilpeft.tasks import TaskData
from distilpeft.train import Work, train

Lookup = Callable[[NDArray[np.int64]], Tensor]


def run(
    runtime: Runtime, recipe: Recipe, data: TaskData, *, alpha: float, teacher: Artifact | None,
    targets: Artifact | None, out: Artifact,
) -> dict[str, Any]:  # fmt: skip
    """Train a student into `out.partial`.

    Args:
        runtime: the machine.
        recipe: its `student`, `distil` and `targets` sections.
        data: the rows.
        alpha: weight of the teacher; 0 for the CE-only baseline.
        teacher: the tuned teacher; needed by `from_teacher` and by online targets.
        targets: cached soft targets; None computes them online (or not at all if alpha is 0).
        out: where the student goes.

    Returns:
        Figures for the manifest.
    """
    student = new_student(runtime, recipe, teacher.path if teacher else None)
    rows = data.tokens("train", student.tokenizer, student.tokenizer_digest)
    held_out = data.tokens("validation", student.tokenizer, student.tokenizer_digest)
    lookup = _lookup(runtime, recipe, data, teacher, targets) if alpha > 0 else None
    fit = recipe.distil.fit

    def loss_sum(wrapped: nn.Module, batch: dict[str, Any]) -> Tensor:
        with runtime.autocast(fit.precision):
            outputs = wrapped(**batch["inputs"])
        soft_NC = lookup(batch["row_ids_N"]) if lookup else None
        logits_NC = data.task.row_logits(outputs)
        return distil_sum(logits_NC, batch["labels_N"], soft_NC, alpha=alpha, temperature=recipe.distil.temperature)

    work = Work(
        label="distil" if alpha > 0 else "CE-only",
        fit=fit,
        optim=recipe.distil.optim,
        seed=recipe.seed,
        lengths_N=rows.lengths_N,
        load_batch=rows.load_batch,
        loss_sum=loss_sum,
        count_rows=data.task.count_rows,
        validate=validator(runtime, recipe, data, held_out, fit.precision),
        folder=out.partial,
    )
    figures = train(runtime, student.model, work)
    if runtime.is_main:
        save_student(student.model, student.tokenizer, out.partial / MODEL)
    return {
        **figures,
        "num_parameters": models.num_parameters(student.model),
        "train_rows": len(rows.lengths_N),
        "truncated_rows": rows.num_truncated,
    }


def _lookup(
    runtime: Runtime, recipe: Recipe, data: TaskData, teacher: Artifact | None, targets: Artifact | None
) -> Lookup:
    """A function from row ids to the teacher's logits [N, C]: from disk, or by running the teacher."""
    assert teacher is not None
    if targets is not None:
        source = teacher_source(recipe)
        digest = tokenizer_digest(source)
        teacher_rows = data.tokens("train", models.load_tokenizer(source), digest)
        store = SoftTargets(targets.path, binding(teacher, teacher_rows.dataset, digest))
        return lambda row_ids_N: torch.from_numpy(store.lookup(row_ids_N)).to(runtime.device)
    loaded = load_teacher(runtime, recipe, teacher.path, recipe.targets.precision)
    rows = data.tokens("train", loaded.tokenizer, loaded.tokenizer_digest)

    def online(row_ids_N: NDArray[np.int64]) -> Tensor:
        batch = send_to_device(rows.load_batch(row_ids_N), runtime.device)
        with torch.no_grad(), runtime.autocast(recipe.targets.precision):
            logits_NC: Tensor = data.task.row_logits(loaded.model(**batch["inputs"]))
        return logits_NC.float()

    return online
