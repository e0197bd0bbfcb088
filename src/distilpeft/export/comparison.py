"""Compare the answers of an export with the student's: agreement, divergence and the worst rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.export.runtimes import Array
from distilpeft.metrics.probabilities import divergence, log_softmax
from distilpeft.recipe.export import Limits

UNRANKED = ("values", "vectors")
"""What answers can be that have no likeliest class."""
BLOCK = 64  # positions compared at once, in float64
MASKED = -1e8  # see `losses`
NUM_WORST, NUM_TEXTS, DISTANCE_CALLS = 3, 64, 16


@dataclass(frozen=True)
class Call:
    """One batch: what goes in, which positions count, and what the student says there.

    Attributes:
        inputs: name → array.
        at_N: flat positions b * S + s.
        labels_N: the right answers.
        rows_N: row ids.
        logits_NV: the student's.
        cut: send it through the cache, cut here; None sends it whole.
        allowed_NV: which ids can be answers, where not all can.
    """

    inputs: Mapping[str, Array]
    at_N: NDArray[np.int64]
    labels_N: Array
    rows_N: NDArray[np.int64]
    logits_NV: NDArray[np.float32]
    cut: int | None = None
    allowed_NV: NDArray[np.bool_] | None = None

    def masked(self, logits_NV: Array) -> Array:
        """Logits with those of impossible answers out of reach."""
        return logits_NV if self.allowed_NV is None else np.where(self.allowed_NV, logits_NV, MASKED)


def faults(figures: Mapping[str, Any], limits: Limits) -> list[str]:
    """What is beyond its limit, in words that name the recipe's key."""
    messages = []
    for name, word in (("max_abs_diff", "a logit differs by"), ("kl", "KL to the student is")):
        limit = getattr(limits, name)
        if limit is not None and not figures[name] <= limit:
            messages.append(f"{word} {figures[name]:.3g} ({name} allows {limit:.3g})")
    for name, word in (("top1_agreement", "same answer on only"), ("metric_kept", "keeps only")):
        limit = getattr(limits, name)
        if limit is not None and not figures[name] >= limit:
            messages.append(f"{word} {figures[name]:.2%} ({name} asks for {limit:.2%})")
    return messages


