"""Soft targets on disk as a torch data set: what `distilpeft run` leaves in `runs/NAME/targets-KEY`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distilpeft.distillation.codec import Kept
from distilpeft.distillation.sparse import Sparse
from distilpeft.distillation.store import SoftTargets


class SoftTargetDataset(Dataset[Tensor | Sparse]):
    """The teacher's answers for the training rows, in the order of the rows.

    Item i belongs to row i: logits [P, C] for its P positions (one for a text, one per word or target token); from
    a store that keeps some ids only, a `Sparse` for `fused_distil_loss`.

    Args:
        folder: a store of soft targets.
        temperature: of stores that keep some ids only, one of those that they were made for; default: the first.

    Raises:
        InputError: the folder is no store, or was not made for this temperature.
    """

    def __init__(self, folder: str | Path, temperature: float | None = None) -> None:
        self.store = SoftTargets(Path(folder))
        kept_at = self.store.layout.temperatures
        self.temperature = temperature if temperature is not None or not kept_at else kept_at[0]
        if kept_at and self.temperature not in kept_at:
            from distilpeft.errors import InputError

            listed = ", ".join(f"{one:g}" for one in kept_at)
            raise InputError(f"{folder}: its soft targets are for temperature {listed}, not {self.temperature:g}")

    @property
    def num_classes(self) -> int:
        """Classes, or ids of the vocabulary."""
        return self.store.layout.vocabulary

    def __len__(self) -> int:
        return len(self.store.positions_R)

    def __getitem__(self, row: int) -> Tensor | Sparse:
        return self._of(self.store.row(row + len(self) if row < 0 else row))

    def batch(self, rows: Sequence[int] | Tensor) -> Tensor | Sparse:
        """The soft targets of several rows, their positions one after the other."""
        return self._of(self.store.lookup(np.asarray(rows, dtype=np.int64)))

    def _of(self, kept: Kept) -> Tensor | Sparse:
        if self.store.layout.kind == "full":
            return torch.from_numpy(np.array(kept.values))
        assert self.temperature is not None
        return Sparse.of(kept, self.store.layout, self.temperature)
