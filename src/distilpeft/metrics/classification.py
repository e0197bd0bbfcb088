"""Scores of classifiers through `evaluate` modules that work without a hub, with 95 % intervals.

Each module is an ordinary `evaluate.Metric`, so it combines with metrics from the hub. Probabilities go in as
[N, C]; labels as class ids. Intervals: Wilson for accuracy, seeded bootstrap for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from distilpeft.metrics.probabilities import Floats, divergence, log_softmax, softmax
from distilpeft.metrics.score import Score

Ints = NDArray[np.int64]
Z95 = 1.959963984540054
RESAMPLES = 200
ECE_BINS = 15


def accuracy(probabilities_NC: Floats, labels_N: Ints) -> float:
    """Share of rows whose likeliest class is the label."""
    return float((probabilities_NC.argmax(-1) == labels_N).mean())


def macro_f1(probabilities_NC: Floats, labels_N: Ints) -> float:
    """Mean over all classes of the model of F1; a class neither predicted nor present counts 0."""
    right_C, predicted_C, present_C = _counts(probabilities_NC, labels_N)
    both_C = predicted_C + present_C
    return float(np.divide(2.0 * right_C, both_C, out=np.zeros(len(both_C)), where=both_C > 0).mean())


def mcc(probabilities_NC: Floats, labels_N: Ints) -> float:
    """Matthews correlation coefficient; 0 if predictions or labels are all of one class."""
    right_C, predicted_C, present_C = _counts(probabilities_NC, labels_N)
    rows = float(len(labels_N))
    spread = (rows**2 - predicted_C @ predicted_C) * (rows**2 - present_C @ present_C)
    return float((right_C.sum() * rows - present_C @ predicted_C) / np.sqrt(spread)) if spread else 0.0


@dataclass(frozen=True)
class ByClass:
    """Answers by class.

    Attributes:
        right_C: rows of each class that were answered so.
        predicted_C: rows that were answered so.
        present_C: rows that have it as their label.
        confusion_CC: rows by label (first) and answer; None where a row may have several classes.
    """

    right_C: Ints
    predicted_C: Ints
    present_C: Ints
    confusion_CC: Ints | None = None


def by_class(predicted_N: Ints, labels_N: Ints, classes: int) -> ByClass:
    """Answers of one class a row, by class."""
    confusion_CC = np.bincount(labels_N * classes + predicted_N, minlength=classes**2).reshape(classes, classes)
    return ByClass(confusion_CC.diagonal(), confusion_CC.sum(0), confusion_CC.sum(1), confusion_CC)


def _counts(probabilities_NC: Floats, labels_N: Ints) -> tuple[Floats, Floats, Floats]:
    """Of each class, the rows predicted rightly, predicted at all, and labelled so; without a table of all pairs."""
    predicted_N, classes = probabilities_NC.argmax(-1), probabilities_NC.shape[-1]
    picked = (labels_N[predicted_N == labels_N], predicted_N, labels_N)
    right_C, predicted_C, present_C = (np.bincount(ids, minlength=classes).astype(np.float64) for ids in picked)
    return right_C, predicted_C, present_C


def log_loss(probabilities_NC: Floats, labels_N: Ints) -> float:
    """Mean negative log-likelihood of the labels, in nats; probabilities below 1e-15 count as 1e-15."""
    picked = np.take_along_axis(probabilities_NC, labels_N[:, None], axis=-1)
    return float(-np.log(np.clip(picked, 1e-15, 1.0)).mean())


def ece(probabilities_NC: Floats, labels_N: Ints) -> float:
    """Expected calibration error, 15 equal-width bins of the top probability (Guo et al. 2017, arXiv:1706.04599)."""
    confidence_N = probabilities_NC.max(-1)
    right_N = probabilities_NC.argmax(-1) == labels_N
    bins_N = np.minimum((confidence_N * ECE_BINS).astype(int), ECE_BINS - 1)
    gap = np.bincount(bins_N, weights=right_N - confidence_N, minlength=ECE_BINS)
    return float(np.abs(gap).sum() / len(labels_N))


def reliability(probabilities_NC: Floats, labels_N: Ints) -> dict[str, list[float]]:
    """The bins of `ece` that hold rows: `confidence` (mean top probability), `accuracy` of the top class, `count`."""
    confidence_N = probabilities_NC.max(-1)
    right_N = probabilities_NC.argmax(-1) == labels_N
    bins_N = np.minimum((confidence_N * ECE_BINS).astype(int), ECE_BINS - 1)
    count, sure, right = (np.bincount(bins_N, weights, ECE_BINS) for weights in (None, confidence_N, right_N))
    mask = count > 0
    means = {"confidence": sure[mask] / count[mask], "accuracy": right[mask] / count[mask]}
    return {**{name: np.round(values, 6).tolist() for name, values in means.items()}, "count": count[mask].tolist()}


FUNCTIONS: dict[str, Callable[[Floats, Ints], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "mcc": mcc,
    "ece": ece,
    "log_loss": log_loss,
}
BOUNDS = {"macro_f1": (0.0, 1.0), "mcc": (-1.0, 1.0), "ece": (0.0, 1.0), "log_loss": (0.0, math.inf)}


class OfflineMetric(evaluate.Metric):  # type: ignore[misc]
    """One of `FUNCTIONS` as an `evaluate` module: `predictions` are probabilities, `references` class ids."""

    def __init__(self, name: str) -> None:
        self._function = FUNCTIONS[name]
        self._score_name = name
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._function.__doc__ or "",
            citation="",
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self._score_name: self._function(np.asarray(predictions), np.asarray(references))}


def scores(names: tuple[str, ...], logits_NC: Floats, labels_N: Ints) -> dict[str, Score]:
    """All scores of one model.

    Args:
        names: of `FUNCTIONS`, or `hub:NAME` for a metric that the hub holds (it gets predicted class ids).
        logits_NC: finite logits.
        labels_N: class ids.

    Returns:
        name → {"value", "low", "high", "num_rows"}; low and high bound the 95 % interval (null for hub metrics).
    """
    probabilities_NC = softmax(logits_NC)
    result: dict[str, Score] = {}
    for name in names:
        if name.startswith("hub:"):
            metric = evaluate.load(name.removeprefix("hub:"))
            figures = metric.compute(predictions=probabilities_NC.argmax(-1), references=labels_N)
            for key, value in figures.items():
                result[key] = {"value": float(value), "low": None, "high": None, "num_rows": len(labels_N)}
            continue
        metric = OfflineMetric(name)
        value = metric.compute(predictions=probabilities_NC, references=labels_N)[name]
        low, high = _interval(name, value, probabilities_NC, labels_N)
        result[name] = {"value": value, "low": low, "high": high, "num_rows": len(labels_N)}
    return result


def _interval(name: str, value: float, probabilities_NC: Floats, labels_N: Ints) -> tuple[float, float]:
    if name == "accuracy":
        return wilson(value, len(labels_N))
    rng = np.random.default_rng(0)
    draws = (rng.integers(0, len(labels_N), len(labels_N)) for _ in range(RESAMPLES))
    values = [FUNCTIONS[name](probabilities_NC[draw], labels_N[draw]) for draw in draws]
    return _around(value, values, BOUNDS[name])


def _around(value: float, draws: Sequence[float], bounds: tuple[float, float]) -> tuple[float, float]:
    """95 % interval of a value from its resamples."""
    # Resampling adds bias of its own (ECE grows with every repeated row), so the spread is centred on the value.
    low, high = value + np.percentile(draws, [2.5, 97.5]) - np.mean(draws)
    least, most = bounds
    return max(least, min(float(low), value)), min(most, max(float(high), value))


def scored(
    metrics: Callable[[Ints | slice], dict[str, float]], names: tuple[str, ...], num_rows: int,
    bounds: dict[str, tuple[float, float]], counted: int | None = None,
) -> dict[str, Score]:  # fmt: skip
    """Scores of a task whose metrics are plain functions of its rows.

    Args:
        metrics: of the rows with these numbers, or of all rows of a slice.
        names: which of them are wanted.
        num_rows: how many rows there are.
        bounds: of each metric that is not a share.
        counted: what to report as `num_rows`, if the scores count something else, such as words.

    Returns:
        See `scores`.
    """
    values = metrics(slice(None))
    rng = np.random.default_rng(0)
    draws = [metrics(rng.integers(0, num_rows, num_rows)) for _ in range(RESAMPLES)]
    result: dict[str, Score] = {}
    for name in names:
        low, high = _around(values[name], [draw[name] for draw in draws], bounds.get(name, (0.0, 1.0)))
        counts = num_rows if counted is None else counted
        result[name] = {"value": values[name], "low": low, "high": high, "num_rows": counts}
    return result


def wilson(share: float, num_rows: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of `num_rows` rows."""
    centre = share + Z95**2 / (2 * num_rows)
    spread = Z95 * math.sqrt(share * (1 - share) / num_rows + Z95**2 / (4 * num_rows**2))
    scale = 1 + Z95**2 / num_rows
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # at 0 and 1 rounding must not exclude the share


def agreement(logits_NC: Floats, reference_NC: Floats) -> dict[str, float]:
    """How far a model is from a reference on the same rows: mean KL(reference || model) in nats, equal top class."""
    log_p_NC, log_q_NC = log_softmax(reference_NC), log_softmax(logits_NC)
    kl = float(divergence(log_p_NC, log_q_NC).mean())
    return {"kl": kl, "top1_agreement": float((log_p_NC.argmax(-1) == log_q_NC.argmax(-1)).mean())}
