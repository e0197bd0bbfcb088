"""Prove on this machine that loss and gradient do not depend on how a batch is split.

A tiny language model is distilled through the loop, loss and collation that every run uses, once for each split into
micro-batches, accumulation and processes. The reference is a plain float64 loop over whole batches, one document at a
time, unpadded and unpacked, that shares none of them. Rows have unequal numbers of targets (some none) and several
documents; dropout is 0. SGD shows errors of scale, which AdamW would hide; AdamW shows errors of state.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from distilpeft.data.batches import epoch_batches
from distilpeft.distillation.losses import Loss
from distilpeft.errors import GateError
from distilpeft.machine.runtime import Runtime
from distilpeft.recipe.task import CausalLM
from distilpeft.recipe.training import Fit, Optim
from distilpeft.tasks.language.causal_lm import CausalLMTask
from distilpeft.tasks.task import Batch
from distilpeft.training.step import Work
from distilpeft.training.train import train

TOLERANCE = 1e-5
MICRO_BATCH_SIZES = (1, 2, 3, 5, 8, 16)
OPTIMIZERS = {"sgd": 0.05, "adamw": 1e-3}
NUM_ROWS, BATCH, EPOCHS, SEED, VOCABULARY = 40, 16, 2, 5, 97
LOSS = Loss(alpha=0.7, temperature=2.0, label_smoothing=0.1)
Trace = list[tuple[float, float]]
"""Loss and grad_norm of every step."""


@dataclass(frozen=True)
class Split:
    """One way of splitting the same batches, and how far its trace is from the reference, relative, at worst."""

    processes: int
    micro_batch_size: int
    optimizer: str
    loss_error: float
    grad_norm_error: float

    @property
    def good(self) -> bool:
        """Whether both are within rounding; a NaN is not."""
        return max(self.loss_error, self.grad_norm_error) <= TOLERANCE and not math.isnan(
            self.loss_error + self.grad_norm_error
        )


def run(processes: Sequence[int], console: Console) -> bool:
    """Try every split for each number of processes, print the table, and say whether all are good."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GateError("selftest starts its own processes: run it without a launcher, with --processes N")
    references = {optimizer: reference(optimizer) for optimizer in OPTIMIZERS}
    splits: list[Split] = []
    for count in processes:
        console.print(f"{count} process{'es' if count > 1 else ''}: {len(MICRO_BATCH_SIZES) * len(OPTIMIZERS)} splits")
        traces = _launched(count) if count > 1 else traces_here(1)
        for (micro_batch_size, optimizer), trace in traces.items():
            errors = [_error(trace, references[optimizer], column) for column in (0, 1)]
            splits.append(Split(count, micro_batch_size, optimizer, *errors))
    _show(splits, console)
    return all(split.good for split in splits)


def _error(trace: Trace, expected: Trace, column: int) -> float:
    assert len(trace) == len(expected)
    pairs = zip(trace, expected, strict=True)
    return max(abs(step[column] - exact[column]) / abs(exact[column]) for step, exact in pairs)


