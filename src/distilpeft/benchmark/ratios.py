"""Ratios of latency between models that took turns, with intervals; rounds off a model's usual pace are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACE = 1.2
"""A round counts for a ratio if both models took at most 1.2 times as long, for the length of its rows, as in their
fastest tenth of rounds.
Virtual machines change their pace for seconds, and not by the same factor for every model: on one, int8 took 1.7 times
as long for 10 s and an eager model 1.2 times, while memory and each processor by itself were as fast as before."""
FEWEST = 0.25
"""If fewer rounds were at pace than this share, all count."""
RESAMPLES = 2000
ENOUGH_FOR_P99 = 100


def _cell(size: int, length: int | str, cell: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, Any]:
    seconds = [time for turn in cell["rounds"] for time in turn]
    rounds = [median(turn) for turn in cell["rounds"]]
    tokens = cell["tokens"] / (len(seconds) * size)
    rows_per_s = size / median(rounds)
    q1, q3 = np.percentile(seconds, [25, 75])
    decode = [time for turn in cell["decode"] for time in turn]
    return {
        "batch_size": size,
        "length": length,
        "mean_tokens": round(tokens, 2),
        "num_calls": len(seconds),
        "warmup_calls": cell["warmup_calls"],
        "stable": cell["stable"],
        "first_call_ms": round(cell["first_s"] * 1000, 3),
        "memory_bytes": cell["memory_bytes"],
        "latency_ms": _quantiles(seconds),
        "outliers": int(sum(time > q3 + 3 * (q3 - q1) for time in seconds)),
        "round_ms": [round(time * 1000, 4) for time in rounds],
        "rows_per_s": round(rows_per_s, 3),
        "tokens_per_s": round(rows_per_s * tokens, 2),
        "decode": _decode(decode, size) if decode else None,
        "ratio": _ratio(base, cell) if base is not None else None,
        "decode_ratio": _decode_ratio(base, cell) if base is not None and decode else None,
        "joules_per_row": round(cell["joules"] / (len(seconds) * size), 5) if cell["joules"] else None,
        "from_text": _from_text(cell, size) if any(cell["encode"]) else None,
    }


def _from_text(cell: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Encoding the texts, and latency and throughput of encoding, padding and the pass together, call by call."""
    both = [
        [encode + run for encode, run in zip(*turn, strict=True)]
        for turn in zip(cell["encode"], cell["rounds"], strict=True)
    ]
    return {
        "encode_ms": _quantiles([time for turn in cell["encode"] for time in turn]),
        "latency_ms": _quantiles([time for turn in both for time in turn]),
        "rows_per_s": round(size / median(median(turn) for turn in both), 3),
    }


def _decode(seconds: Sequence[float], size: int) -> dict[str, Any]:
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return {
        "ms_per_token": {"p50": round(float(p50), 3), "p95": round(float(p95), 3)},
        "tokens_per_s": round(size / float(p50) * 1000, 2),
    }


def _ratio(base: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, float]:
    """How many times as fast as the base, over the rounds in which both were at pace."""
    good = at_pace(base["rounds"], base["lengths"]) & at_pace(cell["rounds"], cell["lengths"])
    return ratio(base["rounds"], cell["rounds"], good)


def _decode_ratio(base: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, float]:
    theirs, own = ([[median(turn)] for turn in side["decode"]] for side in (base, cell))
    alike = [[1]] * len(own)  # a token more, whatever the row
    return ratio(theirs, own, at_pace(theirs, alike) & at_pace(own, alike))


def _quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    percentiles = dict(zip(("p50", "p90", "p95", "p99"), np.percentile(seconds, [50, 90, 95, 99]) * 1000, strict=True))
    figures: dict[str, float | None] = {name: round(float(value), 3) for name, value in percentiles.items()}
    if len(seconds) < ENOUGH_FOR_P99:
        figures["p99"] = None  # it would be the maximum under another name
    return {**figures, "mean": round(mean(seconds) * 1000, 3), "max": round(max(seconds) * 1000, 3)}


def ratio(base: Sequence[Sequence[float]], own: Sequence[Sequence[float]], good: NDArray[np.bool_]) -> dict[str, float]:
    """How many times as fast as the base, call by call on the same rows.

    Args:
        base: seconds of the base's calls in each round.
        own: of the model; a round's calls of both begin with the same rows, the faster model may have made more.
        good: the rounds that count; if they are fewer than `FEWEST`, all do.

    Returns:
        `value`, the median over rounds of the median of base ÷ own, and its 95 % bootstrap interval over rounds, `low`
        and `high`. `rounds` is how many counted; `of_all_rounds` is over all.
    """
    pairs = zip(base, own, strict=True)
    each = np.array([np.median([b / o for b, o in zip(base_s, own_s, strict=False)]) for base_s, own_s in pairs])
    sample = each[good] if good.sum() >= FEWEST * len(each) else each
    draws = np.random.default_rng(0).integers(0, len(sample), (RESAMPLES, len(sample)))
    low, high = np.percentile(np.median(sample[draws], axis=1), [2.5, 97.5])
    return {
        "value": round(float(np.median(sample)), 4), "low": round(float(low), 4), "high": round(float(high), 4),
        "rounds": len(sample), "of_all_rounds": round(float(np.median(each)), 4),
    }  # fmt: skip


def at_pace(rounds: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    """Which rounds of a model ran at the machine's own pace: see `PACE` and `paces`."""
    each = paces(rounds, lengths)
    mask: NDArray[np.bool_] = each <= PACE * np.percentile(each, 10)
    return mask


def paces(rounds: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """How long a model took in each round, relative to what it takes for rows of that length.

    Args:
        rounds: seconds of the calls of each round.
        lengths: positions of the longest row of each call.

    Returns:
        The median of each round. What a length takes is a straight line through the medians of up to eight groups of
        calls of like length, so that calls that took strangely long do not bend it.
    """
    seconds, positions = (np.concatenate([np.asarray(turn, float) for turn in values]) for values in (rounds, lengths))
    order = np.argsort(positions, kind="stable")
    groups = [part for part in np.array_split(order, min(8, len(order))) if len(part)]
    at, took = (np.array([np.median(values[part]) for part in groups]) for values in (positions, seconds))
    slope, base = 0.0, float(np.median(seconds))
    if at[0] < at[-1]:
        slope, base = np.polyfit(at, took, 1)
    expected = np.maximum(base + slope * positions, seconds.min())
    ends = np.cumsum([len(turn) for turn in rounds])[:-1]
    return np.array([np.median(part) for part in np.split(seconds / expected, ends)])
