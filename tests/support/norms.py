"""Train a tiny net with BatchNorms through the real loop and write its trace; run alone or as several processes.

SETTINGS.json: batch_norm, parallel, micro_batch_size, num_processes (asserted), frozen_affine
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from distilpeft.machine.runtime import Runtime
from distilpeft.recipe.training import Fit, Optim
from distilpeft.training import batch_norm
from distilpeft.training.step import Work
from distilpeft.training.train import train

ROWS, BATCH, EPOCHS = 22, 8, 2  # the last batch of an epoch has 6 rows, for 4 processes 2, 2, 1 and 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.BatchNorm1d(3), nn.Tanh()) for _ in range(2)
        )
        self.last = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(self.last(x.mean(-1)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 3, 5, generator=generator) * 2 + 1, torch.randint(2, (ROWS,), generator=generator)


def main(settings: dict, out: Path) -> None:
    torch.set_num_threads(1)
    runtime = Runtime(parallel=settings["parallel"])
    assert runtime.accelerator.num_processes == settings["num_processes"]
    inputs, labels = rows()
    model = net()
    if settings.get("frozen_affine"):
        model.norm.requires_grad_(False)
    fit = Fit(
        epochs=EPOCHS, batch_size=settings.get("batch_size", BATCH), micro_batch_size=settings["micro_batch_size"],
        precision="fp32", keep="last", batch_norm=settings["batch_norm"], save_every=1,
    )  # fmt: skip
    work = Work(
        label="norms",
        fit=fit,
        optim=Optim(kind="sgd", lr=0.1, schedule="constant", warmup_ratio=0, max_grad_norm=None),
        seed=5,
        lengths_N=np.ones(ROWS, dtype=np.int32),
        load_batch=lambda ids, _: {"x": inputs[ids], "labels": labels[ids]},
        loss_sum=lambda bare, batch: F.cross_entropy(bare(batch["x"]), batch["labels"], reduction="sum"),
        count_rows=lambda batch: len(batch["labels"]),
        validate=lambda _: {"accuracy": 0.5},
        folder=out.parent,
    )
    figures = train(runtime, model, work)
    if runtime.is_main:
        lines = [json.loads(line) for line in (out.parent / "train_log.jsonl").read_text().splitlines()]
        kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, batch_norm._BatchNorm)})
        state = {name: tensor.double().tolist() for name, tensor in model.state_dict().items()}
        out.write_text(json.dumps({"trace": lines, "state": state, "kinds": kinds, "parallel": figures["parallel"]}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
