"""Whether two models differ by more than chance, judged on the same rows.

What each row adds to the metric is compared row by row, so rows that are hard for both cancel. In numpy and scipy.

    N  rows    S  seeds    R  resamples
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
BLOCK = 250


def compare(one_N: Floats, two_N: Floats, weight_N: Floats) -> dict[str, Any]:
    """The difference of two means over the same rows, with a paired bootstrap interval and a test.

    Args:
        one_N: what each row adds to the first model's sum: 1 for a right answer, or nats.
        two_N: the second model's.
        weight_N: what each row adds to the denominator: 1, or tokens.

    Returns:
        `difference` (first − second), `low` and `high` (95 %), `p_value`, `test`, and for right or wrong answers `wins`
        and `losses`, the rows that only the first or only the second has right. The test is then McNemar's exact one
        (McNemar 1947): of the rows on which the two differ, each is as likely to win. Else twice the share of
        resamples on the far side of zero.
    """
    gap_N = one_N - two_N
    value = float(gap_N.sum() / weight_N.sum())
    draws_R = np.concatenate([counts @ gap_N / (counts @ weight_N) for counts in _resampled(len(gap_N))])
    low, high = np.percentile(draws_R, [2.5, 97.5])
    found = {"difference": value, "low": min(float(low), value), "high": max(float(high), value)}
    if set(np.unique(one_N)) | set(np.unique(two_N)) <= {0.0, 1.0}:
        wins, losses = int((gap_N > 0).sum()), int((gap_N < 0).sum())
        return {**found, "p_value": mcnemar(wins, losses), "test": "mcnemar", "wins": wins, "losses": losses}
    return {**found, "p_value": _two_sided(draws_R), "test": "bootstrap", "wins": None, "losses": None}


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p-value of so uneven a split of the rows on which two models differ."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def over_seeds(gap_SN: Floats, weight_N: Floats) -> dict[str, float]:
    """The mean difference over seeds, with a 95 % interval that both the seeds and the rows move.

    Args:
        gap_SN: what each row adds to the difference of two models' sums, of every seed.
        weight_N: see `compare`.

    Returns:
        `mean`, `low`, `high`: bootstrap over rows, the same for all seeds, and over seeds.
    """
    value = float(gap_SN.sum() / weight_N.sum() / len(gap_SN))
    rng = np.random.default_rng(1)
    draws = []
    for counts in _resampled(gap_SN.shape[1]):
        each_RS = counts @ gap_SN.T / (counts @ weight_N)[:, None]
        seeds_RS = rng.integers(0, len(gap_SN), each_RS.shape)
        draws.append(np.take_along_axis(each_RS, seeds_RS, axis=1).mean(axis=1))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return {"mean": value, "low": min(float(low), value), "high": max(float(high), value)}


def _resampled(num_rows: int) -> list[Floats]:
    """How often each row is drawn, [R, N] in blocks; seeded."""
    rng = np.random.default_rng(0)
    share = np.full(num_rows, 1 / num_rows)
    return [rng.multinomial(num_rows, share, BLOCK).astype(np.float64) for _ in range(RESAMPLES // BLOCK)]


def _two_sided(draws_R: Floats) -> float:
    below, above = float((draws_R <= 0).mean()), float((draws_R >= 0).mean())
    return min(1.0, 2 * max(min(below, above), 1 / len(draws_R)))
