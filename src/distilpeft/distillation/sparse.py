"""Soft targets that keep a few ids of each position: chosen from logits, and turned into loss and gradient.

    N  rows that count    K  kept ids    V  vocabulary    T  listed temperatures    D  draws

`top_k` has K + 1 classes: the kept ids with their exact probabilities, and the tail as one explicit class. Teacher and
student are both seen through these classes, so every divergence of `losses` is computed by the very same functions, is
0 where they agree, and is never above the one over the whole vocabulary. With K = V it is the one over the vocabulary.

`sampled` weighs the ids drawn from the teacher so that sums over them are right on average: the loss
`sum_i w_i (log p_i - log q_i)` and its gradient `q * sum_i w_i - w` have forward KL's value and gradient as their
expectation (random sampling KD, arXiv:2503.16870). With several temperatures the draws come from the mean of the
teacher's distributions, so no weight exceeds the number of temperatures times the plain share of draws.

Value and gradient are closed forms over one log-sum-exp of the student's logits, like the dense ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distilpeft.distillation.codec import RANGE, Kept, Layout, quantized
from distilpeft.distillation.losses import (
    DIVERGENCES,
    MASKED,
    Loss,
    ValueAndGrad,
    cross_entropy,
    log_softmax,
    scaled,
    weighted,
)

TAIL_ROUNDING = 1e-6
"""A tail of the teacher below this is float32's rounding of 1 - sum(kept): none."""
DRAW_BLOCK_BYTES = 64 << 20
"""Bytes of the float64 cumulative probabilities that are made at once."""


@dataclass(frozen=True)
class Sparse:
    """Soft targets of N rows at one temperature.

    Attributes:
        ids_NK: kept ids; rows with fewer repeat one of theirs.
        log_p_NK: their log-probabilities at the temperature; -inf where there is none.
        weight_NK: `sampled`: importance weights; None for `top_k`.
        width: ids that they are over.
        temperature: of `log_p_NK`.
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    weight_NK: Tensor | None
    width: int
    temperature: float

    def __len__(self) -> int:
        return len(self.ids_NK)

    def __getitem__(self, rows: slice | Tensor) -> Sparse:
        weight_NK = None if self.weight_NK is None else self.weight_NK[rows]
        return Sparse(self.ids_NK[rows], self.log_p_NK[rows], weight_NK, self.width, self.temperature)

    def to(self, device: torch.device) -> Sparse:
        """The same on a device."""
        weight_NK = None if self.weight_NK is None else self.weight_NK.to(device)
        return Sparse(self.ids_NK.to(device), self.log_p_NK.to(device), weight_NK, self.width, self.temperature)

    @staticmethod
    def of(kept: Kept, layout: Layout, temperature: float) -> Sparse:
        """What was kept, at one of the layout's temperatures."""
        at = layout.temperatures.index(temperature)
        width = int(kept.sizes_N.max(initial=1))
        present_NK = np.arange(width) < kept.sizes_N[:, None]
        starts_N = np.cumsum(kept.sizes_N) - kept.sizes_N
        ids_NK = np.repeat(kept.ids_M[starts_N], width).reshape(-1, width) if len(kept) else np.empty((0, width))
        ids_NK[present_NK] = kept.ids_M
        log_p_M = _at(kept, layout, at)
        log_p_NK = np.full(ids_NK.shape, -np.inf, dtype=np.float32)
        log_p_NK[present_NK] = np.maximum(log_p_M, MASKED)
        weight_NK = None
        if layout.kind == "sampled":
            weight_M = kept.counts_M / layout.count
            if len(layout.temperatures) > 1:
                proposal_M = np.mean([np.exp(_at(kept, layout, i)) for i in range(len(layout.temperatures))], axis=0)
                weight_M = weight_M * np.exp(log_p_M) / proposal_M
            weight_NK = np.zeros(ids_NK.shape, dtype=np.float32)
            weight_NK[present_NK] = weight_M
        return Sparse(
            torch.from_numpy(ids_NK.astype(np.int64, copy=False)),
            torch.from_numpy(log_p_NK),
            None if weight_NK is None else torch.from_numpy(weight_NK),
            layout.vocabulary,
            temperature,
        )


def _at(kept: Kept, layout: Layout, at: int) -> NDArray[np.float32]:
    """Log-probabilities [M] of the kept ids at the temperature with this index."""
    return kept.values / np.float32(layout.temperatures[at]) - np.repeat(kept.lse_NT[:, at], kept.sizes_N)


