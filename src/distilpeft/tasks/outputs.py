"""What a task takes from a model's output: pooled vectors and logits."""

from __future__ import annotations

from typing import Any


def pooled(states_BSD: Any, mask_BS: Any, pooling: str) -> Any:
    """A vector [B, D] for each row: the mean of its hidden states, or the first."""
    if pooling == "first":
        return states_BSD[:, 0]
    mask_BS1 = mask_BS[..., None].to(states_BSD.dtype)
    return (states_BSD * mask_BS1).sum(1) / mask_BS1.sum(1)


def logits_of(found: Any) -> Any:
    """A transformers model's logits; those of a start and an end of an answer as [B, 2, S]."""
    if "start_logits" not in found:
        return found.logits
    import torch

    return torch.stack([found.start_logits, found.end_logits], dim=1)
