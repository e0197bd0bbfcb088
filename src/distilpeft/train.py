"""The one training loop: it tunes the teacher and distils the student.

The contract. Losses are sums over rows. A step's gradient is the sum over all its rows, on all processes and
micro-batches, divided once by their number. DDP and FSDP2 average gradients over processes, so each process multiplies
by the number of processes. Hence loss and grad_norm do not depend on how rows are split into micro-batches,
accumulation and processes. The wrapped model is always the one called, or nothing would be reduced.

The order of rows is a pure function of (seed, epoch) and dropout of (seed, step, process), so a checkpoint is
weights, optimizer and a few numbers, and a resumed run ends in the same weights bit for bit. It holds whole tensors,
so another number of processes, or another strategy, goes on from it as well.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor, nn

from distilpeft import batch_norm
from distilpeft.checkpoints import LOG, Checkpoints
from distilpeft.data import epoch_batches, micro_batches
from distilpeft.errors import GateError, InputError
from distilpeft.guards import MOST_SKIPPED, Spikes, listed
from distilpeft.kinds import LOWER_IS_BETTER
from distilpeft.models import blocks, trainable, tuned
from distilpeft.outcomes import is_out_of_memory
from distilpeft.parallel import (
    gather_optimizer,
    gather_weights,
    kind,
    load_optimizer,
    load_weights,
    no_sync,
    norm_of,
    unshard,
    whole,
    wrap,
)
from distilpeft.recipe import Fit, Optim
from distilpeft.runtime import Interrupted, Runtime

Batch = dict[str, Any]
FIRST_SCALE, SCALE_EVERY = 2.0**16, 2000
"""Of the loss in float16: halved when gradients overflow, doubled after so many steps without (arXiv:1710.03740)."""
Watch = Callable[[float, float], None]
"""(share of all steps that is done, the monitor's value) of each validation of a training."""


@dataclass(frozen=True)
class Work:
    """What the loop is to do.

    Attributes:
        label: for messages, such as `teacher`.
        load_batch: row ids and epoch → collated batch on the CPU.
        loss_sum: (bare model, batch) → loss summed over the rows that count, in nats; called inside the forward of the
            module that is wrapped, so whatever weights it uses are gathered and their gradients reduced.
        count_rows: batch → number of rows that count.
        validate: bare model, or the `Step` around a sharded one → metrics on the validation rows; equal on all
            processes; `finite` 0 if it has none.
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
    load_batch: Callable[[NDArray[np.int64], int], Batch]
    loss_sum: Callable[[nn.Module, Batch], Tensor]
    count_rows: Callable[[Batch], int]
    validate: Callable[[nn.Module], dict[str, float]]
    folder: Path
    monitor: str = "accuracy"
    watch: Watch | None = None
    track: Callable[[int, Mapping[str, float]], None] | None = None


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
    if optim.schedule == "exponential":
        last = max(1, total - warmup - 1)
        return float(optim.final_ratio ** ((step - warmup) / last))
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
        Figures: steps, rows, seconds, rows_per_s, the strategy that was at work, best step and value, all validations,
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
    spikes = Spikes(work.label, runtime.say, _losses(work.folder))
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
            figures = _take_step(runtime, wrapped, optimizer, batches[index], work, state)
            stop = figures.pop("stop")
            _log(runtime, work, {"step": state.step, "epoch": at, **figures})
            spikes.see(state.step, figures["loss"])
            state.seconds += time.monotonic() - begin
            improved = not stop and _validate_if_due(runtime, work, judged, state)
            stop = stop or improved is None
            if improved or stop or _is_due(fit.save_every, state.step, total):
                _save(runtime, model, optimizer, state, checkpoints)
            if stop:
                runtime.stop(f"{work.label} at step {state.step} of {total}")
            bar.advance(1, "" if figures["loss"] is None else f"loss {figures['loss']:.4f}")
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
        "kept": next(one for one in state.validations if one["step"] == kept_step),
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


def _take_step(
    runtime: Runtime, wrapped: nn.Module, optimizer: torch.optim.Optimizer, batch: NDArray[np.int64], work: Work,
    state: State,
) -> dict[str, Any]:  # fmt: skip
    """Take the next step at its learning rate and with its random numbers; moves the state on."""
    total = total_steps(len(work.lengths_N), work.fit)
    lr = work.optim.lr * lr_factor(work.optim, state.step, total) * state.plateau_factor
    for group in optimizer.param_groups:
        group["lr"] = lr
    while (figures := _try_step(runtime, wrapped, optimizer, batch, work, state)) is None:
        _halve(runtime, wrapped, optimizer, work, state)
    skipped = figures["grad_norm"] is None
    if state.precision == "fp16" and figures["loss"] is not None:
        _adapt_scale(state, skipped=skipped)
    elif skipped:
        state.skipped_steps += 1
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if figures["loss"] is None else 0
    if state.skipped_in_a_row > MOST_SKIPPED:
        raise GateError(
            f"{work.label}: step {state.step + 1}: {state.skipped_in_a_row} steps in a row were not finite; try a "
            "lower lr or precision: fp32"
        )
    state.step += 1
    state.rows += figures.pop("rows")
    return {"lr": lr, **figures}


def _try_step(
    runtime: Runtime, wrapped: nn.Module, optimizer: torch.optim.Optimizer, batch: NDArray[np.int64], work: Work,
    state: State,
) -> dict[str, Any] | None:  # fmt: skip
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
    here = f"{work.label}: step {state.step + 1}: out of memory with micro-batches of {size}"
    if size == 1:
        raise InputError(f"{here} row; try gradient_checkpointing: true, a smaller data.max_tokens or precision: bf16")
    alone = runtime.accelerator.num_processes == 1
    if not alone or batch_norm.Statistics(wrapped).are_trained:
        why = "batch statistics depend on it" if alone else "this cannot be done while other processes wait"
        raise InputError(
            f"{here}; set fit.micro_batch_size to {size // 2} ({why}). The same command goes on from the last "
            "checkpoint"
        )
    state.micro_batch_size = size // 2
    runtime.say(f"  {here}; going on with {size // 2}, to the same weights but for rounding")


def optimizer_step(
    runtime: Runtime, wrapped: nn.Module, optimizer: torch.optim.Optimizer, batch: NDArray[np.int64], work: Work,
    step: int, *, loss_scale: float = 1.0, micro_batch_size: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Take one optimizer step on the mean loss over every row of `batch`, on all processes.

    Args:
        runtime: the machine.
        wrapped: what `parallel.wrap` made of the model.
        optimizer: of its parameters.
        batch: row ids.
        work: loss and settings.
        step: from 0.
        loss_scale: what the loss is multiplied by in backward, so that float16 gradients do not vanish.
        micro_batch_size: instead of the recipe's.

    Returns:
        loss (nats per row, the mean over the whole batch; None where it or a gradient was not finite and the step was
        skipped), grad_norm (before clipping; None where that was so, or float16 gradients were too large, and no
        weight was changed), rows, and whether any process was asked to stop.

    Raises:
        GateError: the loss or a gradient is not finite, or an adapter gets no gradient.
    """
    accelerator = runtime.accelerator
    size = micro_batch_size or work.fit.micro_batch_size
    shares = micro_batches(batch, size, accelerator.process_index, accelerator.num_processes)
    epoch = step // steps_per_epoch(len(work.lengths_N), work.fit)
    loaded = [work.load_batch(ids, epoch) if len(ids) else None for ids in shares]
    mine = sum(work.count_rows(micro) for micro in loaded if micro is not None)
    counts = torch.tensor([mine, int(runtime.stop_requested)], device=runtime.device)
    rows, stop = (int(count) for count in accelerator.reduce(counts, "sum"))
    scale = accelerator.num_processes / max(rows, 1)
    total = torch.zeros((), device=runtime.device)
    wrapped.train()
    statistics = batch_norm.Statistics(wrapped)
    for index, micro in enumerate(loaded):
        with no_sync(wrapped, last=index == len(loaded) - 1):
            if micro is None:  # fewer rows than processes: take part in the reduction with nothing
                with batch_norm.idle(wrapped):
                    any_row = send_to_device(work.load_batch(batch[:1], epoch), runtime.device)
                    loss = wrapped(work.loss_sum, any_row) * 0.0
            else:
                loss = wrapped(work.loss_sum, send_to_device(micro, runtime.device)) * scale
            (loss * loss_scale).backward()
        total += loss.detach()
    gradients = [parameter.grad for parameter in wrapped.parameters() if parameter.grad is not None]
    norm = norm_of(gradients) / loss_scale
    loss_mean, grad_norm = float(accelerator.reduce(total, "mean")), float(norm)
    if math.isfinite(loss_mean) and not math.isfinite(grad_norm) and loss_scale > 1:
        optimizer.zero_grad()
        return {"loss": loss_mean, "grad_norm": None, "rows": rows, "stop": bool(stop)}
    if not (math.isfinite(loss_mean) and math.isfinite(grad_norm)):
        optimizer.zero_grad()
        statistics.restore()
        one_by_one = (work.load_batch(batch[at : at + 1], epoch) for at in range(len(batch)))
        what = f"step {step + 1}: loss {loss_mean}, grad_norm {grad_norm}"
        _tell_not_finite(runtime, wrapped, batch, one_by_one, work, what)
        return {"loss": None, "grad_norm": None, "rows": rows, "stop": bool(stop)}
    if step < 2 and rows:
        _check_gradients(runtime, wrapped, work.label, first=step == 0)
    factor = torch.clamp((work.optim.max_grad_norm or math.inf) / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(gradients, float(factor) / loss_scale)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss_mean, "grad_norm": grad_norm, "rows": rows, "stop": bool(stop)}


def _tell_not_finite(
    runtime: Runtime, wrapped: nn.Module, batch: NDArray[np.int64], rows: Iterator[Batch], work: Work, what: str
) -> None:
    """Look for the rows that are to blame, one by one, and name them.

    Raises:
        GateError: unless the recipe skips such steps.
    """
    wrapped.eval()
    with torch.no_grad():
        losses_N = [float(wrapped(work.loss_sum, send_to_device(one, runtime.device))) for one in rows]
    bad = batch[~np.isfinite(losses_N)]
    whose = f"training rows {listed(bad)}" if len(bad) else f"no single row of {listed(batch)}, but their gradient"
    whose = f"every row of {listed(batch)}" if len(bad) == len(batch) > 1 else whose
    message = f"{work.label}: {what}: not finite, because of {whose}. No weight was changed by this step"
    if work.fit.on_nonfinite == "skip":
        runtime.say(f"  {message}; it is skipped")
        return
    newest = Checkpoints(work.folder).newest_step()
    kept = f"the last good checkpoint is of step {newest}" if newest else "there is no checkpoint yet"
    raise GateError(
        f"{message}; {kept}. Try a lower lr, precision: fp32, or without such rows; fit.on_nonfinite: skip leaves such "
        "steps out"
    )


def _adapt_scale(state: State, *, skipped: bool) -> None:
    """Halve float16's loss scale when gradients overflow, double it after many that did not."""
    state.clean_steps = 0 if skipped else state.clean_steps + 1
    if skipped:
        state.loss_scale /= 2
    elif state.clean_steps % SCALE_EVERY == 0:
        state.loss_scale *= 2


def _check_gradients(runtime: Runtime, wrapped: nn.Module, label: str, *, first: bool) -> None:
    """Every adapter tensor must be reached by the gradient (in the first step lora_A's is zero, because B is)."""
    adapters = {name: p for name, p in trainable(wrapped).items() if "lora_" in name}
    if not adapters:
        return
    reached = [
        p.grad is not None and ((first and "lora_A" in name) or bool(whole(p.grad).any()))
        for name, p in adapters.items()
    ]
    deaf = [
        name.removeprefix("module.").removeprefix("model.")
        for name, is_reached in zip(adapters, reached, strict=True)
        if not is_reached
    ]
    if deaf:
        raise GateError(
            f"{label}: no gradient reaches {len(deaf)} adapter tensors, such as {deaf[0]}; "
            "name the modules that take part in lora.target_modules"
        )


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
    """Load the newest whole checkpoint, or start."""
    precision = runtime.resolve_precision(work.fit.precision)
    found = runtime.on_main(lambda: checkpoints.newest(work.fit.keep == "best", runtime.say))
    if found is None:
        if runtime.is_main:
            (work.folder / LOG).unlink(missing_ok=True)
        return State(precision=precision, loss_scale=FIRST_SCALE if precision == "fp16" else 1.0)
    state = State(**{**found, "micro_batch_size": None})  # memory may be another now
    newest = checkpoints.path(state.step)
    if state.precision != precision:
        raise InputError(
            f"{newest}: this run began in {state.precision}, but fit.precision is {precision} on this machine; "
            f"set the precision in the recipe, or delete {work.folder} to begin again"
        )
    weights = checkpoints.weights(state.step)
    other = sorted(weights.keys() ^ tuned(model).keys())
    if other:
        raise InputError(
            f"{newest}: holds other weights than are trained now, such as {other[0]}: another version of distilpeft "
            f"made it; delete {work.folder} to begin again"
        )
    load_weights(model, weights)
    load_optimizer(optimizer, checkpoints.optimizer(state.step))
    runtime.on_main(lambda: checkpoints.restore_log(state.step))
    runtime.say(f"  {work.label}: going on after step {state.step}")
    for earlier in state.validations:
        _watch(work, earlier)
    return state


def _log(runtime: Runtime, work: Work, line: dict[str, Any]) -> None:
    if runtime.is_main:
        with (work.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        _track(work, line, "train")


def _track(work: Work, figures: Mapping[str, Any], kind: str) -> None:
    if work.track is not None:
        known = {name: value for name, value in figures.items() if name != "step" and value is not None}
        named = {f"{kind}/{name}": float(value) for name, value in known.items()}
        work.track(int(figures["step"]), named)


def _losses(folder: Path) -> list[float | None]:
    """The loss of every step so far; what a process that does not write the log sees does not matter."""
    log = folder / LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [json.loads(line)["loss"] for line in lines]
