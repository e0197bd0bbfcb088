"""Distil a tiny student through the real loop and write its trace; run alone or under torchrun.

    torchrun --nproc_per_node 2 tests/support/worker.py SETTINGS.json OUT.json

SETTINGS: micro_batch_size, optimizer, num_processes (asserted: `accelerate launch --cpu` would silently run one).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from distilpeft.distillation.losses import Loss, distil_sum
from distilpeft.machine.runtime import Runtime
from distilpeft.recipe.training import Fit, Optim
from distilpeft.training.step import Work
from distilpeft.training.train import train
from support import tiny

ALPHA, TEMPERATURE, ROWS, BATCH, EPOCHS, SEED = 0.7, 2.0, 34, 8, 2, 5


def encoded() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Token ids, labels and made-up teacher logits of all rows."""
    texts = tiny.rows(ROWS, seed=9)
    ids = tiny.tokenizer()([text for text, _ in texts])["input_ids"]
    teacher = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(1)) * 3
    return ids, torch.tensor([label for _, label in texts]), teacher


def main(settings: dict, out: Path) -> None:
    torch.set_num_threads(1)
    runtime = Runtime()
    assert runtime.accelerator.num_processes == settings["num_processes"]
    ids, labels, teacher = encoded()
    tokenizer = tiny.tokenizer()

    def load_batch(row_ids: np.ndarray, epoch: int) -> dict:
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in row_ids]}, return_tensors="pt")
        return {"inputs": dict(inputs), "labels_N": labels[row_ids], "row_ids_N": row_ids}

    def loss_sum(model: torch.nn.Module, batch: dict) -> torch.Tensor:
        logits = model(**batch["inputs"]).logits
        soft = teacher[batch["row_ids_N"]]
        return distil_sum(logits, batch["labels_N"], soft, Loss(ALPHA, TEMPERATURE))

    model = tiny.classifier()
    optim = Optim(kind=settings["optimizer"], lr=settings["lr"], schedule="constant", warmup_ratio=0, max_grad_norm=1e6)
    fit = Fit(
        epochs=EPOCHS, batch_size=BATCH, micro_batch_size=settings["micro_batch_size"], precision="fp32", keep="last"
    )
    work = Work(
        label="trace",
        fit=fit,
        optim=optim,
        seed=SEED,
        lengths_N=np.array([len(row) for row in ids], dtype=np.int32),
        load_batch=load_batch,
        loss_sum=loss_sum,
        count_rows=lambda batch: len(batch["labels_N"]),
        validate=lambda _: {"accuracy": 0.5},
        folder=out.parent,
    )
    train(runtime, model, work)
    if runtime.is_main:
        lines = [json.loads(line) for line in (out.parent / "train_log.jsonl").read_text().splitlines()]
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        out.write_text(json.dumps({"trace": lines, "weights": weights.double().tolist()}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
