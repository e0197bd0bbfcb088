"""How far the teacher is ahead of the student that learnt from labels alone, before the student learns from it.

Distilling can close a gap only where there is one. Both are scored on the validation rows, row by row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import GateError
from distilpeft.machine.artifact import Figures
from distilpeft.metrics import significance
from distilpeft.models.context import Context
from distilpeft.models.pair import Loaded
from distilpeft.recipe.task import LOWER_IS_BETTER
from distilpeft.training.scoring import measure_with, values_of


def values_of_validation(context: Context, loaded: Loaded) -> NDArray[np.float32]:
    """What the task measures of each validation row."""
    rows, settings = context.data.tokens("validation", loaded.reader), context.recipe.evaluate
    with context.runtime.bar("lead on validation", len(rows.lengths_N)) as bar:
        return values_of(
            context.runtime, loaded.model, rows, measure_with(context.task), precision=settings.precision,
            micro_batch_size=settings.micro_batch_size, bar=bar,
        )  # fmt: skip


def run(context: Context, *, teacher_NK: NDArray[np.float32], student_NK: NDArray[np.float32]) -> Figures:
    """Compare the two, and say at once if there is nothing to gain.

    Args:
        context: the run, with the recipe's `distil.gate`.
        teacher_NK: what the task measures of the teacher on the validation rows.
        student_NK: the same of the student on labels alone.

    Returns:
        See `significance.compare`: teacher less student, on `num_rows` rows; with `metric`.

    Raises:
        GateError: the teacher is not ahead, or it may be chance, and the recipe stops there.
    """
    recipe, task = context.recipe, context.task
    read = ((teacher_NK, context.pair.teacher_reader), (student_NK, context.pair.student_reader))
    theirs, ours = (
        significance.Added(*task.added(values_NK.astype(np.float64), context.data.tokens("validation", reader)))
        for values_NK, reader in read
    )
    gap = significance.compare(theirs, ours)
    figures = {"metric": recipe.kind.main, "num_rows": len(theirs.sum_N), **gap}
    better = gap["low"] > 0 if recipe.kind.main not in LOWER_IS_BETTER else gap["high"] < 0
    if better:
        return figures
    lead = f"{recipe.kind.main} {gap['difference']:+.4f} (95 % {gap['low']:+.4f} to {gap['high']:+.4f})"
    message = (
        f"on {figures['num_rows']} validation rows the teacher is not ahead, by more than chance, of the student on "
        f"labels alone: {lead}. {advice(context)}"
    )
    if recipe.distil.gate == "stop":
        raise GateError(f"{message}; set distil.gate: warn to continue anyway")
    context.runtime.say(f"  warning: {message}")
    return figures


def advice(context: Context) -> str:
    """What could put the teacher ahead."""
    recipe = context.recipe
    ways = ["a larger base"]
    if recipe.teacher.fit is not None:
        ways.insert(0, "more epochs or another lr for it (distilpeft tune-lr)")
        if recipe.teacher.lora is not None:
            ways.insert(1, "tuning all of its weights (teacher.lora: null)")
    if not recipe.data.may_have_unlabelled:
        ways.append("text without labels for the student (data.unlabelled)")
    return f"Try {', '.join(ways)}, or more validation rows to see a smaller lead"
