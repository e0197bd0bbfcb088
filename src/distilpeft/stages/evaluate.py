"""Score one model on the held-out rows, and compare it row by row with the teacher.

Leaves: `logits.npy`, float32 [rows, classes].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distilpeft.artifact import Artifact
from distilpeft.errors import GateError
from distilpeft.metrics import agreement, scores
from distilpeft.pair import Loaded
from distilpeft.recipe import Recipe
from distilpeft.runtime import Runtime
from distilpeft.scoring import logits_of
from distilpeft.tasks import TaskData

LOGITS = "logits.npy"


def run(
    runtime: Runtime, recipe: Recipe, data: TaskData, *, loaded: Loaded | None, reference: Artifact | None,
    out: Artifact,
) -> dict[str, Any]:  # fmt: skip
    """Score a model into `out.partial`.

    Args:
        runtime: the machine.
        recipe: its `evaluate` section.
        data: the rows.
        loaded: the model; None scores the answer "as often as in training", whose top class is the majority's.
        reference: the teacher's evaluation, to measure KL and agreement against.
        out: where the logits go.

    Raises:
        GateError: a logit is not finite.
    """
    settings = recipe.evaluate
    if loaded is None:
        labels_N = data.labels(settings.split)
        share_C = np.bincount(data.labels("train"), minlength=len(recipe.task.labels)) / data.num_rows("train")
        logits_NC = np.tile(np.log(np.maximum(share_C, 1e-9)), (len(labels_N), 1)).astype(np.float32)
    else:
        rows = data.tokens(settings.split, loaded.tokenizer, loaded.tokenizer_digest)
        labels_N = rows.labels_N
        with runtime.bar(f"evaluate on {settings.split}", len(labels_N)) as bar:
            logits_NC = logits_of(
                runtime, loaded.model, data, rows, precision=settings.precision,
                micro_batch_size=settings.micro_batch_size, bar=bar,
            )  # fmt: skip
    if not np.isfinite(logits_NC).all():
        raise GateError(f"evaluate: {(~np.isfinite(logits_NC)).any(-1).sum()} rows have logits that are not finite")
    if runtime.is_main:
        np.save(out.partial / LOGITS, logits_NC, allow_pickle=False)
    figures: dict[str, Any] = {"scores": scores(settings.metrics, logits_NC.astype(np.float64), labels_N)}
    if reference is not None:
        teacher_NC = np.load(reference.path / LOGITS, allow_pickle=False).astype(np.float64)
        figures["against_teacher"] = agreement(logits_NC.astype(np.float64), teacher_NC)
    return figures