def sparse_value_and_grad(student_NV: Tensor, labels_N: Tensor, soft: Sparse, loss: Loss) -> ValueAndGrad:
    """As `losses.value_and_grad`, from kept ids.

    The student is renormalised over the ids of the targets, as for dense targets. Targets of ids that the student lacks
    cannot be renormalised afterwards: what probability the others have is not known from the kept ones. `keep` does it.

    Raises:
        ValueError: a divergence that such targets do not give.
    """
    kind = loss.divergence.kind
    if kind == "logit_mse" or (soft.weight_NK is not None and kind != "forward_kl"):
        form = "top_k" if soft.weight_NK is None else "sampled"
        raise ValueError(f"divergence: {kind} cannot be computed from {form} targets")
    assert soft.temperature == loss.temperature, f"targets at {soft.temperature}, loss at {loss.temperature}"
    soft_weight, weight, temperature = loss.soft_weight, loss.label_weight, loss.temperature
    width = student_NV.shape[-1]
    assert soft.width <= width, f"targets over {soft.width} ids for a student of {width}"
    shared = soft.width
    z_NV = scaled(student_NV[:, :shared], temperature)
    # The labels' cross-entropy needs the same softmax, if it is over the same ids at the same temperature.
    joint = weight is not None and temperature == 1 and shared == width and not loss.label_smoothing
    label_z_N1 = z_NV.gather(-1, labels_N.unsqueeze(-1)) if joint else None
    parts = _sampled if soft.weight_NK is not None else _top_k
    terms = parts(z_NV, soft, loss)  # z_NV now holds a distribution over ids, see `Parts`
    value, base_grad_N1 = terms.value * (soft_weight * temperature**2), terms.base_grad_N1 * (soft_weight * temperature)
    kept_grad_NK = terms.kept_grad_NK * (soft_weight * temperature)
    if label_z_N1 is not None and weight is not None:
        value = value + weighted((terms.lse_N1 - label_z_N1).sum(), weight)
        base_grad_N1 = base_grad_N1 + weight * terms.base_q_N1
        if terms.kept_q_NK is not None:
            kept_grad_NK = kept_grad_NK + weight * terms.kept_q_NK
    grad_NV = z_NV.mul_(base_grad_N1).scatter_add_(-1, soft.ids_NK, kept_grad_NK)
    if label_z_N1 is not None and weight is not None:
        return value, grad_NV.scatter_add_(-1, labels_N.unsqueeze(-1), torch.ones_like(label_z_N1).mul_(-weight))
    if weight is None:
        return value, torch.nn.functional.pad(grad_NV, (0, width - shared)) if shared < width else grad_NV
    labels_value, labels_grad_NV = cross_entropy(log_softmax(student_NV, 1.0), labels_N, loss.label_smoothing)
    labels_grad_NV.mul_(weight)[:, :shared] += grad_NV
    return value + weighted(labels_value, weight), labels_grad_NV


class Parts(NamedTuple):
    """A divergence over kept ids, and its gradient for all V logits without a [N, V] tensor besides z_NV itself.

    `_top_k`. The K kept ids and the tail are K + 1 classes with logits c_k = z_k and c_tail = log sum exp(z_v) over the
    ids v that are not kept. The student's class probabilities are q = softmax(c), and the divergence D(p, q) has the
    gradient g = dD/dc. By the chain rule dD/dz_k = g_k for a kept id, and dD/dz_v = g_tail * exp(z_v - c_tail) for one
    in the tail. What is left in z_NV is exp(z_v - c_tail), 0 for kept ids: so the gradient is z_NV * g_tail, plus g_k
    scattered to the kept ids. The labels' cross-entropy needs the softmax over all V ids: q_k for a kept id,
    q_tail * exp(z_v - c_tail) for one in the tail.

    `_sampled`. With importance weights w_k the estimate of forward KL is sum_k w_k (log p_k - log q_k), where q is the
    softmax over all V ids (arXiv:2503.16870). Its gradient is (sum_k w_k) q_v, less w_k for each drawn id. What is left
    in z_NV is q itself, so nothing is left to add for kept ids.

    Attributes:
        value: of the divergence, summed over rows, [].
        kept_grad_NK: what is added to the gradient of each kept id.
        base_grad_N1: what z_NV is multiplied by for the gradient.
        lse_N1: log sum exp of the student's scaled logits over all V ids.
        kept_q_NK: the student's probabilities of kept ids; None where z_NV has them.
        base_q_N1: what z_NV is multiplied by for the student's probabilities.
    """

    value: Tensor
    kept_grad_NK: Tensor
    base_grad_N1: Tensor
    lse_N1: Tensor
    kept_q_NK: Tensor | None
    base_q_N1: Tensor


