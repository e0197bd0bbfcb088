"""Run the frozen teacher once over all rows that the student learns from, and keep its soft targets.

Leaves a store as `soft_targets` describes it. Every process writes shards of its own; interrupted, the same command
goes on after the last finished ones, and ends in the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor

from distilpeft.data.batches import chunks, length_order
from distilpeft.distillation.codec import Kept, Layout
from distilpeft.distillation.fused import Running, even_chunks, rows_per_chunk
from distilpeft.distillation.losses import MASKED
from distilpeft.distillation.sparse import describe, keep
from distilpeft.distillation.store import TEACHER_VOCABULARY, Contents, Writer, row_hashes, shard_edges
from distilpeft.errors import GateError
from distilpeft.machine.artifact import Artifact, Figures
from distilpeft.machine.runtime import Bar, Runtime
from distilpeft.models.context import Context
from distilpeft.models.pair import Loaded
from distilpeft.models.soft_targets import binding
from distilpeft.models.teacher import load_teacher
from distilpeft.recipe import Recipe
from distilpeft.recipe.distil import format_fault
from distilpeft.tasks.rows import TAUGHT, Tokens
from distilpeft.training.scoring import over_kept

FULL_BYTES = 1 << 30
"""What `format: auto` may spend on all logits of tokens."""


def run(context: Context, teacher: Artifact, out: Artifact) -> Figures:
    """Keep the soft targets of every training row in `out.partial`.

    Raises:
        GateError: a position has no finite logit, or one that is not a number; its row is named.
        StoppedBySignal: a signal came; finished shards are kept.
    """
    runtime, recipe, task = context.runtime, context.recipe, context.task
    loaded = load_teacher(runtime, context.pair, teacher.path, recipe.targets.precision, placed=True)
    rows = context.data.tokens(TAUGHT, loaded.reader)
    positions_R = task.num_positions(rows)
    teacher_ids = vocabulary = task.vocabulary(loaded.model, recipe.data.max_tokens)
    cut = context.pair.cut if recipe.kind.is_language_model else None
    if cut is not None:
        vocabulary = len(cut.of_logits(min(teacher_ids, context.pair.student_rows or teacher_ids)))
    elif recipe.kind.is_language_model:
        vocabulary = min(teacher_ids, context.pair.student_vocabulary or teacher_ids)
    layout, why = choose(recipe, vocabulary, int(positions_R.sum()))
    runtime.say(f"  targets: {why}")
    edges = shard_edges(rows.lengths_N, positions_R * layout.bytes_per_position(layout.count))
    contents = Contents(layout, binding(context.pair, teacher), row_hashes(rows.dataset), positions_R, edges)
    with runtime.accelerator.main_process_first():
        writer = Writer(out.partial, contents, is_main=runtime.is_main)
    maker = _Maker(context, loaded, rows, layout)
    with runtime.bar("targets", len(positions_R), 0) as bar, runtime.stoppable():
        _fill(runtime, writer, maker, bar)
    figures: Figures = {"num_rows": len(positions_R), "truncated_rows": rows.num_truncated, "why": why}
    if runtime.is_main:
        notes: dict[str, Any] = {"tokenizer": {"model": recipe.teacher.model, "revision": recipe.teacher.revision}}
        if vocabulary < teacher_ids and cut is None:  # over kept ids the teacher has no others
            notes[TEACHER_VOCABULARY] = teacher_ids
        figures["measured"] = writer.finish(notes)
        figures["layout"] = contents.identity["layout"]
    return figures


def choose(recipe: Recipe, vocabulary: int, num_positions: int) -> tuple[Layout, str]:
    """The layout that a recipe asks for, or the best that is small enough, and why."""
    targets, form = recipe.targets, recipe.targets.format
    if not recipe.kind.is_language_model:
        what = (
            "the number"
            if recipe.kind.is_numeric
            else f"all {vocabulary} {'logits' if recipe.kind.has_labels else 'units'}"
        )
        return Layout("full", vocabulary), f"{what} of every {recipe.kind.unit.removesuffix('s')}"
    full = Layout("full", vocabulary, targets.value_bits or 32)
    size = f"all logits take {num_positions * full.bytes_per_position(0) / 1e9:.2f} GB"
    why = "as the recipe says"
    if form == "auto":
        if num_positions * full.bytes_per_position(0) <= FULL_BYTES:
            form, why = "full", f"{size}, small enough"
        elif format_fault("top_k", recipe.distil) is not None:
            form, why = "full", f"{size}, but {recipe.distil.divergence.kind} needs them"
        elif format_fault("sampled", recipe.distil) is None:
            form, why = "sampled", f"{size}; random ids are small, and unbiased for forward_kl"
        else:
            form, why = "top_k", f"{size}; {recipe.distil.divergence.kind} cannot be estimated from random ids"
    if form == "full":
        return full, f"full: {why}"
    at = targets.temperatures or (recipe.distil.temperature,)
    count = targets.draws if form == "sampled" else min(targets.k, vocabulary)
    kind: Any = form
    what = f"{count} draws" if form == "sampled" else f"k = {count}"
    return Layout(kind, vocabulary, targets.value_bits or 12, at, count, form == "sampled"), f"{form}, {what}: {why}"


def uniforms(seed: int, row_id: int, num_positions: int, draws: int) -> NDArray[np.float64]:
    """The random numbers of a row, [positions, draws]: a function of seed and row, so that any process may draw."""
    return np.random.default_rng([seed, row_id]).random((num_positions, draws))


def _fill(runtime: Runtime, writer: Writer, maker: _Maker, bar: Bar) -> None:
    """Write every missing shard; processes take turns, make as many batches in each, and stop together."""
    accelerator = runtime.accelerator
    processes = accelerator.num_processes
    for first in range(0, writer.num_shards, processes):
        shard = first + accelerator.process_index
        missing = shard < writer.num_shards and not runtime.stop_requested and not writer.is_done(shard)
        mine = maker.batches(writer, shard) if missing else []
        most = int(accelerator.gather(torch.tensor([len(mine)], device=runtime.device)).max())
        bad_row = maker.make(writer, shard, mine, bar) if missing else None
        maker.idle(most - len(mine))
        if shard < writer.num_shards and not missing:
            start, stop = writer.rows(shard)
            bar.advance((stop - start) * processes)
        flags = torch.tensor([[int(runtime.stop_requested), -1 if bad_row is None else bad_row]], device=runtime.device)
        stopped, bad = accelerator.gather(flags).amax(0).tolist()
        if bad >= 0:
            raise GateError(f"targets: the teacher's logits are not finite for row {bad}; see teacher.gate")
        if stopped:
            runtime.stop(f"targets after {first} of {writer.num_shards} shards")


def _widened(logits_NV: Tensor, width: int) -> Tensor:
    """Masked ids behind each row, for tasks whose distributions are over a row's tokens; others are not narrower."""
    if logits_NV.shape[-1] >= width:
        return logits_NV
    return torch.nn.functional.pad(logits_NV, (0, width - logits_NV.shape[-1]), value=MASKED)


