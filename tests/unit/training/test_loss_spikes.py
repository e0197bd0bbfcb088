"""A loss that jumps and stays up is reported once; noise is not, and a resumed run remembers."""

from __future__ import annotations

import numpy as np
import pytest

from distilpeft.training.loss_spikes import MOST_SAID, RECENT, WINDOW, Spikes
from distilpeft.training.step import listed


def seen(losses):
    """Spikes of a training with these losses, and what it said."""
    said: list[str] = []
    spikes = Spikes("distil", said.append)
    for step, loss in enumerate(losses, 1):
        spikes.see(step, loss)
    return spikes.steps, said


def test_a_loss_that_jumps_and_stays_is_reported_once_with_its_first_step():
    steps, said = seen([1.0] * WINDOW + [3.0] * 200)
    assert steps == [WINDOW + 1]
    assert said == [
        "  distil: step 51: the loss jumped to 3, from 1 in the 50 steps before, and stayed there; try a lower lr or a "
        "longer warmup"
    ]


def test_a_loss_that_diverges_bit_by_bit_is_reported():
    rng = np.random.default_rng(1)
    healthy = 2 * np.exp(rng.normal(0, 0.2, 100))
    rising = 2 * np.exp(np.linspace(0, 4, 60) + rng.normal(0, 0.2, 60))
    steps, said = seen([*healthy, *rising])
    assert len(steps) == len(said) == 1
    assert 100 < steps[0] <= 130


@pytest.mark.parametrize("spread", [0.3, 0.8, 1.5])
@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_training_of_180_noisy_steps_is_silent(seed, spread):
    """A loss that falls to a hundredth, of batches whose losses differ by e^spread; 4 was the old count of warnings."""
    rng = np.random.default_rng(seed)
    losses = 2 * np.exp(np.linspace(0, -4.6, 180) + rng.normal(0, spread, 180))
    assert seen(losses.tolist()) == ([], [])


def test_single_batches_however_large_are_noise():
    losses = ([1.0] * 9 + [80.0]) * 20
    assert seen(losses) == ([], [])


def test_a_loss_that_comes_back_and_jumps_again_is_reported_again_but_not_for_ever():
    steps, said = seen([1.0] * WINDOW + ([5.0] * 10 + [1.0] * WINDOW) * 6)
    assert steps == [WINDOW + 1 + (WINDOW + 10) * round_ for round_ in range(6)]
    assert len(said) == MOST_SAID


def test_the_first_steps_and_steps_that_were_left_out_are_no_measure():
    assert seen([1.0] * (WINDOW - 1) + [100.0] * RECENT + [None] * 9) == ([], [])


def test_a_resumed_run_knows_earlier_spikes_and_does_not_report_them_again():
    losses = [1.0] * WINDOW + [50.0] * RECENT + [1.0] * 9
    said: list[str] = []
    spikes = Spikes("distil", said.append, losses)
    assert (spikes.steps, said) == ([51], [])
    for step in range(65, 75):
        spikes.see(step, 70.0)
    assert spikes.steps == [51, 65]
    assert len(said) == 1


def test_rows_are_listed_up_to_ten():
    assert listed(np.arange(3)) == "0, 1, 2"
    assert listed(np.arange(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (12 rows)"
