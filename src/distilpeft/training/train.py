"""The one training loop: it tunes the teacher and distils the student. `step` is what it repeats.

The order of rows is a pure function of (seed, epoch) and dropout of (seed, step, process), so a checkpoint is
weights, optimizer and a few numbers, and a resumed run ends in the same weights bit for bit. It holds whole tensors,
so another number of processes, or another strategy, goes on from it as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distilpeft.data.batches import epoch_batches
from distilpeft.errors import GateError, InputError, is_out_of_memory
from distilpeft.machine.artifact import LOG, Figures
from distilpeft.machine.runtime import Interrupted, Runtime
from distilpeft.models.parallel import (
    gather_optimizer,
    gather_weights,
    kind,
    load_optimizer,
    load_weights,
    unshard,
    wrap,
)
from distilpeft.models.weights import blocks, tuned
from distilpeft.recipe.task import LOWER_IS_BETTER
from distilpeft.recipe.training import Fit
from distilpeft.training import batch_norm
from distilpeft.training.checkpoints import Checkpoints
from distilpeft.training.loss_spikes import Spikes
from distilpeft.training.step import (
    StepResult,
    Work,
    lr_factor,
    make_optimizer,
    optimizer_step,
    steps_per_epoch,
    total_steps,
)

FIRST_SCALE, SCALE_EVERY = 2.0**16, 2000
"""Of the loss in float16: halved when gradients overflow, doubled after so many steps without (arXiv:1710.03740)."""


@dataclass
class State:
    """Where the loop stands; everything that a checkpoint holds besides tensors."""

    step: int = 0
    rows: int = 0
    seconds: float = 0.0
    precision: str = ""
    micro_batch_size: int | None = None  # after memory was short
    loss_scale: float = 1.0
    clean_steps: int = 0
    best_step: int = 0
    best_value: float | None = None
    bad_validations: int = 0
    plateau_bad: int = 0
    plateau_factor: float = 1.0
    stopped_early: bool = False
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    validations: list[dict[str, float]] = field(default_factory=list)


def train(runtime: Runtime, model: nn.Module, work: Work) -> Figures:
    """Train until the recipe's end, resuming from the newest checkpoint in `work.folder`; changes `model` in place.

    Returns:
        Figures: steps, rows, seconds, rows_per_s, the strategy that was in use, best step and value, all validations,
        `kept`, the one of the weights that are kept: the best or the last, as `fit.keep` says; `skipped_steps` that
        were not finite, `loss_spikes`, see `guards.Spikes`. The main process's model holds the weights; the others' is
        of no use any more if it was sharded.

    Raises:
        GateError: the loss or a gradient is not finite, or an adapter gets no gradient.
        StoppedBySignal: a signal came; a checkpoint was written.
        InputError: the checkpoint was made in another precision; or memory is too small.
    """
    fit = work.fit
    total = total_steps(len(work.lengths_N), fit)
    wrapped = _wrapped(runtime, model, fit)
    strategy = kind(wrapped)
    judged = wrapped if strategy == "fsdp2" else model
    optimizer = make_optimizer(model, work.optim)
    checkpoints = Checkpoints(work.folder, fit.keep_last)
    state = _resume(runtime, work, model, optimizer, checkpoints)
    rises = work.optim.final_ratio > 1  # the rate does, to find where the loss no longer falls: see tune_lr
    spikes = Spikes(work.label, _say_nothing if rises else runtime.say, _losses(work.folder))
    batches: Sequence[NDArray[np.int64]] = []
    epoch = -1
    with runtime.bar(work.label, total, state.step) as bar, runtime.stoppable():
        # untuned: the figure to beat; resumed: what a signal has cut short
        if _validate_if_due(runtime, work, judged, state) is None:
            runtime.stop(f"{work.label} before step {state.step + 1} of {total}")
        while state.step < total and not state.stopped_early:
            begin = time.monotonic()
            at, index = divmod(state.step, steps_per_epoch(len(work.lengths_N), fit))
            if at != epoch:
                epoch, batches = at, epoch_batches(work.lengths_N, fit.batch_size, work.seed, at)
            lr, result = _take_step(runtime, wrapped, optimizer, batches[index], work, state)
            figures = {"lr": lr, "loss": result.loss, "grad_norm": result.grad_norm}
            _log(runtime, work, {"step": state.step, "epoch": at, **figures})
            spikes.see(state.step, result.loss)
            state.seconds += time.monotonic() - begin
            improved = not result.stop and _validate_if_due(runtime, work, judged, state)
            stop = result.stop or improved is None
            if improved or stop or _is_due(fit.save_every, state.step, total):
                _save(runtime, model, optimizer, state, checkpoints)
            if stop:
                runtime.stop(f"{work.label} at step {state.step} of {total}")
            bar.advance(1, "" if result.loss is None else f"loss {result.loss:.4f}")
    if fit.keep == "best":
        load_weights(model, checkpoints.weights(state.best_step))
    if strategy == "fsdp2":
        unshard(runtime, model)
    kept_step = state.best_step if fit.keep == "best" else state.step
    return {
        "steps": state.step,
        "rows": state.rows,
        "seconds": round(state.seconds, 2),
        "rows_per_s": round(state.rows / max(state.seconds, 1e-9), 2),
        "precision": state.precision,
        "parallel": strategy,
        "kept_step": kept_step,
        "kept": next(entry for entry in state.validations if entry["step"] == kept_step),
        "best_value": state.best_value,
        "validations": state.validations,
        "skipped_steps": state.skipped_steps,
        "loss_spikes": spikes.steps,
    }


def _wrapped(runtime: Runtime, model: nn.Module, fit: Fit) -> nn.Module:
    """The model as it is trained: compiled layers, joint statistics, spread over the processes."""
    if fit.compile:
        for block in blocks(model):
            block.compile(dynamic=True)
    batch_norm.convert(runtime, model, fit.batch_norm)
    return wrap(runtime, model)


def _say_nothing(_: str) -> None:
    """For warnings that are not wanted."""


def _take_step(
    runtime: Runtime, wrapped: nn.Module, optimizer: torch.optim.Optimizer, batch: NDArray[np.int64], work: Work,
    state: State,
) -> tuple[float, StepResult]:  # fmt: skip
    """Take the next step at its learning rate, which is returned too, and with its random numbers; moves the state."""
    total = total_steps(len(work.lengths_N), work.fit)
    lr = work.optim.lr * lr_factor(work.optim, state.step, total) * state.plateau_factor
    for group in optimizer.param_groups:
        group["lr"] = lr
    if work.before_step is not None:
        work.before_step(state.step)
    while (result := _try_step(runtime, wrapped, optimizer, batch, work, state)) is None:
        _halve(runtime, wrapped, optimizer, work, state)
    skipped = result.grad_norm is None
    if state.precision == "fp16" and result.loss is not None:
        _adapt_scale(state, skipped=skipped)
    elif skipped:
        state.skipped_steps += 1
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.loss is None else 0
    if state.skipped_in_a_row > MOST_SKIPPED:
        raise GateError(
            f"{work.label}: step {state.step + 1}: {state.skipped_in_a_row} steps in a row were not finite; try a "
            "lower lr or precision: fp32"
        )
    state.step += 1
    state.rows += result.rows
    return lr, result


def _try_step(
    runtime: Runtime, wrapped: nn.Module, optimizer: torch.optim.Optimizer, batch: NDArray[np.int64], work: Work,
    state: State,
) -> StepResult | None:  # fmt: skip
    """`optimizer_step` with the random numbers of this step; None if memory was too small."""
    runtime.seed(work.seed, state.step, runtime.accelerator.process_index)
    try:
        return optimizer_step(
            runtime, wrapped, optimizer, batch, work, state.step,
            loss_scale=state.loss_scale, micro_batch_size=state.micro_batch_size,
        )  # fmt: skip
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def _halve(runtime: Runtime, wrapped: nn.Module, optimizer: torch.optim.Optimizer, work: Work, state: State) -> None:
    """Try the step again with half as many rows at once, which changes no more than rounding.

    Raises:
        InputError: it would change more, or the other processes are in the middle of the step.
    """
    optimizer.zero_grad()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    size = state.micro_batch_size or min(work.fit.micro_batch_size, work.fit.batch_size)
    what = f"{work.label}: step {state.step + 1}: out of memory with micro-batches of {size}"
    if size == 1:
        raise InputError(f"{what} row; try gradient_checkpointing: true, a smaller data.max_tokens or precision: bf16")
    alone = runtime.accelerator.num_processes == 1
    if not alone or batch_norm.Statistics(wrapped).are_trained:
        why = "batch statistics depend on it" if alone else "this cannot be done while other processes wait"
        raise InputError(
            f"{what}; set fit.micro_batch_size to {size // 2} ({why}). Run the same command to resume at "
            "the last checkpoint"
        )
    state.micro_batch_size = size // 2
    runtime.say(f"  {what}; retrying with {size // 2}; the weights are the same up to rounding")


def _adapt_scale(state: State, *, skipped: bool) -> None:
    """Halve float16's loss scale when gradients overflow, double it after many that did not."""
    state.clean_steps = 0 if skipped else state.clean_steps + 1
    if skipped:
        state.loss_scale /= 2
    elif state.clean_steps % SCALE_EVERY == 0:
        state.loss_scale *= 2


