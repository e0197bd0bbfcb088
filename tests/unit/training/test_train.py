"""The loop's parts, by hand: schedules, plateau, early stopping, and the guards against silent failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distilpeft.errors import GateError, InputError, StoppedBySignal
from distilpeft.machine.runtime import Runtime
from distilpeft.models.parallel import wrap
from distilpeft.recipe.training import Fit, Optim
from distilpeft.training import train as train_module
from distilpeft.training.step import Work, lr_factor, make_optimizer, optimizer_step, total_steps
from distilpeft.training.train import State, _validate, train

FIT = Fit(epochs=2, batch_size=4, micro_batch_size=2, precision="fp32")


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime()


def work(folder: Path, optim: Optim, fit: Fit = FIT, **changes: object) -> Work:
    inputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    settings = {
        "label": "test",
        "fit": fit,
        "optim": optim,
        "seed": 0,
        "lengths_N": np.ones(10, dtype=np.int32),
        "load_batch": lambda ids, _: {"x": inputs[ids]},
        "loss_sum": lambda model, batch: model(batch["x"]).square().sum(),
        "count_rows": lambda batch: len(batch["x"]),
        "validate": lambda _: {"accuracy": 0.5, "log_loss": 1.0},
        "folder": folder,
    }
    return Work(**(settings | changes))


def test_total_steps_count_the_smaller_last_batch_and_stop_at_max_steps():
    assert total_steps(10, FIT) == 6
    assert total_steps(10, FIT.model_copy(update={"max_steps": 4})) == 4


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("reduce_on_plateau", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_rises_for_the_warmup_and_falls_as_the_schedule_says(schedule, expected):
    optim = Optim(lr=1, schedule=schedule, warmup_ratio=1 / 3)
    assert [lr_factor(optim, step, 6) for step in range(6)] == pytest.approx(expected, abs=1e-6)


def test_weight_decay_spares_vectors():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = make_optimizer(model, Optim(lr=1, weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.1, [2]),
        (0.0, [1] * 3),
    ]


def test_the_plateau_cuts_the_rate_after_its_patience_and_early_stopping_ends_the_fit(tmp_path):
    values = iter([0.5, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7, 0.7])
    optim = Optim(lr=1, schedule="reduce_on_plateau", plateau_factor=0.1, plateau_patience=1)
    fit = FIT.model_copy(update={"early_stopping_patience": 3})
    job = work(tmp_path, optim, fit, validate=lambda _: {"accuracy": next(values)})
    state, seen = State(), []
    for step in range(1, 9):
        state.step = step
        _validate(job, nn.Identity(), state)
        seen.append((state.best_step, round(state.plateau_factor, 6), state.stopped_early))
    assert seen[:5] == [(1, 1, False), (2, 1, False), (2, 1, False), (2, 0.1, False), (5, 0.1, False)]
    assert seen[5:] == [(5, 0.1, False), (5, 0.01, False), (5, 0.01, True)]


def test_a_monitor_of_which_less_is_better_picks_the_smallest(tmp_path):
    values = iter([0.9, 0.4, 0.6])
    job = work(tmp_path, Optim(lr=1), monitor="log_loss", validate=lambda _: {"log_loss": next(values)})
    state = State()
    for step in (1, 2, 3):
        state.step = step
        _validate(job, nn.Identity(), state)
    assert (state.best_step, state.best_value) == (2, 0.4)


@pytest.mark.parametrize(("keep", "expected"), [("best", 3), ("last", 6)])
def test_the_best_or_the_last_weights_are_kept(tmp_path, runtime, keep, expected):
    history: dict[int, torch.Tensor] = {}
    model = nn.Linear(3, 2)

    def validate(bare: nn.Module) -> dict[str, float]:
        history[len(history) * 3] = bare.weight.detach().clone()
        return {"accuracy": {0: 0.1, 3: 0.9, 6: 0.3}[(len(history) - 1) * 3]}

    fit = FIT.model_copy(update={"keep": keep})
    found = train(runtime, model, work(tmp_path, Optim(lr=0.1), fit, validate=validate))
    assert found["kept_step"] == expected
    assert torch.equal(model.weight, history[expected])


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path):
    found = iter([{"finite": 0.0}, {"finite": 1.0, "accuracy": 0.1}, {"finite": 0.0}])
    job = work(tmp_path, Optim(lr=1), validate=lambda _: next(found))
    state = State()
    for step in (1, 2, 3):
        state.step = step
        _validate(job, nn.Identity(), state)
    assert (state.best_step, state.best_value) == (2, 0.1)


def test_a_step_without_any_counted_row_changes_nothing_and_is_not_nan(tmp_path, runtime):
    """Trap 19."""
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    job = work(
        tmp_path,
        Optim(lr=1, kind="sgd"),
        count_rows=lambda _: 0,
        loss_sum=lambda model, batch: model(batch["x"]).sum() * 0,
    )
    figures = optimizer_step(runtime, wrap(runtime, model), make_optimizer(model, job.optim), np.arange(4), job, 5)
    assert figures.loss == figures.grad_norm == 0
    assert torch.equal(model.weight, before)


def test_an_adapter_that_no_gradient_reaches_stops_the_run(tmp_path, runtime):
    """Trap 27: the loss would stand still without an error."""
    model = nn.Linear(3, 2)
    model.lora_B = nn.Parameter(torch.zeros(2))
    job = work(tmp_path, Optim(lr=1))
    with pytest.raises(GateError, match="no gradient reaches 1 adapter tensors, such as lora_B"):
        optimizer_step(runtime, wrap(runtime, model), make_optimizer(model, job.optim), np.arange(4), job, 0)


def test_a_loss_that_depends_on_no_weight_stops_the_run(tmp_path, runtime):
    model = nn.Linear(3, 2)
    detached = torch.ones((), requires_grad=True)
    job = work(tmp_path, Optim(lr=1), loss_sum=lambda model, batch: detached * len(batch["x"]))
    with pytest.raises(GateError, match="no gradient reaches any of 2 tensors: the loss does not depend on them"):
        optimizer_step(runtime, wrap(runtime, model), make_optimizer(model, job.optim), np.arange(4), job, 0)


def test_a_step_that_is_not_finite_changes_no_weight(tmp_path, runtime):
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    job = work(tmp_path, Optim(lr=1), loss_sum=lambda model, batch: model(batch["x"]).sum() * float("inf"))
    with pytest.raises(GateError, match=r"step 6: loss .*not finite, because of every row of 0, 1, 2, 3"):
        optimizer_step(runtime, wrap(runtime, model), make_optimizer(model, Optim(lr=1)), np.arange(4), job, 5)
    assert torch.equal(model.weight, before)


class Waits(TorchDispatchMode):
    """Takes down the optimizer's kernel, and every read of a tensor's value, for which a device is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "_fused_adamw_", "is_nonzero"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device_before_the_step_is_queued(tmp_path, runtime):
    model = nn.Linear(3, 2)
    job = work(tmp_path, Optim(lr=0.1, max_grad_norm=0.01))
    optimizer = make_optimizer(model, job.optim)
    with Waits() as waits:
        result = optimizer_step(runtime, wrap(runtime, model), optimizer, np.arange(4), job, 5)
    assert set(waits.found) == {"_fused_adamw_"}
    assert result.grad_norm > 0


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_skipped_step_leaves_weights_and_optimizer_as_if_it_had_not_been(tmp_path, runtime, kind):
    def stepped(losses):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        fit = FIT.model_copy(update={"on_nonfinite": "skip"})
        optim = Optim(lr=0.1, kind=kind, weight_decay=0.1)
        optimizer = make_optimizer(model, optim)
        for scale in losses:
            job = work(tmp_path, optim, fit, loss_sum=lambda bare, batch, by=scale: bare(batch["x"]).sum() * by)
            optimizer_step(runtime, wrap(runtime, model), optimizer, np.arange(4), job, 5)
        return model.weight.detach()

    assert torch.equal(stepped([1.0, float("nan"), 2.0]), stepped([1.0, 2.0]))
    assert not torch.equal(stepped([1.0, 2.0]), stepped([1.0]))


