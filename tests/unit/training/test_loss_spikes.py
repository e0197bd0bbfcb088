"""A loss that jumps and stays up is reported once; noise is not, and a resumed run remembers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distilpeft.training.loss_spikes import FEWEST, MOST_SAID, RECENT, WINDOW, Spikes
from distilpeft.training.step import listed

NOISE = (0.1, 0.3, 0.45, 0.7)
"""Standard deviations of log losses from step to step, as in logs of this repository's tiny runs in batches of 16:
encoder-decoders 0.3 to 0.45, regression 0.6 to 0.7."""


RECORDED: dict[str, list[float]] = json.loads((Path(__file__).parent / "recorded_losses.json").read_text())
"""The loss of every step of four trainings of this repository's recipes, among the noisiest of 99 recorded."""
NOISY = sorted(set(RECORDED) - {"spam_sms/teacher"})


def seen(losses) -> tuple[list[int], list[str]]:
    """Spikes of a training with these losses, and what it said."""
    said: list[str] = []
    spikes = Spikes("distil", said.append)
    for step, loss in enumerate(losses, 1):
        spikes.see(step, None if loss is None else float(loss))
    return spikes.steps, said


def falling(noise: float, seed: int, steps: int = 180) -> np.ndarray:
    """A loss that falls to a twentieth, with noise that is as large at the end as at the beginning."""
    return np.exp(np.random.default_rng(seed).normal(0, noise, steps) - np.linspace(0, 3, steps))


@pytest.mark.parametrize("noise", [*NOISE, 1.0, 1.5])
def test_healthy_runs_of_180_steps_are_silent_however_small_their_batches(noise):
    """The old rule, five times the median, said three warnings in each with noise of 1."""
    assert [seen(falling(noise, seed)) for seed in range(8)] == [([], [])] * 8


def outliers(losses: np.ndarray) -> int:
    """Steps whose loss is more than five times the median of the fifty before."""
    return sum(losses[at] > 5 * np.median(losses[at - 50 : at]) for at in range(50, len(losses)))


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_recorded_trainings_whose_loss_fell_to_a_hundredth_are_silent(name):
    assert np.median(RECORDED[name][-20:]) < RECORDED[name][0] / 100
    assert seen(RECORDED[name]) == ([], [])
    if name in NOISY:
        assert outliers(np.array(RECORDED[name])) > 30, "a rule for single steps would warn of each"


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_recorded_training_that_diverges_halfway_is_reported_once(name):
    losses = np.array(RECORDED[name])
    half = len(losses) // 2
    losses[half:] *= 1.15 ** np.minimum(np.arange(len(losses) - half), 60)
    steps, said = seen(losses)
    assert len(steps) == len(said) == 1
    assert half < steps[0] <= half + 2 * RECENT


@pytest.mark.parametrize("name", NOISY)
def test_a_jump_in_a_recorded_training_that_comes_back_is_one_event(name):
    losses = np.array(RECORDED[name])
    half = len(losses) // 2
    losses[half : half + 2 * RECENT] *= 30
    steps, said = seen(losses)
    assert len(steps) == len(said) == 1
    assert half < steps[0] <= half + RECENT


def test_single_batches_however_large_are_noise():
    assert seen(([1.0] * 9 + [80.0]) * 20) == ([], [])
    losses = falling(0.3, 1)
    losses[[70, 95, 120, 150]] = 0.9
    assert min(losses[[70, 95, 120, 150]] / np.median(losses[60:])) > 5
    assert seen(losses) == ([], [])


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_triples_for_good_is_reported_once_within_a_few_steps(noise, seed):
    losses = 0.5 * np.exp(np.random.default_rng(seed).normal(0, noise, 300))
    losses[100:] *= 3
    steps, said = seen(losses)
    assert len(said) == len(steps) == 1
    assert 100 < steps[0] <= 100 + 2 * RECENT


def test_a_learning_rate_that_is_too_high_is_reported_once_while_the_loss_climbs():
    steps, said = seen([*falling(0.2, 5, 60), *(0.1 * 1.1 ** np.arange(120))])
    assert len(steps) == len(said) == 1
    assert 60 < steps[0] < 110
    assert len(seen([1.0] * 45 + [10.0] * 130)[0]) == 1, "early, too"


def test_a_second_jump_is_reported_once_the_loss_has_come_back():
    steps, said = seen([1.0] * 60 + [3.0] * 60 + [1.0] * 80 + [4.0] * 40)
    assert len(steps) == 2
    assert 60 < steps[0] <= 80
    assert 200 < steps[1] <= 220
    assert said[0] == (
        f"  distil: step {steps[0]}: the loss has been 3 for 20 steps, 1 before; try a lower lr or a longer warmup"
    )


def test_a_loss_beyond_all_before_is_reported_at_once():
    steps, said = seen([1.0] * FEWEST + [101.0, 1e9, 1e12])
    assert steps == [FEWEST + 1]
    assert said == [
        "  distil: step 21: the loss is 101, more than 100 times any loss before; try a lower lr or a longer warmup"
    ]


def test_the_first_steps_and_steps_that_were_left_out_are_no_measure():
    assert seen([1.0] * (FEWEST - 1) + [1e6] * 5) == ([], [])
    assert seen([0.0] * 40 + [0.1]) == ([], []), "nothing is many times a loss of 0"
    assert seen([1.0] * 60 + [None] * 60 + [1.0] * 20) == ([], [])


def test_a_resumed_run_knows_earlier_jumps_and_does_not_report_them_again():
    losses = [*falling(0.1, 2, WINDOW + RECENT), *[5.0] * 60]
    whole, _ = seen(losses)
    assert len(whole) == 1
    for stop in (60, whole[0] - 1, whole[0], 100):
        said: list[str] = []
        spikes = Spikes("distil", said.append, losses[:stop])
        assert not said
        for step, loss in enumerate(losses[stop:], stop + 1):
            spikes.see(step, loss)
        assert spikes.steps == whole
        assert len(said) == (stop < whole[0])


def test_only_the_first_few_jumps_are_printed():
    steps, said = seen(([1.0] * 60 + [9.0] * 40) * (MOST_SAID + 2))
    assert len(steps) == MOST_SAID + 2
    assert len(said) == MOST_SAID


def test_rows_are_listed_up_to_ten():
    assert listed(np.arange(3)) == "0, 1, 2"
    assert listed(np.arange(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (12 rows)"