def _is_due(every: int, step: int, total: int) -> bool:
    return step % every == 0 or step == total


def _validate_if_due(runtime: Runtime, work: Work, model: nn.Module, state: State) -> bool | None:
    """Validate where it is time to and it has not been done; None if a signal came first, see `_validate`."""
    num_rows = len(work.lengths_N)
    every = work.fit.validate_every or steps_per_epoch(num_rows, work.fit)
    done = bool(state.validations) and state.validations[-1]["step"] == state.step
    if done or not _is_due(every, state.step, total_steps(num_rows, work.fit)):
        return False
    try:
        with runtime.interruptible():
            return _validate(work, model, state)
    except Interrupted:
        return None


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


def _save(
    runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer, state: State, checkpoints: Checkpoints
) -> None:
    """Write a checkpoint; the processes do it together."""
    tensors = gather_weights(runtime, model), gather_optimizer(runtime, optimizer)
    runtime.on_main(lambda: checkpoints.save(state.step, state.best_step, tensors, asdict(state)))


def _resume(
    runtime: Runtime, work: Work, model: nn.Module, optimizer: torch.optim.Optimizer, checkpoints: Checkpoints
) -> State:
    """Load the newest complete checkpoint, or start."""
    precision = runtime.resolve_precision(work.fit.precision)
    content = runtime.on_main(lambda: checkpoints.newest(work.fit.keep == "best", runtime.say))
    if content is None:
        if runtime.is_main:
            (work.folder / LOG).unlink(missing_ok=True)
        return State(precision=precision, loss_scale=FIRST_SCALE if precision == "fp16" else 1.0)
    state = State(**{**content, "micro_batch_size": None})  # memory may be another now
    newest = checkpoints.path(state.step)
    if state.precision != precision:
        raise InputError(
            f"{newest}: this run began in {state.precision}, but fit.precision is {precision} on this machine; "
            f"set the precision in the recipe, or delete {work.folder} to begin again"
        )
    weights = checkpoints.weights(state.step)
    names = sorted(weights.keys() ^ tuned(model).keys())
    if names:
        raise InputError(
            f"{newest}: holds other weights than are trained now, such as {names[0]}: another version of distilpeft "
            f"made it; delete {work.folder} to begin again"
        )
    load_weights(model, weights)
    load_optimizer(optimizer, checkpoints.optimizer(state.step))
    runtime.on_main(lambda: checkpoints.restore_log(state.step))
    runtime.say(f"  {work.label}: resuming after step {state.step}")
    for earlier in state.validations:
        _watch(work, earlier)
    return state


def _log(runtime: Runtime, work: Work, line: dict[str, object]) -> None:
    if runtime.is_main:
        with (work.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        _track(work, line, "train")


def _track(work: Work, figures: Mapping[str, Any], kind: str) -> None:
    if work.track is not None:
        numbers = {name: value for name, value in figures.items() if name != "step" and value is not None}
        metrics = {f"{kind}/{name}": float(value) for name, value in numbers.items()}
        work.track(int(figures["step"]), metrics)


def _losses(folder: Path) -> list[float | None]:
    """The loss of every step so far; what a process that does not write the log sees does not matter."""
    log = folder / LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [json.loads(line)["loss"] for line in lines]


MOST_SKIPPED = 10
"""Steps in a row that may be left out for not being finite."""