class _Maker:
    """Makes one shard at a time."""

    def __init__(self, context: Context, loaded: Loaded, rows: Tokens, layout: Layout) -> None:
        runtime, recipe = context.runtime, context.recipe
        self._runtime, self._targets, self._seed = runtime, recipe.targets, recipe.seed
        self._in_shards = recipe.teacher.place == "sharded" and runtime.accelerator.num_processes > 1
        self._task, self._model, self._rows, self._layout = context.task, loaded.model, rows, layout
        self._cut = context.pair.cut
        self._positions_R = context.task.num_positions(rows)

    def batches(self, writer: Writer, shard: int) -> list[NDArray[np.int64]]:
        """The rows of a shard, batch by batch."""
        order = length_order(self._rows.lengths_N, *writer.rows(shard))
        return list(chunks(order, self._targets.micro_batch_size))

    def idle(self, count: int) -> None:
        """Run the teacher for nothing where other processes have more batches, if they need it: it may be in shards."""
        for _ in range(count if self._in_shards else 0):
            self._soft(np.arange(1))

    def _soft(self, ids: NDArray[np.int64]) -> Running | Tensor:
        batch = send_to_device(self._rows.load_batch(ids), self._runtime.device)
        with torch.no_grad(), self._runtime.autocast(self._targets.precision):
            soft: Running | Tensor = self._task.soft(self._model, batch)
        return soft if self._cut is None else over_kept(soft, self._cut)

    def make(self, writer: Writer, shard: int, batches: list[NDArray[np.int64]], bar: Bar) -> int | None:
        """Compute and write a shard, unless a signal comes first.

        Returns:
            A row whose logits are not finite, or None.
        """
        start, stop = writer.rows(shard)
        kept_by_row: dict[int, Kept] = {}
        sums: dict[str, float] = {}
        for done, ids in enumerate(batches):
            if self._runtime.stop_requested:
                self.idle(len(batches) - done)
                return None
            soft = self._soft(ids)
            with torch.no_grad(), self._runtime.autocast(self._targets.precision):
                kept, bad = self._positions(ids, soft, sums)
            if bad is not None:
                self.idle(len(batches) - done - 1)
                return bad
            edges = np.cumsum([0, *self._positions_R[ids]])
            for index, row in enumerate(ids.tolist()):
                kept_by_row[row] = kept.rows(edges[index], edges[index + 1])
            bar.advance(len(ids) * self._runtime.accelerator.num_processes)
        writer.write(shard, [kept_by_row[row] for row in range(start, stop)], sums)
        return None

    def _positions(
        self, row_ids_N: NDArray[np.int64], soft: Running | Tensor, sums: dict[str, float]
    ) -> tuple[Kept, int | None]:
        """What is kept of a batch's positions; adds to the sums of the shard."""
        layout, counts = self._layout, self._positions_R[row_ids_N]
        rows_N = np.repeat(row_ids_N, counts)
        numbers_ND: NDArray[np.float64] | None = None
        if layout.kind == "sampled":
            drawn = [
                uniforms(self._seed, int(row), int(n), layout.count) for row, n in zip(row_ids_N, counts, strict=True)
            ]
            numbers_ND = np.concatenate(drawn)
        parts = []
        for part in even_chunks(len(soft), rows_per_chunk(layout.vocabulary, self._runtime.device)) or [slice(0, 0)]:
            logits_NV = _widened(soft[part].float(), layout.vocabulary)
            finite_N = torch.isfinite(logits_NV.amax(-1)).cpu().numpy()
            if not finite_N.all():
                return Kept.empty(layout), int(rows_N[part][~finite_N][0])
            parts.append(keep(logits_NV, layout, None if numbers_ND is None else numbers_ND[part]))
            for name, value in describe(logits_NV, parts[-1], layout).items():
                larger = max(sums.get(name, 0.0), value)
                sums[name] = larger if name == "max_error" else sums.get(name, 0.0) + value
        return Kept.join(parts), None
