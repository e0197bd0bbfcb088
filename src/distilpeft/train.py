"""The one training loop: it tunes the teacher and distils the student.

The contract. Losses are sums over rows. A step's gradient is the sum over all its rows, on all processes and
micro-batches, divided once by their number. DDP averages gradients over processes, so each process multiplies by
the number of processes. Hence loss and grad_norm do not depend on how rows are split into micro-batches,
accumulation and processes. The wrapped model is always the one called, or DDP would reduce nothing.

The order of rows is a pure function of (seed, epoch) and dropout of (seed, step, process), so a checkpoint is
weights, optimizer and a few numbers, and a resumed run ends in the same weights bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distilpeft.artifact import CHECKPOINTS, fsync, read_json, write_json
from distilpeft.data import epoch_batches, micro_batches
from distilpeft.errors import GateError, InputError
from distilpeft.models import trainable
from distilpeft.recipe import LOWER_IS_BETTER, Fit, Optim
from distilpeft.runtime import Runtime

Batch = dict[str, Any]
Watch = Callable[[float, float], None]
"""(share of all steps that is done, the monitor's value) of each validation of a training."""


@dataclass(frozen=True)
class Work:
    """What the loop is to do.

    Attributes:
        label: for messages, such as `teacher`.
        load_batch: row ids → collated batch on the CPU.
        loss_sum: (bare model, batch) → loss summed over the rows that count, in nats; called inside the forward of the
            module that is wrapped, so whatever weights it uses are gathered and their gradients reduced.
        count_rows: batch → number of rows that count.
        validate: bare model → metrics on the validation rows; equal on all processes; `finite` 0 if it has none.
        monitor: the metric that picks the checkpoint.
        folder: where checkpoints and `train_log.jsonl` go.
        track: called with a step and its figures, after every step and every validation; see `tracking`.
        watch: called after every validation of tuned weights, once more for those before a resumption; may raise.
    """

    label: str
    fit: Fit
    optim: Optim
    seed: int
    lengths_N: NDArray[np.int32]
    load_batch: Callable[[NDArray[np.int64]], Batch]
    loss_sum: Callable[[nn.Module, Batch], Tensor]
    count_rows: Callable[[Batch], int]
    validate: Callable[[nn.Module], dict[str, float]]
    folder: Path
    monitor: str = "accuracy"
    watch: Watch | None = None
    track: Callable[[int, Mapping[str, float]], None] | None = None


class Step(nn.Module):
    """What is wrapped for several processes: model and loss as one forward."""

    def __init__(self, model: nn.Module, loss_sum: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss_sum = loss_sum

    def forward(self, batch: Batch) -> Tensor:
        """Loss summed over the batch's rows."""
        return self._loss_sum(self.model, batch)


@dataclass
class State:
    """Where the loop stands; everything that a checkpoint holds besides tensors."""

    step: int = 0
    rows: int = 0
    seconds: float = 0.0
    precision: str = ""
    best_step: int = 0
    best_value: float | None = None
    bad_validations: int = 0
    plateau_bad: int = 0
    plateau_factor: float = 1.0
    stopped_early: bool = False
    validations: list[dict[str, float]] = field(default_factory=list)


def steps_per_epoch(num_rows: int, fit: Fit) -> int:
    """Optimizer steps in one pass over the rows; the last batch may be smaller."""
    return math.ceil(num_rows / fit.batch_size)


def total_steps(num_rows: int, fit: Fit) -> int:
    """Optimizer steps of the whole fit."""
    steps = fit.epochs * steps_per_epoch(num_rows, fit)
    return min(steps, fit.max_steps) if fit.max_steps else steps


def lr_factor(optim: Optim, step: int, total: int) -> float:
    """What the learning rate is multiplied by in step 0..total-1 (plateau cuts come on top)."""
    warmup = round(optim.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    if optim.schedule == "linear":
        return 1 - share
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1.0


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable weights; no weight decay on biases, norms and other vectors."""
    parameters = list(trainable(model).values())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.kind == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, fused=True)


def train(runtime: Runtime, model: nn.Module, work: Work) -> dict[str, Any]:
    """Train until the recipe's end, resuming from the newest checkpoint in `work.folder`; changes `model` in place.

    Returns:
        Figures: steps, rows, seconds, rows_per_s, best step and value, all validations. The model holds the best
        or the last weights, as `fit.keep` says.

    Raises:
        GateError: the loss or a gradient is not finite, or an adapter gets no gradient.
        StoppedBySignal: a signal came; a checkpoint was written.
        InputError: the checkpoint was made in another precision.
    """
    fit, accelerator = work.fit, runtime.accelerator
    total = total_steps(len(work.lengths_N), fit)
    wrapped, optimizer = accelerator.prepare(Step(model, work.loss_sum), make_optimizer(model, work.optim))
    state = _resume(runtime, work, model, optimizer)
    if not state.validations:
        _validate(work, model, state)  # the untuned model: the figure that training has to beat
    batches: list[NDArray[np.int64]] = []
    epoch = -1
    with runtime.bar(work.label, total, state.step) as bar, runtime.stoppable():
        while state.step < total and not state.stopped_early:
            begin = time.monotonic()
            at, index = divmod(state.step, steps_per_epoch(len(work.lengths_N), fit))
            if at != epoch:
                epoch, batches = at, epoch_batches(work.lengths_N, fit.batch_size, work.seed, at)
            runtime.seed(work.seed, state.step, accelerator.process_index)
            lr = work.optim.lr * lr_factor(work.optim, state.step, total) * state.plateau_factor
            for group in optimizer.param_groups:
                group["lr"] = lr
            figures = optimizer_step(runtime, wrapped, optimizer, batches[index], work, state.step)
            state.step += 1
            state.rows += figures.pop("rows")
            stop = figures.pop("stop")
            _log(runtime, work, {"step": state.step, "epoch": at, "lr": lr, **figures})
            state.seconds += time.monotonic() - begin
            due = _is_due(fit.validate_every or len(batches), state.step, total)
            improved = due and _validate(work, model, state)
            if improved or stop or _is_due(fit.save_every, state.step, total):
                _save(runtime, work, model, optimizer, state)
            if stop:
                runtime.stop(f"{work.label} at step {state.step} of {total}")
            bar.advance(1, f"loss {figures['loss']:.4f}")
    if fit.keep == "best":
        _load_weights(model, work.folder / CHECKPOINTS / _name(state.best_step))
    return {
        "steps": state.step,
        "rows": state.rows,
        "seconds": round(state.seconds, 2),
        "rows_per_s": round(state.rows / max(state.seconds, 1e-9), 2),
        "precision": state.precision,
        "kept_step": state.best_step if fit.keep == "best" else state.step,
        "best_value": state.best_value,
        "validations": state.validations,
    }


def optimizer_step(
    runtime: Runtime, model: nn.Module, optimizer: Any, batch: NDArray[np.int64], work: Work, step: int
) -> dict[str, Any]:
    """Take one optimizer step on the mean loss over every row of `batch`, on all processes.

    Returns:
        loss (nats per row, the mean over the whole batch), grad_norm (before clipping), rows, and whether any
        process was asked to stop.
    """
    accelerator = runtime.accelerator
    shares = micro_batches(batch, work.fit.micro_batch_size, accelerator.process_index, accelerator.num_processes)
    loaded = [work.load_batch(ids) if len(ids) else None for ids in shares]
    mine = sum(work.count_rows(micro) for micro in loaded if micro is not None)
    counts = torch.tensor([mine, int(runtime.stop_requested)], device=runtime.device)
    rows, stop = (int(count) for count in accelerator.reduce(counts, "sum"))
    scale = accelerator.num_processes / max(rows, 1)
    total = torch.zeros((), device=runtime.device)
    model.train()
    for index, micro in enumerate(loaded):
        last = index == len(loaded) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            if micro is None:  # fewer rows than processes: take part in the reduction with nothing
                loss = model(send_to_device(work.load_batch(batch[:1]), runtime.device)) * 0.0
            else:
                loss = model(send_to_device(micro, runtime.device)) * scale
            accelerator.backward(loss)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), work.optim.max_grad_norm or math.inf)
    loss_mean, grad_norm = float(accelerator.reduce(total, "mean")), float(norm)
    if not (math.isfinite(loss_mean) and math.isfinite(grad_norm)):
        raise GateError(
            f"{work.label}: step {step + 1}: loss {loss_mean}, grad_norm {grad_norm}: not finite. Rows of the batch: "
            f"{_listed(batch)}. No weight was changed by this step; try a lower lr or precision: fp32"
        )
    if step < 2 and rows:
        _check_gradients(model, work.label, first=step == 0)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss_mean, "grad_norm": grad_norm, "rows": rows, "stop": bool(stop)}


def _check_gradients(model: nn.Module, label: str, *, first: bool) -> None:
    """Every adapter tensor must be reached by the gradient (in the first step lora_A's is zero, because B is)."""
    deaf = [
        name.removeprefix("module.").removeprefix("model.")
        for name, parameter in trainable(model).items()
        if "lora_" in name
        and (parameter.grad is None or not ((first and "lora_A" in name) or bool(parameter.grad.any())))
    ]
    if deaf:
        raise GateError(
            f"{label}: no gradient reaches {len(deaf)} adapter tensors, such as {deaf[0]}; "
            "name the modules that take part in lora.target_modules"
        )


def _listed(batch: NDArray[np.int64]) -> str:
    shown = ", ".join(str(row) for row in batch[:10])
    return shown + (f", ... ({len(batch)} rows)" if len(batch) > 10 else "")


def _is_due(every: int, step: int, total: int) -> bool:
    return step % every == 0 or step == total


def _validate(work: Work, model: nn.Module, state: State) -> bool:
    """Measure, remember the best, move the plateau schedule and early stopping; True if this is the best so far."""
    metrics = {"step": state.step, **work.validate(model)}
    state.validations.append(metrics)
    _track(work, metrics, "validation")
    if state.step == 0:
        return False  # the untuned model is a reference, never a result
    _watch(work, metrics)
    sign, value = _sign(work), _value(work, metrics)
    improved = state.best_value is None or sign * value > sign * state.best_value
    if improved:
        state.best_step, state.best_value = state.step, value
        state.bad_validations = state.plateau_bad = 0
        return True
    state.bad_validations += 1
    state.plateau_bad += 1
    if work.optim.schedule == "reduce_on_plateau" and state.plateau_bad > work.optim.plateau_patience:
        state.plateau_factor *= work.optim.plateau_factor
        state.plateau_bad = 0
    patience = work.fit.early_stopping_patience
    state.stopped_early = patience is not None and state.bad_validations >= patience
    return False


def _sign(work: Work) -> int:
    return -1 if work.monitor in LOWER_IS_BETTER else 1


def _value(work: Work, metrics: dict[str, float]) -> float:
    return metrics[work.monitor] if metrics.get("finite", 1.0) else -_sign(work) * sys.float_info.max


def _watch(work: Work, metrics: dict[str, float]) -> None:
    if work.watch is not None and metrics["step"] > 0:
        work.watch(metrics["step"] / total_steps(len(work.lengths_N), work.fit), _value(work, metrics))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _save(runtime: Runtime, work: Work, model: nn.Module, optimizer: Any, state: State) -> None:
    """Write a checkpoint in full, rename it into place, then drop all but it and the best one."""
    if runtime.is_main:
        folder = work.folder / CHECKPOINTS
        fresh = folder / f"{_name(state.step)}.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in trainable(model).items()}
        save_file(weights, fresh / "weights.safetensors")
        torch.save(optimizer.state_dict(), fresh / "optimizer.pt")
        write_json(fresh / "state.json", asdict(state))
        for file in fresh.iterdir():
            fsync(file)
        shutil.rmtree(folder / _name(state.step), ignore_errors=True)
        fresh.rename(folder / _name(state.step))
        fsync(folder)
        for old in folder.iterdir():
            if old.name not in (_name(state.step), _name(state.best_step)):
                shutil.rmtree(old)
    runtime.accelerator.wait_for_everyone()


def _resume(runtime: Runtime, work: Work, model: nn.Module, optimizer: Any) -> State:
    """Load the newest whole checkpoint, or start."""
    precision = runtime.resolve_precision(work.fit.precision)
    folder = work.folder / CHECKPOINTS
    whole = sorted(p for p in folder.glob("step-*") if p.suffix != ".partial") if folder.is_dir() else []
    runtime.accelerator.wait_for_everyone()
    if not whole:
        if runtime.is_main:
            (work.folder / "train_log.jsonl").unlink(missing_ok=True)
        return State(precision=precision)
    newest = whole[-1]
    state = State(**read_json(newest / "state.json", f"delete {newest} to resume from an earlier state"))
    if state.precision != precision:
        raise InputError(
            f"{newest}: this run began in {state.precision}, but fit.precision is {precision} on this machine; "
            f"set the precision in the recipe, or delete {work.folder} to begin again"
        )
    _load_weights(model, newest)
    optimizer.load_state_dict(torch.load(newest / "optimizer.pt", weights_only=True, map_location="cpu"))  # noqa: TID251
    if runtime.is_main:
        _cut_log(work.folder / "train_log.jsonl", state.step)
    runtime.say(f"  {work.label}: going on after step {state.step}")
    for earlier in state.validations:
        _watch(work, earlier)
    return state


def _load_weights(model: nn.Module, checkpoint: Path) -> None:
    weights = load_file(checkpoint / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(weights[name])


def _log(runtime: Runtime, work: Work, line: dict[str, Any]) -> None:
    if runtime.is_main:
        with (work.folder / "train_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        _track(work, line, "train")


def _track(work: Work, figures: Mapping[str, float], kind: str) -> None:
    if work.track is not None:
        named = {f"{kind}/{name}": float(value) for name, value in figures.items() if name != "step"}
        work.track(int(figures["step"]), named)


def _cut_log(path: Path, step: int) -> None:
    """Forget steps after the checkpoint; they will be taken, and logged, again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept: Sequence[str] = lines[:step]
    path.write_text("".join(kept), encoding="utf-8")