def poisoned(row: int):
    """A loss that is not a number for one row, of which the batch tells the others nothing."""

    def load_batch(ids: np.ndarray, _: int) -> dict[str, torch.Tensor]:
        inputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
        inputs[row] = float("nan")
        return {"x": inputs[ids]}

    return load_batch


def test_the_row_that_spoils_a_step_is_named_and_the_last_good_checkpoint(tmp_path, runtime):
    fit = FIT.model_copy(update={"save_every": 1})
    with pytest.raises(GateError, match=r"of training rows 7\. .* (checkpoint is of step \d|no checkpoint)"):
        train(runtime, nn.Linear(3, 2), work(tmp_path, Optim(lr=0.1), fit, load_batch=poisoned(7)))


def test_steps_that_are_not_finite_are_left_out_and_counted_if_the_recipe_says_so(tmp_path, runtime, capfd):
    """The others are those of a run in which their batch does not exist."""
    fit = FIT.model_copy(update={"on_nonfinite": "skip", "keep": "last"})
    model = nn.Linear(3, 2)
    found = train(runtime, model, work(tmp_path, Optim(lr=0.1), fit, load_batch=poisoned(7)))
    lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert found["skipped_steps"] == 2, "row 7 comes once in each of two epochs"
    assert [line["loss"] is None for line in lines] == [line["grad_norm"] is None for line in lines]
    assert sum(line["loss"] is None for line in lines) == 2
    assert torch.isfinite(model.weight).all()
    assert capfd.readouterr().err.count("because of training rows 7") == 2


