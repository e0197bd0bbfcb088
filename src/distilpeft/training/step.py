"""One optimizer step, on all processes together: what `train` repeats.

The contract. Losses are sums over rows. A step's gradient is the sum over all its rows, on all processes and
micro-batches, divided once by their number. Where some rows have no label, the labels' part is divided by the number of
those that have one. DDP and FSDP2 average gradients over processes, so each process multiplies by the number of
processes. Hence loss and grad_norm do not depend on how rows are split into micro-batches, accumulation and processes.
The wrapped model is always the one called, or nothing would be reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor, nn

from distilpeft.data.batches import micro_batches
from distilpeft.errors import GateError
from distilpeft.machine.runtime import Runtime
from distilpeft.models.parallel import no_sync, norm_of, whole
from distilpeft.models.weights import trainable
from distilpeft.recipe.training import Fit, Optim
from distilpeft.tasks.task import Batch
from distilpeft.training import batch_norm
from distilpeft.training.checkpoints import Checkpoints

Watch = Callable[[float, float], None]
"""(share of all steps that is done, the monitor's value) of each validation of a training."""


FIRST_STEPS = 2
"""In how many steps it is checked that gradients reach every adapter: lora_A gets none in the first, as B is zero."""


@dataclass(frozen=True)
class Work:
    """What the loop is to do.

    Attributes:
        label: for messages, such as `teacher`.
        load_batch: row ids and epoch → collated batch on the CPU.
        loss_sum: (bare model, batch) → loss summed over the rows that count, in nats; called inside the forward of the
            module that is wrapped, so whatever weights it uses are gathered and their gradients reduced.
        count_rows: batch → number of rows that count.
        count_labelled: batch → how many of these have a label; None where all have one.
        validate: bare model, or the `Step` around a sharded one → metrics on the validation rows; equal on all
            processes; `finite` 0 if it has none.
        monitor: the metric that picks the checkpoint.
        folder: where checkpoints and `train_log.jsonl` go.
        track: called with a step and its figures, after every step and every validation; see `tracking`.
        before_step: called with the number of each step, from 0, before it is taken; what it sets is a function of that
            number alone, so that a resumed run goes on as it would have.
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
    count_labelled: Callable[[Batch], int] | None = None
    before_step: Callable[[int], None] | None = None
    watch: Watch | None = None
    track: Callable[[int, Mapping[str, float]], None] | None = None


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


@dataclass(frozen=True)
class StepResult:
    """What one step found.

    Attributes:
        loss: nats per row, the mean over the whole batch; None where it or a gradient was not finite.
        grad_norm: before clipping; None where the step was skipped, so that no weight was changed.
        rows: that the loss counted, on all processes.
        stop: whether any process was asked to stop.
    """

    loss: float | None
    grad_norm: float | None
    rows: int
    stop: bool


def optimizer_step(
    runtime: Runtime, wrapped: nn.Module, optimizer: torch.optim.Optimizer, batch: NDArray[np.int64], work: Work,
    step: int, *, loss_scale: float = 1.0, micro_batch_size: int | None = None,
) -> StepResult:  # fmt: skip
    """Take one optimizer step on the mean loss over every row of `batch`, on all processes.

    The device is waited for once, when all of the step has been queued: whether it is skipped is decided there too.

    Args:
        runtime: the machine.
        wrapped: what `parallel.wrap` made of the model.
        optimizer: of its parameters.
        batch: row ids.
        work: loss and settings.
        step: from 0.
        loss_scale: what the loss is multiplied by in backward, so that float16 gradients do not vanish.
        micro_batch_size: instead of the recipe's.

    Raises:
        GateError: the loss or a gradient is not finite, or an adapter gets no gradient.
    """
    epoch = step // steps_per_epoch(len(work.lengths_N), work.fit)

    def load(ids: NDArray[np.int64]) -> Batch:
        return work.load_batch(ids, epoch)

    loaded, counts = _count(runtime, batch, work, load, micro_batch_size)

    wrapped.train()
    statistics = batch_norm.Statistics(wrapped)
    loss = _accumulate(runtime, wrapped, work, loaded, lambda: load(batch[:1]), counts[0], loss_scale)
    gradients = [parameter.grad for parameter in wrapped.parameters() if parameter.grad is not None]
    norm = norm_of(gradients) / loss_scale
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    if step < FIRST_STEPS and bool(finite) and int(counts[0]):
        _check_gradients(runtime, wrapped, work.label, first=step == 0)

    clip = torch.clamp((work.optim.max_grad_norm or math.inf) / (norm + 1e-6), max=1.0) / loss_scale
    _scale(gradients, clip)
    _step_where(finite, optimizer)
    optimizer.zero_grad()

    figures = torch.stack([loss.double(), norm.double(), *counts[:2].double()]).tolist()
    result = StepResult(figures[0], figures[1], int(figures[2]), bool(figures[3]))
    if math.isfinite(figures[0]) and math.isfinite(figures[1]):
        return result
    if math.isfinite(figures[0]) and loss_scale > 1:  # float16 gradients that overflow; the scale will fall
        return replace(result, grad_norm=None)
    statistics.restore()
    what = f"step {step + 1}: loss {result.loss}, grad_norm {result.grad_norm}"
    _tell_not_finite(runtime, wrapped, batch, (load(batch[at : at + 1]) for at in range(len(batch))), work, what)
    return replace(result, loss=None, grad_norm=None)


def _count(
    runtime: Runtime, batch: NDArray[np.int64], work: Work, load: Callable[[NDArray[np.int64]], Batch],
    micro_batch_size: int | None,
) -> tuple[list[Batch | None], Tensor]:  # fmt: skip
    """This process's micro-batches, None where it has no row left, and [rows of the step, stop] over all processes.

    Where rows may have no label, those that have one are counted, too, and every micro-batch learns of it.
    """
    accelerator = runtime.accelerator
    size = micro_batch_size or work.fit.micro_batch_size
    shares = micro_batches(batch, size, accelerator.process_index, accelerator.num_processes)
    loaded = [load(ids) if len(ids) else None for ids in shares]
    micros = [micro for micro in loaded if micro is not None]
    mine = [sum(map(work.count_rows, micros)), int(runtime.stop_requested)]
    if work.count_labelled is not None:
        mine.append(sum(map(work.count_labelled, micros)))
    total: Tensor = accelerator.reduce(torch.tensor(mine, device=runtime.device), "sum")
    if work.count_labelled is not None:
        for micro in micros:
            micro["label_scale"] = total[0] / total[2].clamp(min=1).double()
    return loaded, total


def _accumulate(
    runtime: Runtime, wrapped: nn.Module, work: Work, loaded: Sequence[Batch | None], any_row: Callable[[], Batch],
    rows: Tensor, loss_scale: float,
) -> Tensor:  # fmt: skip
    """Add up the gradients of all micro-batches; the mean loss over the step's rows on all processes, []."""
    accelerator = runtime.accelerator
    scale = accelerator.num_processes / rows.clamp(min=1).double()
    total = torch.zeros((), device=runtime.device)
    for index, micro in enumerate(loaded):
        with no_sync(wrapped, last=index == len(loaded) - 1):
            if micro is None:  # fewer rows than processes: take part in the reduction with nothing
                with batch_norm.idle(wrapped):
                    loss = wrapped(work.loss_sum, send_to_device(any_row(), runtime.device)) * 0.0
            else:
                loss = wrapped(work.loss_sum, send_to_device(micro, runtime.device))
                loss = loss * scale.to(loss.dtype)
            (loss * loss_scale).backward()
        total += loss.detach()
    mean: Tensor = accelerator.reduce(total, "mean")
    return mean


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply all gradients in place; in half precision the factor must not be rounded to theirs."""
    exact = all(gradient.dtype in (torch.float32, torch.float64) for gradient in gradients)
    torch._foreach_mul_(gradients, factor if exact else float(factor))


def _step_where(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step if the gradients are finite. Fused kernels decide on the device, as they do for GradScaler."""
    if optimizer.param_groups[0].get("fused"):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(finite):  # plain SGD waits for the device
        optimizer.step()


def _tell_not_finite(
    runtime: Runtime, wrapped: nn.Module, batch: NDArray[np.int64], rows: Iterator[Batch], work: Work, what: str
) -> None:
    """Look for the rows that are to blame, one by one, and name them.

    Raises:
        GateError: unless the recipe skips such steps.
    """
    wrapped.eval()
    with torch.no_grad():
        losses_N = [float(wrapped(work.loss_sum, send_to_device(row, runtime.device))) for row in rows]
    bad = batch[~np.isfinite(losses_N)]
    whose = f"training rows {listed(bad)}" if len(bad) else f"no single row of {listed(batch)}, but their gradient"
    whose = f"every row of {listed(batch)}" if len(bad) == len(batch) > 1 else whose
    message = f"{work.label}: {what}: not finite, because of {whose}. No weight was changed by this step"
    if work.fit.on_nonfinite == "skip":
        runtime.say(f"  {message}; it is skipped")
        return
    newest = Checkpoints(work.folder).newest_step()
    last = f"the last good checkpoint is of step {newest}" if newest else "there is no checkpoint yet"
    raise GateError(
        f"{message}; {last}. Try a lower lr, precision: fp32, or without such rows; fit.on_nonfinite: skip leaves such "
        "steps out"
    )


def _check_gradients(runtime: Runtime, wrapped: nn.Module, label: str, *, first: bool) -> None:
    """Every adapter tensor must be reached by the gradient (in the first step lora_A's is zero, because B is).

    Of weights that are trained without an adapter some may be idle, such as a pooler; not all of them.
    """
    trained = trainable(wrapped)
    if all(parameter.grad is None for parameter in trained.values()):
        raise GateError(f"{label}: no gradient reaches any of {len(trained)} tensors: the loss does not depend on them")
    adapters = {name: p for name, p in trained.items() if "lora_" in name}
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


def listed(rows_N: NDArray[np.int64]) -> str:
    """Row ids for a message: the first ten, and how many there are."""
    ids = ", ".join(map(str, rows_N[:10]))
    return ids + (f", ... ({len(rows_N)} rows)" if len(rows_N) > 10 else "")
