"""Trained maps from the student's hidden size to the teacher's, which only training has."""

from __future__ import annotations

from torch import nn

PROJECTIONS = "feature_projections"
"""Name under which the student carries them while it is trained; they are no part of what is saved."""


def carry(student: nn.Module, projections: dict[str, nn.Module]) -> None:
    """Let the student carry matrices that are trained with it; `drop_projections` takes them off."""
    device = next(student.parameters()).device
    setattr(student, PROJECTIONS, nn.ModuleDict(projections).to(device))


def drop_projections(student: nn.Module) -> None:
    """Take off what only training needed."""
    if hasattr(student, PROJECTIONS):
        delattr(student, PROJECTIONS)
