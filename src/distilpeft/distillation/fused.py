"""From hidden states and head weights to the loss, without a [rows, vocabulary] tensor.

Rows go through the head in chunks. Each chunk's logits are made, turned into loss and gradient in closed form
(`losses.value_and_grad`), multiplied back onto the hidden states and the head's weights, and dropped: one pass over
the logits, nothing recomputed in backward, memory for one chunk. A head without trainable weights costs no weight
gradient.

    N  rows that count (target positions)    H  hidden units    V  vocabulary

Call it inside the forward of the module that is wrapped for several processes: then DDP and FSDP see the head's
weights in use, and reduce their gradients like all others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distilpeft.distillation.losses import Loss, ValueAndGrad, counted_rows, value_and_grad
from distilpeft.distillation.sparse import Sparse, sparse_value_and_grad

CHUNK_BYTES = {"cpu": 600 << 20, "cuda": 1 << 30}
"""Bytes that a chunk's logits, the student's and the teacher's, may take; fewer read the head's weights more often."""
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
"""Bytes of one float32 buffer of the closed-form arithmetic, which goes over a chunk in blocks: on a CPU they stay in
its cache, and everywhere the temporaries are small beside the logits."""
MIN_CHUNK, MAX_CHUNK = 16, 4096
PIECE = 16384  # vocabulary ids whose weight gradient is made at once where it is summed in another precision


@dataclass(frozen=True)
class Head:
    """What turns the last hidden state into logits: `softcap * tanh(scale * (module(h) + bias) / softcap)`.

    Attributes:
        module: a linear layer of any kind: plain, quantized, with LoRA, offloaded.
        scale: Cohere's `logit_scale`, 1 / Granite's `logits_scaling`, ...
        softcap: Gemma's `final_logit_softcapping`; None leaves it out.
        bias: Marian's `final_logits_bias` [V], which is not trained; None leaves it out.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None

    @property
    def layer(self) -> nn.Module:
        """The layer in use: PEFT wraps a head that it trains in full."""
        saved = getattr(self.module, "modules_to_save", None)
        if not isinstance(saved, nn.ModuleDict):
            return self.module
        active: Any = self.module.active_adapter
        return saved[active if isinstance(active, str) else active[0]]

    def trainable(self) -> list[nn.Parameter]:
        """The weights that get a gradient."""
        return [parameter for parameter in self.layer.parameters() if parameter.requires_grad]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of these rows, all at once."""
        return self.shape(self.layer(hidden_NH))

    def shape(self, raw_NV: Tensor) -> Tensor:
        """Shift, scale and cap the linear layer's output."""
        if self.bias is not None:
            raw_NV = raw_NV + self.bias.to(raw_NV.dtype)
        if self.scale != 1:
            raw_NV = raw_NV * self.scale
        return raw_NV if self.softcap is None else self.softcap * torch.tanh(raw_NV / self.softcap)

    def chain(self, grad_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """Gradient for the logits → gradient for the linear layer's output; overwrites the gradient."""
        if self.softcap is not None:
            grad_NV.mul_(1 - (logits_NV.to(grad_NV.dtype) / self.softcap).square_())
        return grad_NV.mul_(self.scale) if self.scale != 1 else grad_NV


@dataclass(frozen=True)
class Running:
    """The soft targets of a running teacher: its logits are made for the rows that are asked for, and not kept.

    Attributes:
        hidden_NH: its last hidden states at the same positions as the student's.
        head: its head.
        ids_V: ids whose logits count, in the student's order; None: all.
    """

    hidden_NH: Tensor
    head: Head
    ids_V: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden_NH)

    def __getitem__(self, rows: slice) -> Tensor:
        logits_NV = self.head.logits(self.hidden_NH[rows])
        return logits_NV if self.ids_V is None else logits_NV[:, self.ids_V]


Soft = Running | Sparse | Tensor
"""Soft targets of N rows, which a slice of rows cuts to logits [n, V] or to kept ids."""


