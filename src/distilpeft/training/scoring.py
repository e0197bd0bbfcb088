"""From a model and rows to scores: the one path that validation, gates, evaluation and export take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distilpeft.data.batches import chunks, length_order
from distilpeft.distillation.fused import Running, vocabulary_of
from distilpeft.machine.runtime import Bar, Runtime
from distilpeft.models.context import Context
from distilpeft.models.pair import CutVocabulary, Loaded, Pair
from distilpeft.recipe.training import Precision
from distilpeft.tasks.rows import RowReader, Tokens
from distilpeft.tasks.task import Batch, Task

Soft = Callable[[Batch], Any]
"""Batch on the device → what the teacher knows of it, in the task's form."""


def values_of(
    runtime: Runtime, model: nn.Module, rows: Tokens, measure: Measure, *, precision: Precision,
    micro_batch_size: int, limit: int | None = None, bar: Bar | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Numbers [N, K] that `measure` finds in the first `limit` rows of a split (default: all), by row id."""
    num_rows = min(limit or len(rows.lengths_N), len(rows.lengths_N))
    order = length_order(rows.lengths_N, 0, num_rows)
    ordered_NK = predict(
        runtime, model, order, rows.load_batch, measure,
        micro_batch_size=micro_batch_size, precision=precision, bar=bar,
    )  # fmt: skip
    values_NK = np.empty_like(ordered_NK)
    values_NK[order] = ordered_NK
    return values_NK


def measure_with(task: Task, soft: Soft | None = None) -> Measure:
    """The task's `measure`, with a teacher where it is given one."""
    return lambda model, batch: task.measure(model, batch, soft(batch) if soft else None)


def soft_of(context: Context, teacher: Loaded, precision: Precision, reader: RowReader | None = None) -> Soft:
    """What a frozen teacher knows of a batch, computed in its own precision.

    Args:
        context: the run.
        teacher: the teacher.
        precision: of the computation.
        reader: who reads the batch; the ids of a cut vocabulary are translated. None: the teacher itself.
    """
    cut = None if reader is None else cut_of(context.pair, reader)

    def soft(batch: Batch) -> Any:
        with torch.no_grad(), context.runtime.autocast(precision):
            if cut is None:
                return context.task.soft(teacher.model, batch)
            return over_kept(context.task.soft(teacher.model, cut.as_before(batch)), cut)

    return soft


def cut_of(pair: Pair, reader: RowReader) -> CutVocabulary | None:
    """The cut vocabulary that a reader's ids are of, if they are."""
    return pair.cut if pair.cut is not None and reader.digest == pair.cut.reader.digest else None


def over_kept(soft: Any, cut: CutVocabulary) -> Any:
    """A language model's soft targets over the ids that its student keeps; those of other tasks as they are."""
    if not isinstance(soft, Running):
        return soft
    ids_V = cut.of_logits(vocabulary_of(soft.head))
    return replace(soft, ids_V=ids_V.to(soft.hidden_NH.device))


def soft_of_rows(context: Context, teacher: Loaded, precision: Precision, split: str) -> Soft:
    """The same of a split's rows as the teacher reads them, found by row id: it may have another tokenizer."""
    rows, soft = context.data.tokens(split, teacher.reader), soft_of(context, teacher, precision)

    def of_rows(batch: Batch) -> Any:
        return soft(send_to_device(rows.load_batch(batch["row_ids_N"], batch["epoch"]), context.runtime.device))

    return of_rows


def validator(
    context: Context, rows: Tokens, precision: Precision, soft: Soft | None = None
) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a model to all built-in metrics on these rows, and whether its numbers are finite."""

    def validate(model: nn.Module) -> dict[str, Any]:
        """Scores of the bare model; only `finite` 0 where a number is not finite."""
        values_NK = values_of(
            context.runtime, model, rows, measure_with(context.task, soft),
            precision=precision, micro_batch_size=context.recipe.evaluate.micro_batch_size,
        )  # fmt: skip
        if not np.isfinite(values_NK).all():
            return {"finite": 0.0}
        metrics = {"finite": 1.0, **context.task.metrics(values_NK, rows)}
        return metrics if soft else {name: metrics[name] for name in ("finite", *context.recipe.kind.metrics)}

    return validate


LoadBatch = Callable[[NDArray[np.int64]], Batch]
Measure = Callable[[nn.Module, Batch], Tensor]
"""Bare model and collated batch → numbers per row, [B, K]."""


def predict(
    runtime: Runtime,
    model: nn.Module,
    row_ids_N: NDArray[np.int64],
    load_batch: LoadBatch,
    measure: Measure,
    *,
    micro_batch_size: int,
    precision: Precision,
    bar: Bar | None = None,
) -> NDArray[np.float32]:
    """Run the model over rows in the given order (longest first wastes least padding).

    The model's train/eval mode is put back. It is given bare: without gradients there is nothing for DDP to reduce.
    Only a sharded one comes in its `Step`, which gathers what it uses. All processes call it equally often, some of
    them once for nothing: it, or a teacher that it is compared with, may be in shards.

    Returns:
        Numbers [N, K], such as logits, row i belonging to row_ids_N[i]; equal on all processes. K is that of the widest
        batch, with zeros behind narrower ones.
    """
    accelerator = runtime.accelerator
    sharded = model if isinstance(model, FSDPModule) else None
    was_training = model.training
    model.eval()
    parts = list(chunks(np.arange(len(row_ids_N)), micro_batch_size))
    mine = parts[accelerator.process_index :: accelerator.num_processes]
    idle = math.ceil(len(parts) / accelerator.num_processes) - len(mine)
    outputs: list[Tensor] = []
    try:
        for turn, positions in enumerate([*mine, *parts[:1] * idle]):
            runtime.leave_if_asked(turn)
            batch = send_to_device(load_batch(row_ids_N[positions]), runtime.device)
            with torch.no_grad(), runtime.autocast(precision):
                values = measure(model, batch) if sharded is None else model(measure, batch)
            if len(outputs) < len(mine):
                outputs.append(values.float())
            if bar is not None:
                bar.advance(len(positions) * accelerator.num_processes)
    finally:
        model.train(was_training)
        if sharded is not None:
            sharded.reshard()  # without gradients, what is in no block stays gathered
    if accelerator.num_processes == 1:
        width = max(values.shape[-1] for values in outputs)
        return torch.cat([_widened(values, width) for values in outputs]).cpu().numpy()
    return _joined(runtime, outputs, mine, len(row_ids_N))


def _widened(values_BK: Tensor, width: int) -> Tensor:
    """Zeros behind each row, up to the width of the widest batch."""
    return torch.nn.functional.pad(values_BK, (0, width - values_BK.shape[-1]))


def _joined(runtime: Runtime, parts: list[Tensor], mine: list[NDArray[np.int64]], num_rows: int) -> NDArray[np.float32]:
    """Put every process's rows into one array: each writes its own rows, the rest are zeros, and all are added."""
    width = torch.tensor(max((part.shape[-1] for part in parts), default=0), device=runtime.device)
    num_values = int(runtime.accelerator.gather(width.reshape(1)).max())
    values_NK = torch.zeros(num_rows, num_values, device=runtime.device)
    for positions, part in zip(mine, parts, strict=True):
        values_NK[torch.from_numpy(positions)] = _widened(part, num_values)
    total: Tensor = runtime.accelerator.reduce(values_NK, "sum")
    return total.cpu().numpy()