def test_statistics_of_batch_norm_are_as_before_a_step_that_is_left_out(tmp_path, runtime):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    fit = FIT.model_copy(update={"on_nonfinite": "skip", "keep": "last"})
    train(runtime, model, work(tmp_path, Optim(lr=0.1), fit, load_batch=poisoned(2)))
    assert torch.isfinite(model[1].running_mean).all()
    assert float(model[1].running_var.min()) > 0


def test_a_run_of_which_no_step_is_finite_stops_although_it_may_skip(tmp_path, runtime):
    fit = FIT.model_copy(update={"on_nonfinite": "skip", "epochs": 20})
    job = work(tmp_path, Optim(lr=0.1), fit, loss_sum=lambda model, batch: model(batch["x"]).sum() * float("nan"))
    with pytest.raises(GateError, match=r"step 11: 11 steps in a row were not finite"):
        train(runtime, nn.Linear(3, 2), job)


def short_of_memory(most: int, raised: type[BaseException] = RuntimeError):
    """A loss that needs memory for more rows than there is."""

    def loss_sum(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(batch["x"]) > most:
            raise raised("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
        return model(batch["x"]).square().sum()

    return loss_sum


@pytest.mark.parametrize("raised", [RuntimeError, torch.OutOfMemoryError, MemoryError])
def test_when_memory_is_short_micro_batches_are_halved_and_the_trajectory_is_the_same(tmp_path, runtime, raised, capfd):
    found = []
    for most in (1, 4):
        torch.manual_seed(0)
        fit = FIT.model_copy(update={"micro_batch_size": 4})
        model = nn.Linear(3, 2)
        job = work(tmp_path / str(most), Optim(lr=0.1, kind="sgd"), fit, loss_sum=short_of_memory(most, raised))
        job.folder.mkdir()
        train(runtime, model, job)
        lines = [json.loads(line) for line in (job.folder / "train_log.jsonl").read_text().splitlines()]
        found.append([number for line in lines for number in (line["loss"], line["grad_norm"])])
        found[-1] += model.weight.flatten().tolist()
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    said = capfd.readouterr().err
    assert "step 1: out of memory with micro-batches of 4; retrying with 2" in said
    assert said.count("retrying with") == 2, "it stays at 1 from then on"


def test_what_does_not_fit_at_all_and_what_depends_on_the_micro_batch_is_told(tmp_path, runtime):
    with pytest.raises(InputError, match=r"step 1: out of memory with micro-batches of 1 row; try gradient_check"):
        train(runtime, nn.Linear(3, 2), work(tmp_path, Optim(lr=0.1), loss_sum=short_of_memory(0)))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(InputError, match=r"set fit.micro_batch_size to 1 \(batch statistics depend on it\)"):
        train(runtime, model, work(tmp_path, Optim(lr=0.1), loss_sum=short_of_memory(1)))


def test_an_error_that_is_not_for_want_of_memory_is_not_tried_again(tmp_path, runtime):
    def loss_sum(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(runtime, nn.Linear(3, 2), work(tmp_path, Optim(lr=0.1), loss_sum=loss_sum))


def test_a_signal_in_a_validation_leaves_a_checkpoint_before_it_and_the_same_end(tmp_path, runtime):
    """However long a validation takes, the machine may be gone in half a minute."""

    def run(folder: Path, stop_at: int | None) -> tuple[list[dict[str, float]], torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        calls = iter(range(100))

        def validate(bare: nn.Module) -> dict[str, float]:
            if next(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            machine.leave_if_asked(0)
            return {"accuracy": float(bare.weight.detach().sum())}

        folder.mkdir(exist_ok=True)
        machine = Runtime()
        found = train(machine, model, work(folder, Optim(lr=0.1), validate=validate))
        return found["validations"], model.weight.detach()

    undisturbed = run(tmp_path / "whole", None)
    with pytest.raises(StoppedBySignal, match="stopped test before step 1 of 6"):
        run(tmp_path / "cut", 0)
    with pytest.raises(StoppedBySignal, match="stopped test at step 3 of 6"):
        run(tmp_path / "cut", 1)
    with pytest.raises(StoppedBySignal, match="stopped test at step 6 of 6"):
        run(tmp_path / "cut", 1)
    resumed = run(tmp_path / "cut", None)
    assert resumed[0] == undisturbed[0]
    assert torch.equal(resumed[1], undisturbed[1])


def test_random_numbers_differ_between_steps_and_processes_and_repeat_in_a_second_run(tmp_path, runtime, monkeypatch):
    """Dropout is a function of (seed, step, process): one mask for all steps would always drop the same units."""

    def drawn(process: int) -> list[float]:
        found: list[float] = []

        def loss_sum(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            found.append(torch.rand(()).item())
            return model(batch["x"]).square().sum()

        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        monkeypatch.setattr(type(runtime.accelerator), "process_index", process)
        fit = FIT.model_copy(update={"keep": "last"})
        train(runtime, nn.Linear(3, 2), work(folder, Optim(lr=0.1), fit, loss_sum=loss_sum))
        return found

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first == again
    assert len(set(first)) == len(first)
    assert not set(first) & set(other)


def test_float16_gradients_that_overflow_change_nothing_and_the_scale_falls_until_they_fit(tmp_path, runtime):
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    job = work(tmp_path, Optim(lr=1), loss_sum=lambda model, batch: model(batch["x"]).square().sum() * 1e16)
    optimizer, state = make_optimizer(model, job.optim), State(precision="fp16", loss_scale=65536.0)
    found = []
    for _ in range(40):
        figures = optimizer_step(
            runtime, wrap(runtime, model), optimizer, np.arange(4), job, 5, loss_scale=state.loss_scale
        )
        found.append((figures.grad_norm, torch.equal(model.weight, before)))
        if figures.grad_norm is not None:
            break
        train_module._adapt_scale(state, skipped=True)
    assert len(found) > 3
    assert all(same for norm, same in found if norm is None)
    assert not found[-1][1], "at last a step was taken"
    assert figures.grad_norm > 1e14


def test_a_loss_scale_changes_neither_loss_nor_norm_nor_step(tmp_path, runtime):
    found = []
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        job = work(tmp_path, Optim(lr=0.1, kind="sgd", max_grad_norm=0.01))
        figures = optimizer_step(
            runtime, wrap(runtime, model), make_optimizer(model, job.optim), np.arange(4), job, 5, loss_scale=scale
        )
        found.append((figures.loss, figures.grad_norm, *model.weight.flatten().tolist()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_scale_doubles_after_many_clean_steps():
    state = State(precision="fp16", loss_scale=8.0)
    for _ in range(train_module.SCALE_EVERY):
        train_module._adapt_scale(state, skipped=False)
    assert state.loss_scale == 16.0


def test_a_fit_in_float16_logs_its_skipped_steps_and_goes_on_with_its_scale(tmp_path, runtime):
    fit = FIT.model_copy(update={"precision": "fp16", "keep": "last", "save_every": 1})
    growing = iter([1e38, *[1.0] * 100])
    job = work(
        tmp_path, Optim(lr=0.01), fit, loss_sum=lambda model, batch: model(batch["x"]).square().sum() * next(growing)
    )
    train(runtime, nn.Linear(3, 2), job)
    lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] is None for line in lines] == [True] + [False] * 5
    state = json.loads((tmp_path / "checkpoints" / "step-00000006" / "state.json").read_text())["state"]
    assert (state["loss_scale"], state["clean_steps"]) == (2.0**15, 5)


class Block(nn.Module):
    """torch.compile leaves a plain nn.Sequential as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(hidden))


@pytest.mark.filterwarnings("ignore")  # torch.compile's own, which as errors would break it
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_layers_give_the_same_training(tmp_path, runtime):
    from torch._dynamo.utils import counters

    def losses(folder: Path, *, compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.ModuleList(Block() for _ in range(2)), nn.Linear(3, 2))
        folder.mkdir()

        def loss_sum(bare: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            hidden = batch["x"]
            for block in bare[0]:
                hidden = block(hidden)
            return bare[1](hidden).square().sum()

        fit = FIT.model_copy(update={"compile": compiled})
        train(runtime, model, work(folder, Optim(lr=0.1), fit, loss_sum=loss_sum))
        return [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]

    counters.clear()
    plain = losses(tmp_path / "plain", compiled=False)
    assert counters["stats"]["unique_graphs"] == 0
    assert losses(tmp_path / "compiled", compiled=True) == pytest.approx(plain, rel=1e-5)
    assert counters["stats"]["unique_graphs"] > 0


def test_tf32_is_refused_where_there_is_none(runtime):
    if runtime.device.type != "cuda":
        with pytest.raises(InputError, match="precision: tf32 is for NVIDIA GPUs"):
            runtime.resolve_precision("tf32")


def test_a_checkpoint_of_other_weights_is_refused_by_name(runtime, tmp_path):
    """Such as one of another version, that trained what is not trained now."""
    given = work(tmp_path, Optim(lr=0.1), FIT.model_copy(update={"max_steps": 1, "keep": "last"}))
    train(runtime, nn.Linear(3, 2), given)
    fixed = nn.Linear(3, 2)
    fixed.bias.requires_grad_(False)
    with pytest.raises(InputError, match=r"holds other weights than are trained now, such as bias: another version"):
        train(runtime, fixed, given)
