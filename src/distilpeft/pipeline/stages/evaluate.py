"""Score one model on the held-out rows, and compare it row by row with the teacher.

Leaves: `values.npy`, what the task measures per row: logits [rows, classes], or sums over the row's tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import GateError
from distilpeft.export.graph_module import rows_at_once
from distilpeft.machine.artifact import Artifact, Figures
from distilpeft.metrics.score import Score
from distilpeft.models.context import Context
from distilpeft.models.pair import Loaded
from distilpeft.tasks.rows import RowSubset, Tokens
from distilpeft.tasks.task import Batch, Values
from distilpeft.training.scoring import cut_of, measure_with, soft_of, soft_of_rows, values_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VALUES = "values.npy"
SPEAKERS = ("teacher", "student")


def run(
    context: Context, *, loaded: Loaded | None, teacher: Loaded | None, reference: Artifact | None, role: str,
    out: Artifact,
) -> Figures:  # fmt: skip
    """Score a model into `out.partial`.

    Args:
        context: the run, with the recipe's `evaluate` section.
        loaded: the model; None scores the class-frequency baseline.
        teacher: the running teacher, for tasks that compare token by token.
        reference: the teacher's evaluation, to compare with row by row.
        role: of the model; teacher and student also write samples.
        out: where the values go.

    Raises:
        GateError: a value is not finite.
    """
    settings, task, data = context.recipe.evaluate, context.task, context.data
    if loaded is None:
        train, rows = (data.tokens(split, context.pair.teacher_reader) for split in ("train", settings.split))
        values_NK = task.majority_values(train, rows)
    else:
        rows = data.tokens(settings.split, loaded.reader)
        values_NK = _values(context, loaded, teacher, rows)
        _check_finite(values_NK)
    if context.runtime.is_main:
        np.save(out.partial / VALUES, values_NK, allow_pickle=False)

    figures: Figures = {"scores": task.scores(context.recipe.metrics, values_NK, rows)}
    groups_N = data.groups()
    if groups_N is not None:
        figures["groups"] = _by_group(context, values_NK, rows, groups_N)
    if reference is not None:
        teacher_NK = np.load(reference.file(VALUES), allow_pickle=False)
        figures["against_teacher"] = _against(context, values_NK, teacher_NK, rows, loaded)
    if loaded is not None and role in SPEAKERS and settings.samples:
        figures["samples"] = task.samples(
            loaded.model, loaded.tokenizer, rows, settings.samples, settings.sample_tokens
        )
    return figures


def _against(
    context: Context, values_NK: Values, teacher_NK: Values, rows: Tokens, loaded: Loaded | None
) -> dict[str, float] | None:
    """How far a model is from its teacher; where answers are places in a text, on rows that both read alike."""
    recipe, cut = context.recipe, None if loaded is None else cut_of(context.pair, loaded.reader)
    if cut is None or not recipe.kind.same_tokens or recipe.kind.is_language_model:
        return context.task.against_teacher(values_NK, teacher_NK, rows)
    theirs = context.data.tokens(recipe.evaluate.split, context.pair.teacher_reader)
    if len(theirs.lengths_N) != len(rows.lengths_N):
        return None  # texts take other windows
    alike_N = theirs.lengths_N == rows.lengths_N
    if not alike_N.any():
        return None
    some, width = RowSubset(rows, alike_N), 2 * int(rows.lengths_N[alike_N].max())
    return context.task.against_teacher(values_NK[alike_N, :width], teacher_NK[alike_N, :width], some)


def _check_finite(values_NK: Values) -> None:
    if not np.isfinite(values_NK).all():
        bad = (~np.isfinite(values_NK)).any(-1)
        raise GateError(f"evaluate: {bad.sum()} rows have values that are not finite, such as row {bad.argmax()}")


def _by_group(
    context: Context, values_NK: Values, rows: Tokens, groups_N: NDArray[np.str_]
) -> dict[str, dict[str, Score]]:
    """The scores of each group's rows."""
    return {
        str(name): context.task.scores(
            context.recipe.metrics, values_NK[groups_N == name], RowSubset(rows, groups_N == name)
        )
        for name in np.unique(groups_N)
    }


def _values(context: Context, loaded: Loaded, teacher: Loaded | None, rows: Tokens) -> NDArray[np.float32]:
    """What the task measures of each row, next to the teacher if there is one."""
    runtime, recipe = context.runtime, context.recipe
    settings, soft = recipe.evaluate, None
    if teacher is not None:
        soft = (
            soft_of(context, teacher, settings.precision, loaded.reader)
            if recipe.kind.is_language_model
            else soft_of_rows(context, teacher, settings.precision, settings.split)
        )
    with runtime.bar(f"evaluate on {settings.split}", len(rows.lengths_N)) as bar:
        values_NK = values_of(
            runtime, loaded.model, rows, measure_with(context.task, soft), precision=settings.precision,
            micro_batch_size=rows_at_once(loaded.model, settings.micro_batch_size, recipe.data.max_tokens), bar=bar,
        )  # fmt: skip
    if not recipe.kind.generation_metrics:
        return values_NK
    return np.concatenate([values_NK, _counts_of_texts(context, loaded, rows)], axis=1)


def _counts_of_texts(context: Context, loaded: Loaded, rows: Tokens) -> NDArray[np.float32]:
    """What is counted of the texts that the model writes by itself; zeros for rows beyond `evaluate.generate.rows`."""
    section, settings, runtime = context.recipe.evaluate, context.recipe.evaluate.generate, context.runtime
    count = min(settings.rows, len(rows.lengths_N))

    def measure(model: PreTrainedModel, batch: Batch) -> Any:
        return context.task.written(model, batch, loaded.tokenizer, settings)

    with runtime.bar(f"write {count} {section.split} rows", count) as bar:
        values_NK = values_of(
            runtime, loaded.model, rows, measure, precision=section.precision,
            micro_batch_size=section.micro_batch_size, limit=count, bar=bar,
        )  # fmt: skip
    return np.pad(values_NK, ((0, len(rows.lengths_N) - count), (0, 0)))
