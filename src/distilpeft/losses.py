"""Losses as pure functions on flat rows.

Shapes:
    N  rows that count: here examples
    C  classes

Every loss returns a SUM over rows, in nats, computed in float32 or wider. Only the training loop divides, once
per optimizer step, by the number of rows over all micro-batches and processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(logits: Tensor) -> Tensor:
    """At least float32: sums over many bf16 rows would lose digits; float64 stays, for proofs."""
    return logits if logits.dtype == torch.float64 else logits.float()


def ce_sum(student_logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy against hard labels, summed over rows."""
    return F.cross_entropy(_wide(student_logits_NC), labels_N, reduction="sum")


def kl_sum(student_logits_NC: Tensor, teacher_logits_NC: Tensor, *, temperature: float) -> Tensor:
    """`T^2 * KL(teacher || student)` of the distributions at temperature `T`, summed over rows.

    `T^2` keeps the size of the gradient independent of `T` (Hinton et al. 2015, arXiv:1503.02531, section 2).
    Zero, in value and gradient, where student and teacher agree up to a constant per row.
    """
    log_q_NC = F.log_softmax(_wide(student_logits_NC) / temperature, dim=-1)
    log_p_NC = F.log_softmax(_wide(teacher_logits_NC) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q_NC, log_p_NC, reduction="sum", log_target=True)


def distil_sum(
    student_logits_NC: Tensor,
    labels_N: Tensor,
    teacher_logits_NC: Tensor | None,
    *,
    alpha: float,
    temperature: float,
) -> Tensor:
    """`alpha * T^2 * KL + (1 - alpha) * CE`, summed over rows; without a teacher alpha must be 0."""
    loss = torch.zeros((), device=student_logits_NC.device)
    if alpha < 1:
        loss = loss + (1 - alpha) * ce_sum(student_logits_NC, labels_N)
    if alpha > 0:
        assert teacher_logits_NC is not None, "alpha > 0 needs soft targets"
        loss = loss + alpha * kl_sum(student_logits_NC, teacher_logits_NC, temperature=temperature)
    return loss
