"""Traps 1-5: loss and grad_norm do not depend on micro-batch, accumulation and processes.

The reference is a plain float64 loop over full batches, written here without the project's loop or loss. SGD shows
errors of scale that AdamW would hide; 34 rows in batches of 8 leave a last batch of 2, and micro-batches of 3 have
unequal sizes, so a mean of means would show.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import commands, tiny, worker
from torch.nn import functional as F

from distilpeft.data.batches import epoch_batches

WORKER = Path(worker.__file__)
LR = {"sgd": 0.05, "adamw": 0.001}


def reference(optimizer: str) -> tuple[list[tuple[float, float]], torch.Tensor]:
    """Loss and grad_norm of every step, and the final weights, in float64 over full batches."""
    ids, labels, teacher = worker.encoded()
    model = tiny.classifier().double().train()
    decayed = {"lr": LR[optimizer], "weight_decay": 0.0}
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    optim = kinds[optimizer](model.parameters(), **decayed)
    lengths = np.array([len(row) for row in ids], dtype=np.int32)
    trace = []
    for epoch in range(worker.EPOCHS):
        for batch in epoch_batches(lengths, worker.BATCH, worker.SEED, epoch):
            inputs = tiny.tokenizer().pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
            logits = model(**inputs).logits
            p = F.softmax(teacher[batch].double() / worker.TEMPERATURE, dim=-1)
            log_q = F.log_softmax(logits / worker.TEMPERATURE, dim=-1)
            kl = (p * (p.log() - log_q)).sum(-1).mean() * worker.TEMPERATURE**2
            ce = -F.log_softmax(logits, dim=-1)[range(len(batch)), labels[batch]].mean()
            loss = worker.ALPHA * kl + (1 - worker.ALPHA) * ce
            optim.zero_grad()
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            optim.step()
            trace.append((loss.item(), norm.item()))
    return trace, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[list[tuple[float, float]], torch.Tensor]]:
    return {optimizer: reference(optimizer) for optimizer in LR}


def settings(optimizer: str, micro_batch_size: int, processes: int) -> dict:
    return {
        "micro_batch_size": micro_batch_size,
        "optimizer": optimizer,
        "lr": LR[optimizer],
        "num_processes": processes,
    }


def expect_same(found: dict, expected: tuple[list[tuple[float, float]], torch.Tensor]) -> None:
    trace, final = expected
    assert len(found["trace"]) == len(trace) == 10
    for line, (loss, norm) in zip(found["trace"], trace, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=2e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=2e-4)
    distance = (torch.tensor(found["weights"], dtype=torch.float64) - final).norm() / final.norm()
    assert distance < 1e-4


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 8])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_process_follows_the_float64_full_batch(tmp_path, references, optimizer, micro_batch_size):
    worker.main(settings(optimizer, micro_batch_size, 1), tmp_path / "out.json")
    expect_same(json.loads((tmp_path / "out.json").read_text()), references[optimizer])


@pytest.mark.parametrize(("optimizer", "micro_batch_size"), [("sgd", 3), ("sgd", 1), ("adamw", 4)])
def test_two_processes_follow_the_float64_full_batch(tmp_path, references, optimizer, micro_batch_size):
    found = commands.run_script(WORKER, settings(optimizer, micro_batch_size, 2), tmp_path, 2)
    expect_same(found, references[optimizer])


def test_processes_without_rows_in_the_last_batch_neither_hang_nor_skew_the_mean(tmp_path, references):
    """The last batch has 2 rows for 4 processes."""
    expect_same(commands.run_script(WORKER, settings("sgd", 8, 4), tmp_path, 4), references["sgd"])


@pytest.mark.slow
def test_two_processes_under_torchrun_are_two_and_follow_the_full_batch(tmp_path, references):
    """Trap 28: the worker asserts the number of processes that Accelerate joined."""
    expect_same(commands.torchrun(WORKER, settings("sgd", 3, 2), tmp_path, 2), references["sgd"])