def _top_k(z_NV: Tensor, soft: Sparse, loss: Loss) -> Parts:
    """Divergence over kept ids and tail; leaves the student's distribution within the tail in z_NV."""
    absent_NK = soft.log_p_NK == -torch.inf
    kept_z_NK = z_NV.gather(-1, soft.ids_NK)
    # The lower wins: where nothing is kept an id keeps its own logit, unless the row really keeps that id as well.
    z_NV.scatter_reduce_(-1, soft.ids_NK, torch.where(absent_NK, kept_z_NK, -torch.inf), "amin")
    kept_z_NK.masked_fill_(absent_NK, MASKED)
    log_p_NK = soft.log_p_NK.to(z_NV.dtype).clamp(min=MASKED)
    tail_z_N1 = torch.logsumexp(z_NV, -1, keepdim=True).clamp_(min=MASKED)
    z_NV.sub_(tail_z_N1).exp_()
    classes_NK = torch.cat([kept_z_NK, tail_z_N1], -1)  # K + 1 of them
    lse_N1 = torch.logsumexp(classes_NK, -1, keepdim=True)
    log_q_NK = classes_NK - lse_N1
    tail_p_N1 = -torch.expm1(torch.logsumexp(log_p_NK, -1, keepdim=True))
    empty_N1 = (tail_p_N1 < TAIL_ROUNDING) | (tail_z_N1 <= MASKED)
    log_tail_p_N1 = tail_p_N1.clamp(min=TAIL_ROUNDING).log_().masked_fill_(empty_N1, MASKED)
    value, grad_NK = DIVERGENCES[loss.divergence.kind](
        log_q_NK, torch.cat([log_p_NK, log_tail_p_N1], -1), loss.divergence
    )
    q_NK = log_q_NK.exp()
    return Parts(value, grad_NK[:, :-1], grad_NK[:, -1:], lse_N1, q_NK[:, :-1], q_NK[:, -1:])


def _sampled(z_NV: Tensor, soft: Sparse, loss: Loss) -> Parts:
    """Forward KL, estimated; leaves the student's distribution in z_NV."""
    assert soft.weight_NK is not None
    weight_NK = soft.weight_NK.to(z_NV.dtype)
    lse_N1 = torch.logsumexp(z_NV, -1, keepdim=True)
    log_q_NK = z_NV.gather(-1, soft.ids_NK) - lse_N1
    value = (weight_NK * (soft.log_p_NK.to(z_NV.dtype).clamp(min=MASKED) - log_q_NK)).sum()
    z_NV.sub_(lse_N1).exp_()
    return Parts(value, -weight_NK, weight_NK.sum(-1, keepdim=True), lse_N1, None, torch.ones_like(lse_N1))


def keep(logits_NV: Tensor, layout: Layout, uniforms_ND: NDArray[np.float64] | None = None) -> Kept:
    """Choose what a layout keeps of these logits.

    With logits z and the layout's ids S, what is kept are log-probabilities z_k - log sum exp(z_s / t) over s in S at
    each temperature t. Where the student lacks ids of the teacher, S are those that both have: draws, kept ids, their
    probabilities and the tail are then of the teacher's distribution given S, as the dense loss has it.

    Args:
        logits_NV: the teacher's; -inf and the huge negative numbers that stand for it are masked ids. Ids beyond the
            layout's vocabulary are left out.
        layout: its `value_bits` shape the stored log-sum-exp.
        uniforms_ND: `sampled`: random numbers in [0, 1), float64, one per draw.
    """
    logits_NV = logits_NV[:, : layout.vocabulary]
    none = np.empty(0, np.int64)
    if layout.kind == "full":
        values_NV = logits_NV.float() if layout.value_bits == 32 else log_softmax(logits_NV, 1.0)
        sizes_N = np.full(len(logits_NV), layout.vocabulary)
        return Kept(_numpy(values_NV), none, sizes_N, np.empty((len(logits_NV), 0), np.float32), none)
    if layout.kind == "top_k":
        return _keep_top(logits_NV, layout)
    assert uniforms_ND is not None, "draws need random numbers"
    return _keep_drawn(logits_NV, layout, uniforms_ND)


def _keep_top(logits_NV: Tensor, layout: Layout) -> Kept:
    log_p_NV = log_softmax(logits_NV, 1.0)
    values_NK, ids_NK = log_p_NV.topk(layout.count, dim=-1)
    stored = quantized(_numpy(values_NK), layout.value_bits)
    lse_NT = np.empty((len(stored), len(layout.temperatures)), np.float32)
    for at, temperature in enumerate(layout.temperatures):
        mass_N = torch.logsumexp(log_softmax(logits_NV, temperature).gather(-1, ids_NK), -1).clamp(max=0.0)
        lse_NT[:, at] = np.logaddexp.reduce(stored.astype(np.float64) / temperature, axis=-1) - _numpy(mass_N)
    sizes_N = np.full(len(stored), layout.count)
    ids_M = ids_NK.reshape(-1).cpu().numpy()
    return Kept(stored.reshape(-1), ids_M, sizes_N, lse_NT, np.empty(0, np.int64))


