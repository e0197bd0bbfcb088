"""`distilpeft tune-lr`: the suggestion from made-up losses, and a real test of both stages."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from support import commands

from distilpeft.errors import GateError
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.training import Optim
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.training.step import lr_factor
from distilpeft.tuning import tune_lr


def rates(count: int = 100, low: float = 1e-6, high: float = 1e-1) -> list[float]:
    return [low * (high / low) ** (step / (count - 1)) for step in range(count)]


def test_the_exponential_schedule_goes_from_the_first_rate_to_its_ratio():
    optim = Optim(lr=1e-5, schedule="exponential", final_ratio=1e4, warmup_ratio=0)
    factors = [lr_factor(optim, step, 11) for step in range(11)]
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(1e4)
    assert [two / one for one, two in itertools.pairwise(factors)] == pytest.approx([10**0.4] * 10)
    assert lr_factor(optim, 0, 1) == 1
    warm = Optim(lr=1.0, schedule="exponential", final_ratio=0.01, warmup_ratio=0.2)
    assert [lr_factor(warm, step, 10) for step in (0, 1, 2, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.01])


def test_the_rate_of_the_steepest_fall_is_suggested():
    falling = [2 - 1 / (1 + math.exp(-6 * (math.log10(rate) + 4))) for rate in rates()]  # most at 1e-4
    rising = [max(0.0, math.log10(rate) + 3) for rate in rates()]
    found = tune_lr.read(rates(), [one + two for one, two in zip(falling, rising, strict=True)])
    assert 5e-4 < rates()[found.lowest] < 2e-3
    assert found.suggestion == pytest.approx(1e-4)
    assert "lowest loss" in found.words


def test_what_comes_after_the_loss_has_burst_is_not_looked_at():
    losses = [2.0 - step / 60 for step in range(60)] + [50.0] * 20 + [0.0] * 20
    found = tune_lr.read(rates(), losses)
    assert 50 <= found.lowest < 62


@pytest.mark.parametrize(
    ("losses", "suggests", "words"),
    [
        ([1.0 + step for step in range(100)], False, "never fell: begin lower, with --low"),
        ([2.0 - step / 100 for step in range(100)], True, "a higher --high may show more"),
    ],
)
def test_a_test_that_began_too_high_or_ended_too_low_says_so(losses, suggests, words):
    found = tune_lr.read(rates(), losses)
    assert (found.suggestion is not None) == suggests
    assert words in found.words


def test_smoothing_neither_lags_nor_bends_the_ends():
    line = [0.1 * step for step in range(100)]
    assert tune_lr.smoothed(line) == pytest.approx(line)
    assert tune_lr.smoothed([3.0] * 5) == pytest.approx([3.0] * 5)


@pytest.mark.parametrize("stage", ["distil", "teacher"])
def test_both_stages_are_tested_by_the_ordinary_loop_and_leave_the_run_as_it_was(tmp_path, capsys, stage):
    recipe = commands.workspace(tmp_path)
    assert commands.run(recipe, "--stage", stage, "--steps", "40", verb="tune-lr") == 0
    told = capsys.readouterr().out
    folder = tmp_path / "runs/tiny"
    found = json.loads((folder / f"tune-lr-{stage}.json").read_text())
    low, high = (1e-5, 1e-1) if stage == "teacher" else (1e-6, 1e-2)
    assert len(found["lr"]) == len(found["loss"]) <= 40
    assert found["lr"][0] == pytest.approx(low)
    assert found["lr"] == pytest.approx(rates(40, low, high)[: len(found["lr"])])
    assert found["suggestion"] is None or f"--set {stage}.optim.lr={found['suggestion']:g}" in told
    kept = {path.name.partition("-")[0] for path in folder.iterdir() if path.is_dir()} - {"cache", ".locks"}
    assert kept <= ({"teacher", "targets"} if stage == "distil" else set()), kept
    if stage == "distil":  # what it needed is what the run needs
        plan = make_plan(load_recipe(recipe), tmp_path / "runs")
        assert plan.artifacts["teacher"].done
        assert plan.artifacts["targets"].done


def test_a_loss_that_is_no_number_ends_the_test_and_is_no_fault(tmp_path, capsys):
    recipe = commands.workspace(tmp_path, distil__optim={"kind": "sgd", "lr": 0.1, "max_grad_norm": None})
    assert commands.run(recipe, "--steps", "30", "--low", "0.01", "--high", "1e30", verb="tune-lr") == 0
    found = json.loads((tmp_path / "runs/tiny/tune-lr-distil.json").read_text())
    assert len(found["lr"]) < 30
    assert "distil:" in capsys.readouterr().out


def test_a_loss_that_rises_as_the_test_wants_is_no_warning(tmp_path, capsys):
    recipe = commands.workspace(tmp_path, distil__optim={"kind": "sgd", "lr": 0.1, "max_grad_norm": None})
    rising = ["--steps", "80", "--low", "0.01", "--high", "1e8"]
    assert commands.run(recipe, *rising, verb="tune-lr") == 0
    said = capsys.readouterr()
    assert "the loss" in said.out
    assert "try a lower lr" not in said.out + said.err


def test_a_fault_of_an_earlier_stage_is_told_though_an_interrupted_test_has_left_a_log(tmp_path, capsys, monkeypatch):
    recipe = commands.workspace(tmp_path)
    left = [{"lr": 1e-6, "loss": 1.0}]
    monkeypatch.setattr(tune_lr, "_log", lambda made: left)

    def fail(*_: object) -> None:
        raise GateError("the tuned teacher is no better than chance")

    monkeypatch.setattr("distilpeft.pipeline.launch.make", fail)
    assert commands.run(recipe, verb="tune-lr") == 3
    assert "the tuned teacher is no better than chance" in capsys.readouterr().err


def test_processes_of_another_launcher_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert commands.run(commands.workspace(tmp_path), verb="tune-lr") == 2
    assert "start it without torchrun" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--low", "0.1", "--high", "0.01"], "--low 0.1 --high 0.01: the test needs to rise"),
        (["--stage", "export"], "--stage export: distil or teacher"),
    ],
)
def test_what_cannot_be_tested_is_refused(tmp_path, capsys, arguments, message):
    assert commands.run(commands.workspace(tmp_path), *arguments, verb="tune-lr") == 2
    assert message in " ".join(capsys.readouterr().err.split())