def _show(splits: Sequence[Split], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("processes", "micro-batch", "accumulation", "optimizer", "loss", "grad_norm", ""):
        table.add_column(title, justify="left" if title in ("optimizer", "") else "right")
    for split in splits:
        share = -(-BATCH // split.processes)
        cells = (split.processes, split.micro_batch_size, -(-share // split.micro_batch_size), split.optimizer)
        errors = (f"{split.loss_error:.1e}", f"{split.grad_norm_error:.1e}")
        table.add_row(*map(str, cells), *errors, "ok" if split.good else "WRONG")
    console.print(table)
    bad = sum(not split.good for split in splits)
    console.print(
        f"Largest relative difference from the float64 full batch over {EPOCHS * -(-NUM_ROWS // BATCH)} steps; "
        f"allowed {TOLERANCE:.0e}. {len(splits) - bad} of {len(splits)} splits are right.",
        highlight=False,
    )


def rows() -> dict[str, list[Any]]:
    """Ragged rows of one to three documents; every seventh has no target at all."""
    rng = np.random.default_rng(11)
    columns: dict[str, list[Any]] = {name: [] for name in ("input_ids", "target", "segments", "num_bytes")}
    for row in range(NUM_ROWS):
        segments = [int(size) for size in rng.integers(2, 12, size=rng.integers(1, 4))]
        total = sum(segments)
        target = rng.random(total) < (0.0 if row % 7 == 6 else rng.uniform(0.2, 1.0))
        target[np.cumsum([0, *segments[:-1]])] = False
        columns["input_ids"].append(rng.integers(1, VOCABULARY, total).tolist())
        columns["target"].append(target.tolist())
        columns["segments"].append(segments)
        columns["num_bytes"].append(total)
    return columns


def models() -> tuple[Any, Any]:
    """Student and teacher. GPT-2, because its layers compute nothing in float32 when its weights are float64."""
    pair = []
    for seed, width in ((1, 32), (2, 48)):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=width, n_layer=2, n_head=4, initializer_range=0.2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        pair.append(transformers.GPT2LMHeadModel(config))
    return pair[0], pair[1].requires_grad_(False).eval()


@functools.cache
def reference(optimizer: str) -> Trace:
    """Loss and grad_norm of every step in float64 over full batches, on the CPU."""
    student, teacher = (model.double() for model in models())
    data, trace = rows(), []
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    optim = kinds[optimizer](student.parameters(), lr=OPTIMIZERS[optimizer], weight_decay=0.0)
    for batch in batches(data):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in batch:
            start = 0
            for size in data["segments"][row]:
                part = slice(start, start + size)
                value, targets = _document(student, teacher, data["input_ids"][row][part], data["target"][row][part])
                total, count, start = total + value, count + targets, start + size
        loss = total / count
        optim.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.cat([parameter.grad.flatten() for parameter in student.parameters()]).norm()
        optim.step()
        trace.append((loss.item(), norm.item()))
    return trace


def _document(student: nn.Module, teacher: nn.Module, ids: list[int], target: list[bool]) -> tuple[Tensor, int]:
    """The loss of one document, written out, and its number of targets."""
    inputs = torch.tensor([ids])
    counted = torch.tensor(target)[1:]
    log_q, log_p, labels = student(inputs).logits[0, :-1], teacher(inputs).logits[0, :-1], inputs[0, 1:]
    ce = F.cross_entropy(log_q, labels, reduction="none", label_smoothing=LOSS.label_smoothing)
    log_q, log_p = (torch.log_softmax(logits / LOSS.temperature, -1) for logits in (log_q, log_p))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) * LOSS.temperature**2
    return (LOSS.alpha * kl + (1 - LOSS.alpha) * ce)[counted].sum(), int(counted.sum())


def batches(data: dict[str, list[Any]]) -> list[Any]:
    """The global batches of every step, in order."""
    lengths = np.array([len(ids) for ids in data["input_ids"]], dtype=np.int32)
    return [batch for epoch in range(EPOCHS) for batch in epoch_batches(lengths, BATCH, SEED, epoch)]


def traces_here(processes: int) -> dict[tuple[int, str], Trace]:
    """The trace of every micro-batch size and optimizer, on the processes that this one has joined."""
    runtime = Runtime()
    assert runtime.accelerator.num_processes == processes, "the launcher did not start the processes it was asked for"
    return {(size, kind): _trace(runtime, size, kind) for size in MICRO_BATCH_SIZES for kind in OPTIMIZERS}


def _trace(runtime: Runtime, micro_batch_size: int, optimizer: str) -> Trace:
    student, teacher = models()
    task = CausalLMTask(CausalLM(kind="causal_lm", text="text", pack=True))
    for model in (student, teacher):
        model.to(runtime.device)
        task.prepare(model)
    data, padding = rows(), SimpleNamespace(pad_token_id=0)

    def load_batch(ids: Any, epoch: int = 0) -> Batch:
        return task.collate({name: [column[i] for i in ids] for name, column in data.items()}, padding)

    def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            soft = task.soft(teacher, batch)
        return task.loss_sum(model, batch, LOSS, soft)

    with tempfile.TemporaryDirectory() as folder:
        # The main process writes the log; every process has a folder of its own that nobody else reads.
        work = Work(
            label="selftest",
            fit=Fit(epochs=EPOCHS, batch_size=BATCH, micro_batch_size=micro_batch_size, precision="fp32", keep="last"),
            optim=Optim(
                kind=optimizer,
                lr=OPTIMIZERS[optimizer], schedule="constant", warmup_ratio=0, max_grad_norm=None,
            ),
            seed=SEED,
            lengths_N=np.array([len(ids) for ids in data["input_ids"]], dtype=np.int32),
            load_batch=load_batch,
            loss_sum=loss_sum,
            count_rows=task.count_rows,
            validate=lambda _: {"accuracy": 0.0},
            folder=Path(folder),
        )  # fmt: skip
        train(runtime, copy.deepcopy(student), work)
        runtime.accelerator.free_memory()
        log = Path(folder) / "train_log.jsonl"
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if runtime.is_main else []
    return [(line["loss"], line["grad_norm"]) for line in lines]


def _launched(processes: int) -> dict[tuple[int, str], Trace]:
    """`traces_here` in processes joined by torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "traces.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launcher, "-m", "distilpeft.training.selftest", str(processes), str(out)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode != 0 or not out.is_file():
            reason = process.stderr.strip().splitlines()[-1:] or ["no message"]
            raise GateError(f"selftest: {processes} processes could not run: {reason[0]}")
        lines = json.loads(out.read_text(encoding="utf-8"))
    return {(line["micro_batch_size"], line["optimizer"]): [tuple(step) for step in line["trace"]] for line in lines}


def _worker(processes: int, out: Path) -> None:
    """One of several processes; the main one writes what was found."""
    cases = traces_here(processes)
    if int(os.environ["RANK"]) == 0:
        lines = [{"micro_batch_size": size, "optimizer": kind, "trace": trace} for (size, kind), trace in cases.items()]
        out.write_text(json.dumps(lines), encoding="utf-8")


if __name__ == "__main__":
    _worker(int(sys.argv[1]), Path(sys.argv[2]))
