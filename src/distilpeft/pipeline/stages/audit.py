"""What sparse soft targets cost: the same loss from kept ids and from the whole distribution, on held-out rows.

The trained student and the running teacher read the first validation rows. For the form in use, for half and twice its
ids, and for the other sparse form: bias and spread of the divergence per token over repeated draws, and cosines between
its gradient for the student's logits and the whole distribution's, token by token and summed over all tokens, as the
weights feel it.

    N  positions    V  vocabulary    D  draws
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from distilpeft.data.batches import chunks
from distilpeft.distillation.codec import Layout
from distilpeft.distillation.fused import even_chunks, rows_per_chunk, soft_value_and_grad
from distilpeft.distillation.losses import Loss
from distilpeft.distillation.sparse import Sparse, keep, keep_drawn_often
from distilpeft.machine.artifact import Figures
from distilpeft.models.context import Context
from distilpeft.models.pair import Loaded
from distilpeft.recipe import Recipe
from distilpeft.recipe.distil import format_fault
from distilpeft.training.scoring import soft_of

MAX_POSITIONS = 1024
DRAWS = 8
"""Repetitions of random targets; what does not vary is computed once."""


def run(context: Context, *, layout: Layout, student: Loaded, teacher: Loaded) -> Figures:
    """Compare forms of soft targets with the whole distribution, at the recipe's divergence and temperature.

    Returns:
        `positions`; `loss_per_token` of the whole distribution in nats; `forms`, a row of figures each: `in_use`, the
        layout, `bytes_per_token`, `bias` (nats per token) with its `standard_error`, `spread` (standard deviation per
        token), `cosine_per_token` and `cosine_of_sum`.
    """
    runtime, recipe, task = context.runtime, context.recipe, context.task
    rows = context.data.tokens("validation", student.reader)
    taught = soft_of(context, teacher, recipe.evaluate.precision, student.reader)
    edges = np.cumsum(task.num_positions(rows))
    num_rows = min(len(edges), int(np.searchsorted(edges, MAX_POSITIONS)) + 1)
    loss = Loss(1.0, recipe.distil.temperature, recipe.distil.divergence)
    forms = [_Form(form, loss, recipe.seed) for form in neighbours(layout, recipe)]
    total, whole_V, square = 0.0, torch.zeros(layout.vocabulary, dtype=torch.float64), 0.0
    with runtime.bar("audit", num_rows) as bar:
        for ids in chunks(np.arange(num_rows), recipe.evaluate.micro_batch_size):
            batch = send_to_device(rows.load_batch(ids), runtime.device)
            with torch.no_grad(), runtime.autocast(recipe.evaluate.precision):
                ours, theirs = task.soft(student.model, batch), taught(batch)
                for part in even_chunks(len(ours), rows_per_chunk(layout.vocabulary, runtime.device)):
                    student_NV, teacher_NV = ours[part].float(), theirs[part].float()
                    labels_N = batch["labels_N"][part]
                    value, grad_NV = soft_value_and_grad(student_NV, labels_N, teacher_NV, loss)
                    total, square = total + float(value), square + float(grad_NV.double().square().sum())
                    width = min(len(whole_V), grad_NV.shape[-1])
                    whole_V[:width] += grad_NV[:, :width].double().sum(0).cpu()
                    for form in forms:
                        form.add(student_NV, labels_N, teacher_NV, grad_NV)
            bar.advance(len(ids))
    count = int(edges[num_rows - 1])
    return {
        "positions": count,
        "loss_per_token": total / max(count, 1),
        "forms": [{"in_use": form.layout == layout, **form.figures(count, total, whole_V, square)} for form in forms],
    }


def neighbours(layout: Layout, recipe: Recipe) -> list[Layout]:
    """The form in use, the same with half and with twice its ids, and the other sparse form."""
    targets, vocabulary = recipe.targets, layout.vocabulary
    at, bits = (recipe.distil.temperature,), targets.value_bits or 12
    layouts = [layout]
    if layout.kind != "full":
        most = vocabulary if layout.kind == "top_k" else 2**16 - 1
        layouts += [replace(layout, count=max(1, min(count, most))) for count in (layout.count // 2, layout.count * 2)]
    if layout.kind != "top_k":
        layouts.append(Layout("top_k", vocabulary, min(bits, 16), at, min(targets.k, vocabulary)))
    if layout.kind != "sampled":
        layouts.append(Layout("sampled", vocabulary, min(bits, 16), at, targets.draws, ragged=True))
    return [form for form in dict.fromkeys(layouts) if format_fault(form.kind, recipe.distil) is None]


class _Form:
    """Sums over positions for one layout."""

    def __init__(self, layout: Layout, loss: Loss, seed: int) -> None:
        self.layout, self._loss = layout, loss
        self._draws = DRAWS if layout.kind == "sampled" else 1
        self._rng = np.random.default_rng([seed, layout.count])
        self._values_D = np.zeros(self._draws)
        self._dots_D, self._squares_D = np.zeros(self._draws), np.zeros(self._draws)
        self._sums_DV = torch.zeros(self._draws, layout.vocabulary, dtype=torch.float64)
        self._num_bytes = 0

    def add(self, student_NV: Tensor, labels_N: Tensor, teacher_NV: Tensor, whole_NV: Tensor) -> None:
        """Compare one chunk; `whole_NV` is the gradient of the whole distribution."""
        if self.layout.kind == "sampled":
            numbers_DNK = self._rng.random((self._draws, len(labels_N), self.layout.count))
            rounds = keep_drawn_often(teacher_NV, self.layout, numbers_DNK)
        else:
            rounds = [keep(teacher_NV, self.layout)]
        for draw, original in enumerate(rounds):
            block = self.layout.encode(original)
            kept = self.layout.decode(np.frombuffer(bytearray(block), np.uint8), len(labels_N))
            soft: Tensor | Sparse = torch.from_numpy(kept.values)
            if self.layout.kind != "full":
                soft = Sparse.of(kept, self.layout, self._loss.temperature)
            value, grad_NV = soft_value_and_grad(student_NV, labels_N, soft.to(student_NV.device), self._loss)
            self._values_D[draw] += float(value)
            self._dots_D[draw] += float((grad_NV * whole_NV).sum(dtype=torch.float64))
            self._squares_D[draw] += float(grad_NV.square().sum(dtype=torch.float64))
            width = min(self._sums_DV.shape[-1], grad_NV.shape[-1])
            self._sums_DV[draw, :width] += grad_NV[:, :width].sum(0, dtype=torch.float64).cpu()
            self._num_bytes += len(block)

    def figures(self, count: int, total: float, whole_V: Tensor, square: float) -> dict[str, Any]:
        """What the sums show, over this many positions."""
        size = max(count, 1)
        spread = float(np.std(self._values_D, ddof=1)) if self._draws > 1 else 0.0
        sums_D = torch.nn.functional.cosine_similarity(self._sums_DV, whole_V.unsqueeze(0), dim=-1)
        per_token_D = self._dots_D / np.sqrt(np.maximum(self._squares_D * square, 1e-300))
        layout = asdict(self.layout)
        return {
            **{name: layout[name] for name in ("kind", "count", "value_bits")},
            "bytes_per_token": self._num_bytes / self._draws / size,
            "bias": (float(self._values_D.mean()) - total) / size,
            "standard_error": spread / np.sqrt(self._draws) / size,
            "spread": spread / np.sqrt(size),
            "cosine_per_token": float(per_token_D.mean()),
            "cosine_of_sum": float(sums_D.mean()),
        }
