"""Losses that jump are told, once the usual is known, and as well after a resumption."""

from __future__ import annotations

import numpy as np

from distilpeft.training.loss_spikes import FACTOR, MOST_TOLD, WINDOW, Spikes
from distilpeft.training.step import listed


def test_a_loss_far_above_the_usual_is_told_and_one_below_the_factor_is_not():
    said: list[str] = []
    spikes = Spikes("distil", said.append, [1.0] * WINDOW)
    spikes.see(WINDOW + 1, FACTOR * 0.99)
    spikes.see(WINDOW + 2, FACTOR * 1.01)
    assert spikes.steps == [WINDOW + 2]
    assert said == [
        "  distil: step 52: the loss jumped to 5.05, from 1 in the 50 steps before; if it stays there, try a lower lr "
        "or a longer warmup"
    ]


def test_the_first_steps_and_steps_that_were_left_out_are_no_measure():
    spikes = Spikes("distil", print, [1.0] * (WINDOW - 1))
    spikes.see(WINDOW, 100.0)
    spikes.see(WINDOW + 1, None)
    assert spikes.steps == []


def test_a_resumed_run_knows_earlier_spikes_and_does_not_tell_of_them_again():
    losses = [1.0] * WINDOW + [50.0] * 2 + [1.0] * 3
    said: list[str] = []
    spikes = Spikes("distil", said.append, losses)
    assert (spikes.steps, said) == ([51, 52], [])
    for step in range(60, 70):
        spikes.see(step, 70.0)
    assert len(spikes.steps) == 12
    assert len(said) == MOST_TOLD - 2, "those of before count"


def test_rows_are_listed_up_to_ten():
    assert listed(np.arange(3)) == "0, 1, 2"
    assert listed(np.arange(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (12 rows)"
