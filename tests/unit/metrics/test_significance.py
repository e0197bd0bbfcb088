"""Paired differences against independent computations: scipy's own bootstrap, counts by hand, and known limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distilpeft.metrics import significance
from distilpeft.metrics.significance import Added, mcnemar

RNG = np.random.default_rng(5)
ONES = np.ones(400)
TRUTH = RNG.random(400) < 0.8
OTHER = np.where(RNG.random(400) < 0.1, ~TRUTH, TRUTH)


def compare(one, two, weights):
    return significance.compare(Added(one, weights), Added(two, weights))


def over_seeds(gaps, weights):
    return significance.over_seeds([(Added(gap, weights), Added(np.zeros_like(gap), weights)) for gap in gaps])


def test_the_difference_is_the_difference_of_the_means_and_wins_are_counted():
    one, two = np.array([1.0, 1, 0, 1, 0]), np.array([1.0, 0, 0, 0, 1])
    found = compare(one, two, np.ones(5))
    assert found["difference"] == pytest.approx(0.2)
    assert (found["wins"], found["losses"], found["test"]) == (2, 1, "mcnemar")


def test_the_interval_is_that_of_an_independent_bootstrap():
    found = compare(TRUTH.astype(float), OTHER.astype(float), ONES)
    gap = TRUTH.astype(float) - OTHER
    other = stats.bootstrap((gap,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(3))
    low, high = other.confidence_interval
    assert found["low"] == pytest.approx(low, abs=0.004)
    assert found["high"] == pytest.approx(high, abs=0.004)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemars_test_is_the_binomial_sum_written_out(wins, losses):
    both, least = wins + losses, min(wins, losses)
    tail = sum(math.comb(both, k) for k in range(least + 1)) / 2**both
    assert mcnemar(wins, losses) == pytest.approx(min(1.0, 2 * tail) if both else 1.0)


def test_equal_models_do_not_differ_and_that_is_no_proof_of_anything():
    found = compare(TRUTH.astype(float), TRUTH.astype(float), ONES)
    assert (found["difference"], found["low"], found["high"], found["p_value"]) == (0.0, 0.0, 0.0, 1.0)


def test_tokens_are_weighted_by_rows_and_nats_are_tested_by_the_bootstrap():
    nats, tokens = RNG.random((2, 300)) * 5, RNG.integers(1, 20, 300).astype(float)
    nats[1] = nats[0] + tokens * 0.1
    found = compare(nats[0], nats[1], tokens)
    assert found["difference"] == pytest.approx(-0.1)
    assert (found["test"], found["wins"]) == ("bootstrap", None)
    assert found["p_value"] <= 0.001
    assert found["low"] <= -0.1 <= found["high"]


def test_swapping_the_models_turns_the_difference_around():
    one, two = TRUTH.astype(float), OTHER.astype(float)
    there, back = compare(one, two, ONES), compare(two, one, ONES)
    assert (there["difference"], there["low"], there["high"]) == pytest.approx(
        (-back["difference"], -back["high"], -back["low"])
    )
    assert there["p_value"] == back["p_value"]


def test_paired_rows_are_surer_than_rows_apart():
    """What the test is for: both models stumble over the same rows, so the interval is narrower than the scores'."""
    found = compare(TRUTH.astype(float), OTHER.astype(float), ONES)
    share = TRUTH.mean()
    apart = 2 * 1.96 * math.sqrt(2 * share * (1 - share) / len(TRUTH))
    assert found["high"] - found["low"] < apart / 1.5


def test_over_seeds_the_interval_widens_with_what_seeds_disagree_on():
    base = RNG.normal(0.02, 0.3, 500)
    calm = np.stack([base, base, base])
    wild = np.stack([base - 0.1, base, base + 0.1])
    same, apart = (over_seeds(gaps, np.ones(500)) for gaps in (calm, wild))
    assert same["mean"] == pytest.approx(apart["mean"]) == pytest.approx(base.mean())
    assert apart["high"] - apart["low"] > 1.5 * (same["high"] - same["low"])
    alone = compare(base + 1e-9, np.zeros(500), np.ones(500))
    assert (same["low"], same["high"]) == pytest.approx((alone["low"], alone["high"]), abs=1e-6)


def test_figures_are_the_same_in_every_run():
    one, two = TRUTH.astype(float), OTHER.astype(float)
    assert compare(one, two, ONES) == compare(one, two, ONES)


def test_f1_is_compared_as_a_ratio_of_sums_whose_denominators_differ_between_models():
    """Entities found twice over entities told and there: what a row adds to the denominator depends on the model."""
    found, told, there = RNG.integers(0, 3, (2, 200)), RNG.integers(3, 6, (2, 200)), RNG.integers(3, 6, 200)
    one, two = (Added(2.0 * found[i], (told[i] + there).astype(float)) for i in (0, 1))
    result = significance.compare(one, two)
    scores = [2 * found[i].sum() / (told[i] + there).sum() for i in (0, 1)]
    assert result["difference"] == pytest.approx(scores[0] - scores[1])
    assert result["test"] == "bootstrap"

    def gap(rows):
        rows = rows.astype(int)
        return np.subtract(*(2 * found[i][rows].sum() / (told[i] + there)[rows].sum() for i in (0, 1)))

    other = stats.bootstrap(
        (np.arange(200),), gap, n_resamples=3000, method="percentile", vectorized=False, rng=np.random.default_rng(3)
    ).confidence_interval
    assert (result["low"], result["high"]) == pytest.approx((other.low, other.high), abs=0.01)


def test_a_row_that_adds_nothing_to_either_sum_changes_nothing():
    ones, nothing = np.ones(3), np.zeros(3)
    one, two = Added(np.r_[ones, nothing], np.r_[ones, nothing]), Added(np.zeros(6), np.r_[ones, nothing])
    assert significance.compare(one, two)["difference"] == 1.0
    assert significance.compare(Added(nothing, nothing), Added(nothing, nothing))["difference"] == 0.0
