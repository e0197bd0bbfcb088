"""Divergences by their definitions, in float64: what losses are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from distilpeft.recipe.distil import Divergence

KINDS = [
    Divergence(kind="forward_kl"),
    Divergence(kind="reverse_kl"),
    *(Divergence(kind="jsd", beta=beta) for beta in (0.1, 0.5, 0.9)),
    *(Divergence(kind="skew_kl", skew=skew) for skew in (0.1, 0.7)),
    *(Divergence(kind="skew_reverse_kl", skew=skew) for skew in (0.1, 0.7)),
    Divergence(kind="total_variation"),
    Divergence(kind="logit_mse"),
]
NAMES = [f"{d.kind}-{d.beta}-{d.skew}" for d in KINDS]


def reference(student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float) -> Tensor:
    """The definition, with probabilities written out."""
    q, p = (torch.softmax(logits / temperature, -1) for logits in (student, teacher))

    def kl(one: Tensor, two: Tensor) -> Tensor:
        return (one * (one / two).log()).sum()

    beta, skew = divergence.beta, divergence.skew
    mixed = beta * p + (1 - beta) * q
    centred = [logits / temperature - (logits / temperature).mean(-1, keepdim=True) for logits in (student, teacher)]
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixed) + (1 - beta) * kl(q, mixed),
        "skew_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - skew) * p + skew * q),
        "total_variation": lambda: 0.5 * (p - q).abs().sum(),
        "logit_mse": lambda: (centred[0] - centred[1]).square().mean(-1).sum(),
    }[divergence.kind]()
    return value * temperature**2