def _keep_drawn(logits_NV: Tensor, layout: Layout, uniforms_ND: NDArray[np.float64]) -> Kept:
    log_p_NV = log_softmax(logits_NV, 1.0)
    return _count(log_p_NV, layout, _draw(log_p_NV, layout, uniforms_ND))


def keep_drawn_often(logits_NV: Tensor, layout: Layout, uniforms_RND: NDArray[np.float64]) -> list[Kept]:
    """`keep` of a `sampled` layout R times over the same logits, which are summed up once."""
    log_p_NV = log_softmax(logits_NV[:, : layout.vocabulary], 1.0)
    drawn_ND = _draw(log_p_NV, layout, np.concatenate(list(uniforms_RND), -1))
    return [_count(log_p_NV, layout, part) for part in np.split(drawn_ND, len(uniforms_RND), -1)]


def _draw(log_p_NV: Tensor, layout: Layout, uniforms_ND: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ids [N, D] at these uniform numbers, from the mean of the distributions at the layout's temperatures."""
    drawn_ND = np.empty(uniforms_ND.shape, np.int64)
    size = max(1, DRAW_BLOCK_BYTES // (8 * log_p_NV.shape[-1]))
    for start in range(0, len(log_p_NV), size):
        rows = slice(start, start + size)
        proposal_NV = torch.zeros_like(log_p_NV[rows], dtype=torch.float64)
        for temperature in layout.temperatures:
            proposal_NV += torch.softmax(log_p_NV[rows] / temperature, -1)
        cumulative_NV = proposal_NV.cumsum_(-1)
        # At most the last id that can be drawn at all, should rounding put a number beyond the end.
        top_N1 = cumulative_NV[:, -1:].clone()
        numbers_ND = torch.from_numpy(uniforms_ND[rows]).to(log_p_NV.device) * top_N1
        numbers_ND = torch.minimum(numbers_ND, torch.nextafter(top_N1, torch.zeros_like(top_N1)))
        drawn_ND[rows] = torch.searchsorted(cumulative_NV, numbers_ND, right=True).cpu().numpy()
    return drawn_ND


def _count(log_p_NV: Tensor, layout: Layout, drawn_ND: NDArray[np.int64]) -> Kept:
    """Several draws of one id become one entry with their number."""
    lse_NT = np.stack([_numpy(torch.logsumexp(log_p_NV / t, -1)) for t in layout.temperatures], -1)
    drawn_ND = np.sort(drawn_ND, axis=-1)
    first_ND = np.concatenate([np.ones((len(drawn_ND), 1), bool), drawn_ND[:, 1:] != drawn_ND[:, :-1]], -1)
    starts_M = np.flatnonzero(first_ND)
    counts_M = np.diff(np.append(starts_M, drawn_ND.size))
    sizes_N, ids_M = first_ND.sum(-1), drawn_ND.reshape(-1)[starts_M]
    at_N = torch.from_numpy(np.repeat(np.arange(len(sizes_N)), sizes_N)).to(log_p_NV.device)
    values_M = _numpy(log_p_NV[at_N, torch.from_numpy(ids_M).to(log_p_NV.device)])
    return Kept(quantized(values_M, layout.value_bits), ids_M, sizes_N, lse_NT.astype(np.float32), counts_M)


def describe(logits_NV: Tensor, kept: Kept, layout: Layout) -> dict[str, float]:
    """Sums over positions for the record of a store, at temperature 1.

    Returns:
        `positions`; `entropy` of the whole distribution, in nats; `ids` kept; `mass`, the probability of the kept ids;
        `error`, of kept log-probabilities through their codes in nats, each weighed by its probability, and
        `max_error`, the largest.
    """
    log_p_NV = log_softmax(logits_NV[:, : layout.vocabulary], 1.0)
    p_NV = log_p_NV.exp()
    if layout.kind == "full":
        exact_M = _numpy(log_p_NV).reshape(-1)
        stored_M = exact_M if layout.value_bits == 32 else quantized(kept.values.reshape(-1), layout.value_bits)
    else:
        at_N = torch.from_numpy(np.repeat(np.arange(len(kept)), kept.sizes_N)).to(logits_NV.device)
        exact_M = _numpy(log_p_NV[at_N, torch.from_numpy(kept.ids_M).to(logits_NV.device)])
        stored_M = kept.values
    error_M = np.abs(stored_M - np.maximum(exact_M, -RANGE)) if layout.value_bits < 32 else np.zeros_like(exact_M)
    mass_M = np.exp(exact_M.astype(np.float64))
    return {
        "positions": float(len(kept)),
        "entropy": float(-(p_NV * log_p_NV).sum()),
        "ids": float(kept.sizes_N.sum()),
        "mass": float(len(kept)) if layout.kind == "full" else float(mass_M.sum()),
        "error": float((mass_M * error_M).sum()),
        "max_error": float(error_M.max(initial=0.0)),
    }


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy()