def soft_value_and_grad(student_NV: Tensor, labels_N: Tensor, soft: Sparse | Tensor | None, loss: Loss) -> ValueAndGrad:
    """Loss summed over rows and its gradient for the student's logits, from targets of either kind."""
    if isinstance(soft, Sparse):
        return sparse_value_and_grad(student_NV, labels_N, soft, loss)
    return value_and_grad(student_NV, labels_N, soft, loss)


def linear_distil_sum(
    hidden_NH: Tensor,
    head: Head,
    labels_N: Tensor,
    teacher: Soft | None,
    loss: Loss,
    *,
    chunk_rows: int | None = None,
) -> Tensor:
    """The loss of `losses.distil_sum`, summed over the rows that count, from hidden states.

    Args:
        hidden_NH: the student's last hidden states.
        head: the student's head.
        labels_N: the ids that follow; a row with the label -100 does not count.
        teacher: its soft targets of the same rows; None only where alpha is 0.
        loss: weights, temperature and divergence.
        chunk_rows: rows per chunk; by default as many as `CHUNK_BYTES` allow.

    Returns:
        A scalar, differentiable once for `hidden_NH` and the head's trainable weights; 0 for no rows.

    Raises:
        ValueError: shapes that do not fit, or no teacher where alpha is above 0.
    """
    counted_N = counted_rows(hidden_NH, labels_N, teacher, loss)
    if counted_N is not None:
        hidden_NH, labels_N = hidden_NH[counted_N], labels_N[counted_N]
        teacher = None if teacher is None else _rows_of(teacher, counted_N)
    return linear_counted_sum(hidden_NH, head, labels_N, teacher, loss, chunk_rows=chunk_rows)


def _rows_of(teacher: Soft, rows: Tensor) -> Soft:
    """The soft targets of these rows only: their positions, or a mask."""
    if isinstance(teacher, Running):
        return replace(teacher, hidden_NH=teacher.hidden_NH[rows])
    # Kept ids stay in main memory, chunk by chunk.
    return teacher[rows.to((teacher.ids_NK if isinstance(teacher, Sparse) else teacher).device)]


def linear_counted_sum(
    hidden_NH: Tensor, head: Head, labels_N: Tensor, teacher: Soft | None, loss: Loss, rows: Tensor | None = None, *,
    chunk_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """`linear_distil_sum` of rows that all count; nothing is checked, so no device is waited for.

    Of `rows`, if they are given, only those at these positions are summed.
    """
    if rows is not None:
        hidden_NH, labels_N = hidden_NH[rows], labels_N[rows]
        teacher = None if teacher is None else _rows_of(teacher, rows)
    weights = head.trainable()
    result: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
        hidden_NH, labels_N, head, teacher, loss, chunk_rows, *weights
    )
    return result


