"""Run the frozen teacher once over the training rows and keep its logits.

Leaves a store as `soft_targets` describes it. Interrupted, it goes on after the last finished piece.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distilpeft.artifact import Artifact
from distilpeft.data import length_order
from distilpeft.errors import GateError
from distilpeft.pair import load_teacher
from distilpeft.predict import predict
from distilpeft.recipe import Recipe, TextClassification
from distilpeft.runtime import Runtime
from distilpeft.soft_targets import Writer, binding
from distilpeft.tasks import TaskData

PIECE = 2048  # rows between two syncs to disk


def run(runtime: Runtime, recipe: Recipe, data: TaskData, teacher: Artifact, out: Artifact) -> dict[str, Any]:
    """Compute the logits of every training row into `out.partial`.

    Raises:
        GateError: a logit is not finite; the rows are named.
        StoppedBySignal: a signal came; finished pieces are kept.
    """
    loaded = load_teacher(runtime, recipe, teacher.path, recipe.targets.precision)
    rows = data.tokens("train", loaded.tokenizer, loaded.tokenizer_digest)
    num_rows = len(rows.lengths_N)
    assert isinstance(recipe.task, TextClassification), "token-level targets are computed online"
    num_classes = len(recipe.task.labels)
    bound = binding(teacher, rows.dataset, loaded.tokenizer_digest)
    writer = Writer(out.partial, num_rows, num_classes, bound) if runtime.is_main else None
    done = runtime.from_main(writer.done if writer else 0)
    with runtime.bar("targets", num_rows, done) as bar, runtime.stoppable():
        for start in range(done, num_rows, PIECE):
            order = length_order(rows.lengths_N, start, min(start + PIECE, num_rows))
            found = predict(
                runtime, loaded.model, order, rows.load_batch, data.task.measure,
                micro_batch_size=recipe.targets.micro_batch_size, precision=recipe.targets.precision, bar=bar,
            )  # fmt: skip
            bad = order[~np.isfinite(found).all(-1)]
            if len(bad):
                raise GateError(
                    f"targets: the teacher's logits are not finite for {len(bad)} rows, such as row {bad[0]}"
                )
            if writer is not None:
                piece = np.empty_like(found)
                piece[order - start] = found
                writer.append(piece)
            if runtime.any_stop_requested():
                runtime.stop(f"targets after {start + len(order)} of {num_rows} rows")
    if writer is not None:
        writer.close()
    return {"num_rows": num_rows, "truncated_rows": rows.num_truncated, "bound": bound}
