"""Whether two models differ by more than chance, judged on the same rows.

What each row adds to the metric is compared row by row, so rows that are hard for both cancel. In numpy and scipy.

    N  rows    S  seeds    R  resamples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
BLOCK = 250


@dataclass(frozen=True)
class Added:
    """What each row adds to a model's score, a ratio of two sums.

    Attributes:
        sum_N: to the sum: 1 for a right answer, or nats.
        weight_N: to what it is divided by: 1, or tokens; of F1 the entities of both sides, which depend on the model.
    """

    sum_N: Floats
    weight_N: Floats

    def of(self, mask_N: NDArray[np.bool_]) -> Added:
        """Some of the rows."""
        return Added(self.sum_N[mask_N], self.weight_N[mask_N])

    def score(self, counts_BN: Floats) -> Floats:
        """The score of rows that count so often, one per resample; 0 where there is nothing to divide by."""
        weight_B = counts_BN @ self.weight_N
        return counts_BN @ self.sum_N / np.where(weight_B == 0, 1.0, weight_B)


def compare(first: Added, second: Added) -> dict[str, Any]:
    """The difference of two models' scores on the same rows, with a paired bootstrap interval and a test.

    Args:
        first: the first model's rows.
        second: the second model's.

    Returns:
        `difference` (first − second), `low` and `high` (95 %), `p_value`, `test`, and for right or wrong answers `wins`
        and `losses`, the rows that only the first or only the second has right. The test is then McNemar's exact one
        (McNemar 1947): of the rows on which the two differ, each is as likely to win. Else twice the share of
        resamples on the far side of zero.
    """
    value = difference(first, second)
    draws_R = np.concatenate([first.score(counts) - second.score(counts) for counts in _resampled(len(first.sum_N))])
    low, high = np.percentile(draws_R, [2.5, 97.5])
    result = {"difference": value, "low": min(float(low), value), "high": max(float(high), value)}
    plain = all((added.weight_N == 1).all() for added in (first, second))
    if plain and set(np.unique(first.sum_N)) | set(np.unique(second.sum_N)) <= {0.0, 1.0}:
        gap_N = first.sum_N - second.sum_N
        wins, losses = int((gap_N > 0).sum()), int((gap_N < 0).sum())
        return {**result, "p_value": mcnemar(wins, losses), "test": "mcnemar", "wins": wins, "losses": losses}
    return {**result, "p_value": _two_sided(draws_R), "test": "bootstrap", "wins": None, "losses": None}


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p-value of so uneven a split of the rows on which two models differ."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def difference(first: Added, second: Added) -> float:
    """The first model's score less the second's."""
    every_1N = np.ones((1, len(first.sum_N)))
    return float((first.score(every_1N) - second.score(every_1N))[0])


def over_seeds(pairs: Sequence[tuple[Added, Added]]) -> dict[str, float]:
    """The mean difference over seeds, with a 95 % interval that both the seeds and the rows move.

    Args:
        pairs: the two models' rows, of every seed.

    Returns:
        `mean`, `low`, `high`: bootstrap over rows, the same for all seeds, and over seeds.
    """
    value = float(np.mean([difference(first, second) for first, second in pairs]))
    rng = np.random.default_rng(1)
    draws = []
    for counts in _resampled(len(pairs[0][0].sum_N)):
        each_RS = np.stack([first.score(counts) - second.score(counts) for first, second in pairs], axis=-1)
        seeds_RS = rng.integers(0, len(pairs), each_RS.shape)
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