def rows_per_chunk(vocabulary: int, device: torch.device, itemsize: int = 4) -> int:
    """How many rows' logits, of student and teacher, fit into `CHUNK_BYTES`."""
    budget = CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    return max(MIN_CHUNK, min(MAX_CHUNK, budget // (2 * itemsize * vocabulary)))


def even_chunks(num_rows: int, size: int) -> list[slice]:
    """As few chunks of at most `size` rows as there can be, all of nearly the same length."""
    count = -(-num_rows // size)
    edges = [num_rows * i // count for i in range(count + 1)] if count else []
    return [slice(start, end) for start, end in pairwise(edges)]


def vocabulary_of(head: Head) -> int:
    """Number of logits that the head gives."""
    layer = head.layer
    layer = getattr(layer, "base_layer", layer)
    return int(layer.out_features)  # type: ignore[arg-type]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, labels_N: Tensor, head: Head, teacher: Soft | None, loss: Loss,
        chunk_rows: int | None, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        chunks = _PlainChunks if type(head.layer) is nn.Linear else _ModuleChunks
        worker = chunks(hidden_NH, head, hidden_needs_grad=ctx.needs_input_grad[0])
        itemsize = _compute_dtype(hidden_NH).itemsize
        size = chunk_rows or rows_per_chunk(vocabulary_of(head), hidden_NH.device, itemsize)
        total = torch.zeros((), device=hidden_NH.device, dtype=_accumulator(hidden_NH.dtype))
        for rows in even_chunks(len(hidden_NH), size):
            soft: Sparse | Tensor | None = None
            if loss.alpha > 0:
                assert teacher is not None, "alpha > 0 needs a teacher"
                assert len(teacher) == len(hidden_NH), f"{len(teacher)} soft targets for {len(hidden_NH)} rows"
                soft = teacher[rows].to(hidden_NH.device)
            total += worker.chunk(rows, labels_N[rows], soft, loss)
        ctx.gradients = worker.gradients()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients are scaled where they lie and given away: the head's may be the largest tensor of the step, and
        # a second reference would make autograd copy it. Hence not save_for_backward.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the loss was differentiated a second time; its gradients were given away"
        hidden, *weights = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in gradients]
        return hidden, None, None, None, None, None, *weights


class _PlainChunks:
    """Chunks through a plain linear layer: its gradient is accumulated in place, in one buffer."""

    def __init__(self, hidden_NH: Tensor, head: Head, *, hidden_needs_grad: bool) -> None:
        layer = head.layer
        assert isinstance(layer, nn.Linear)
        dtype = _compute_dtype(hidden_NH)
        self._head, self._layer, self._hidden = head, layer, hidden_NH.to(dtype)
        self._weight = layer.weight.to(dtype)
        bias: Tensor | None = layer.bias
        self._bias = None if bias is None else bias.to(dtype)
        self._hidden_grad = torch.empty_like(hidden_NH) if hidden_needs_grad else None
        self._grads = {
            name: torch.zeros_like(parameter, dtype=_accumulator(dtype))
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        }

    def chunk(self, rows: slice, labels_N: Tensor, soft: Sparse | Tensor | None, loss: Loss) -> Tensor:
        """Loss of these rows; keeps their gradients."""
        hidden_NH = self._hidden[rows]
        logits_NV = self._head.shape(F.linear(hidden_NH, self._weight, self._bias))
        value = _replace_by_gradient(self._head, logits_NV, labels_N, soft, loss)
        if "bias" in self._grads:
            self._grads["bias"] += logits_NV.sum(0, dtype=self._grads["bias"].dtype)
        if self._hidden_grad is not None:
            self._hidden_grad[rows] = logits_NV @ self._weight
        if "weight" in self._grads:
            _add_product(self._grads["weight"], logits_NV, hidden_NH)
        return value

    def gradients(self) -> list[Tensor | None]:
        """For the hidden states, then for the trainable weights in the order of `Head.trainable`."""
        dtypes = dict(self._layer.named_parameters())
        return [self._hidden_grad, *(gradient.to(dtypes[name].dtype) for name, gradient in self._grads.items())]


class _ModuleChunks:
    """Chunks through any other head (LoRA, quantized, offloaded): autograd differentiates the module itself."""

    def __init__(self, hidden_NH: Tensor, head: Head, *, hidden_needs_grad: bool) -> None:
        self._head, self._hidden, self._weights = head, hidden_NH, head.trainable()
        self._hidden_grad = torch.empty_like(hidden_NH) if hidden_needs_grad else None
        self._grads = [torch.zeros_like(weight, dtype=_accumulator(weight.dtype)) for weight in self._weights]

    def chunk(self, rows: slice, labels_N: Tensor, soft: Sparse | Tensor | None, loss: Loss) -> Tensor:
        """Loss of these rows; keeps their gradients."""
        hidden_NH = self._hidden[rows].detach().requires_grad_(self._hidden_grad is not None)
        inputs = ([hidden_NH] if self._hidden_grad is not None else []) + self._weights
        with torch.set_grad_enabled(bool(inputs)):
            raw_NV = self._head.layer(hidden_NH)
        logits_NV = self._head.shape(raw_NV.detach().clone())
        value = _replace_by_gradient(self._head, logits_NV, labels_N, soft, loss)
        gradients = list(torch.autograd.grad(raw_NV, inputs, logits_NV)) if inputs else []
        if self._hidden_grad is not None:
            self._hidden_grad[rows] = gradients.pop(0)
        for gradient, new in zip(self._grads, gradients, strict=True):
            gradient.add_(new)
        return value

    def gradients(self) -> list[Tensor | None]:
        """As `_PlainChunks.gradients`."""
        return [self._hidden_grad, *(g.to(w.dtype) for g, w in zip(self._grads, self._weights, strict=True))]


def _replace_by_gradient(
    head: Head, logits_NV: Tensor, labels_N: Tensor, soft: Sparse | Tensor | None, loss: Loss
) -> Tensor:
    """Overwrite the student's logits by the loss's gradient for the linear layer's output; returns the loss."""
    device = "cpu" if logits_NV.device.type == "cpu" else "cuda"
    size = max(1, BLOCK_BYTES[device] // (4 * logits_NV.shape[-1]))
    total = torch.zeros((), device=logits_NV.device, dtype=_accumulator(logits_NV.dtype))
    for start in range(0, len(logits_NV), size):
        rows = slice(start, start + size)
        block = None if soft is None else soft[rows]
        value, grad_NV = soft_value_and_grad(logits_NV[rows], labels_N[rows], block, loss)
        logits_NV[rows] = head.chain(grad_NV, logits_NV[rows])
        total += value
    return total


def linear_scores(hidden_NH: Tensor, head: Head, labels_N: Tensor, teacher: Running | None) -> dict[str, Tensor]:
    """Per-row figures of a frozen model, chunk by chunk, in float32 or wider.

    Returns:
        `nats`: negative log-likelihood of the label; `right`: whether it has the top logit;
        `confidence`: the probability of the top id; with a teacher also `kl`,
        KL(teacher || student) at temperature 1 over the ids that both have, and `agree`, whether both have the same
        top id among these. All [N].
    """
    size = rows_per_chunk(vocabulary_of(head), hidden_NH.device)
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for rows in even_chunks(len(hidden_NH), size) or [slice(0, 0)]:
            soft_NV = None if teacher is None else teacher[rows]
            parts.append(_scores(head.logits(hidden_NH[rows]), labels_N[rows], soft_NV))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _scores(logits_NV: Tensor, labels_N: Tensor, soft_NV: Tensor | None) -> dict[str, Tensor]:
    wide_NV = logits_NV.to(_accumulator(logits_NV.dtype))
    log_q_NV = torch.log_softmax(wide_NV, dim=-1)
    scores = {
        "nats": -log_q_NV.gather(-1, labels_N.unsqueeze(-1)).squeeze(-1),
        "right": (wide_NV.argmax(-1) == labels_N).to(wide_NV.dtype),
        "confidence": log_q_NV.amax(-1).exp(),
    }
    if soft_NV is not None:
        shared = min(logits_NV.shape[-1], soft_NV.shape[-1])
        wide_p_NV = soft_NV[:, :shared].to(wide_NV.dtype)
        if shared < logits_NV.shape[-1]:
            log_q_NV = torch.log_softmax(wide_NV[:, :shared], dim=-1)
        log_p_NV = torch.log_softmax(wide_p_NV, dim=-1)
        p_NV = log_p_NV.exp()
        scores["kl"] = (p_NV * (log_p_NV - log_q_NV)).nan_to_num_(0.0).sum(-1)
        scores["agree"] = (wide_p_NV.argmax(-1) == wide_NV[:, :shared].argmax(-1)).to(wide_NV.dtype)
    return scores


def _compute_dtype(hidden_NH: Tensor) -> torch.dtype:
    """What matrix products are made in: autocast's dtype where it is on, else the hidden states' own."""
    kind = hidden_NH.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NH.dtype


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums over many chunks would lose digits below float32."""
    return dtype if dtype == torch.float64 else torch.float32


def _add_product(total_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor) -> None:
    """Total += grad^T @ hidden, without a second tensor of the total's size."""
    if total_VH.dtype == grad_NV.dtype:
        total_VH.addmm_(grad_NV.t(), hidden_NH)
        return
    for start in range(0, len(total_VH), PIECE):
        total_VH[start : start + PIECE] += grad_NV[:, start : start + PIECE].t() @ hidden_NH