@dataclass
class Verdict:
    """What the gate found.

    Attributes:
        figures: see `Gate.check`.
        faults: what is beyond its limit, in words; none if the export counts.
        worst: (row, largest difference of a logit, KL) of the rows that differ most.
    """

    figures: dict[str, Any]
    faults: list[str] = field(default_factory=list)
    worst: list[tuple[int, float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        reasons = "; ".join(self.faults)
        rows = ", ".join(f"{row} (logit off by {gap:.3g}, KL {kl:.3g})" for row, gap, kl in self.worst)
        return f"{reasons}. Validation rows that differ most: {rows}" if rows else reasons


Answers = Callable[[Array, Array], tuple[Array, Array]]
"""Outputs and labels of a model's positions → a distribution's logits, or a number, and the right one; see tasks."""


def compare(calls: Sequence[Call], folder: Path, family: str, answers: Answers) -> Verdict:
    """The figures of `Gate.check` that come from logits; calls through the cache count for difference and KL only.

    Args:
        calls: with the student's logits.
        folder: folder of the export's, N.npy.
        family: what answers are, see `Kind.family`: the metric is the share of right ones, nats per token of
            `language`, the root mean squared error of `values`.
        answers: the task's.
    """
    sums = _Compared(family, spread(calls) if family == "values" else 1.0)
    for number, call in enumerate(calls):
        theirs_NV = np.load(folder / f"{number}.npy", allow_pickle=False)
        if theirs_NV.shape != call.logits_NV.shape:
            return Verdict({}, [f"gives logits of shape {theirs_NV.shape}, the student of {call.logits_NV.shape}"])
        if not np.isfinite(theirs_NV).all():
            bad = call.rows_N[~np.isfinite(theirs_NV).all(-1)]
            return Verdict({}, [f"gives logits that are not finite, such as for validation row {bad[0]}"])
        ours_MV, labels_M = answers(call.masked(call.logits_NV), call.labels_N)
        theirs_MV, _ = answers(call.masked(theirs_NV), call.labels_N)
        rows_M = np.repeat(call.rows_N, len(ours_MV) // len(call.rows_N))  # several answers of a position
        for start in range(0, len(ours_MV), BLOCK):
            part = slice(start, start + BLOCK)
            sums.add(ours_MV[part], theirs_MV[part], labels_M[part], rows_M[part], whole=call.cut is None)
    return sums.verdict()


def spread(calls: Sequence[Call]) -> float:
    """Standard deviation of the labels, in which numbers are compared."""
    return float(np.concatenate([call.labels_N for call in calls]).std()) or 1.0


def _divergence(family: str, ours_NV: Array, theirs_NV: Array) -> NDArray[np.float64]:
    """KL(ours ‖ theirs) of each answer, in nats; of numbers that of normal distributions of width 1 around them.

    The same for vectors: since their length is 1, it is 1 minus their cosine.
    """
    if family in UNRANKED:
        half_N: NDArray[np.float64] = 0.5 * np.square(ours_NV.astype(np.float64) - theirs_NV).sum(-1)
        return half_N
    return divergence(log_softmax(ours_NV), log_softmax(theirs_NV))


class _Compared:
    """What is kept of every answer: largest difference, KL, row; of calls that go in whole also who is right."""

    def __init__(self, family: str, unit: float) -> None:
        self._family, self._unit = family, unit
        self._gaps: list[NDArray[np.float64]] = []
        self._kl: list[NDArray[np.float64]] = []
        self._rows: list[NDArray[np.int64]] = []
        self._agree: list[NDArray[np.bool_]] = []
        self._ours: list[NDArray[np.float64]] = []
        self._theirs: list[NDArray[np.float64]] = []

    def add(
        self, ours_NV: Array, theirs_NV: Array, labels_N: Array, rows_N: NDArray[np.int64], *,
        whole: bool,
    ) -> None:  # fmt: skip
        """Compare some answers of a call; `whole`: it did not go through the cache."""
        ours_NV, theirs_NV = (array.astype(np.float64) / self._unit for array in (ours_NV, theirs_NV))
        self._gaps.append(np.abs(ours_NV - theirs_NV).max(-1))
        self._kl.append(_divergence(self._family, ours_NV, theirs_NV))
        self._rows.append(rows_N)
        if whole and self._family == "vectors":
            self._ours.append(np.ones(len(ours_NV)))
            self._theirs.append((ours_NV * theirs_NV).sum(-1))
        elif whole:
            self._agree.append(ours_NV.argmax(-1) == theirs_NV.argmax(-1))
            self._ours.append(self._measure(ours_NV, labels_N))
            self._theirs.append(self._measure(theirs_NV, labels_N))

    def _measure(self, answers_NV: NDArray[np.float64], labels_N: Array) -> NDArray[np.float64]:
        if self._family == "values":
            squared_N: NDArray[np.float64] = np.square(answers_NV[:, 0] - labels_N / self._unit)
            return squared_N
        if self._family == "language":
            nats_N: NDArray[np.float64] = -log_softmax(answers_NV)[np.arange(len(labels_N)), labels_N]
            return nats_N
        right_N: NDArray[np.float64] = (answers_NV.argmax(-1) == labels_N).astype(np.float64)
        return right_N

    def _retention(self, student: float, export: float) -> float:
        """How much of the student's metric the export keeps."""
        if self._family == "values":
            return float(np.sqrt(student / export)) if export else 1.0
        if self._family == "language":
            return float(np.exp(student - export))
        return export / student if student else 1.0

    def verdict(self) -> Verdict:
        """The figures, and the rows that differ most."""
        gap_N, kl_N, row_N = (np.concatenate(parts) for parts in (self._gaps, self._kl, self._rows))
        student, export = (float(np.concatenate(parts).mean()) for parts in (self._ours, self._theirs))
        agree = {} if self._family in UNRANKED else {"top1_agreement": float(np.concatenate(self._agree).mean())}
        figures = {
            "rows": len(np.unique(row_N)),
            "positions": sum(map(len, self._ours)),
            "max_abs_diff": float(gap_N.max()),
            "kl": float(max(kl_N.mean(), 0.0)),
            **agree,
            "metric_student": student,
            "metric_export": export,
            "metric_kept": self._retention(student, export),
        }
        worst: dict[int, tuple[int, float, float]] = {}
        for at in np.lexsort((gap_N, kl_N))[::-1]:
            worst.setdefault(int(row_N[at]), (int(row_N[at]), float(gap_N[at]), float(kl_N[at])))
            if len(worst) == NUM_WORST:
                break
        return Verdict(figures, worst=list(worst.values()))
