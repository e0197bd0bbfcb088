"""Logits to probabilities and their distance, in numpy and float64; needs nothing heavier.

N  rows    C  classes or vocabulary
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def log_softmax(logits_NC: NDArray[np.floating[Any]]) -> Floats:
    """Log-probabilities."""
    shifted_NC = logits_NC.astype(np.float64) - logits_NC.max(-1, keepdims=True)
    log_p_NC: Floats = shifted_NC - np.log(np.exp(shifted_NC).sum(-1, keepdims=True))
    return log_p_NC


def softmax(logits_NC: NDArray[np.floating[Any]]) -> Floats:
    """Probabilities."""
    p_NC: Floats = np.exp(log_softmax(logits_NC))
    return p_NC


def divergence(log_p_NC: Floats, log_q_NC: Floats) -> Floats:
    """KL(p ‖ q) of every row, [N], in nats, from log-probabilities."""
    kl_N: Floats = (np.exp(log_p_NC) * (log_p_NC - log_q_NC)).sum(-1)
    return kl_N
