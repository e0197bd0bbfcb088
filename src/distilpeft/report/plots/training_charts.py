"""How training went and how far confidence can be trusted, as charts; see `charts`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distilpeft.planning.roles import MAJORITY, TEACHER, UNTRAINED, short_name, trained_role
from distilpeft.recipe.task import LOWER_IS_BETTER
from distilpeft.report.figures import Figure
from distilpeft.report.plots.charts import Axis, Chart, Point, Series, finite, number, spoken
from distilpeft.report.plots.markers import mark
from distilpeft.report.schema import Calibration, Curve, Report, Training

MOST_ROWS = 40
FEWEST_IN_BIN = 10
"""Rows without which the share of right answers in a bin is mostly chance."""
PANELS = {"loss": ("Loss", "loss", False), "grad_norm": ("Gradient norm", "gradient norm before clipping", True)}


def training(report: Report, prefix: str = "") -> list[Chart]:
    """Of each trained model: its loss, and on validation rows the metric that its checkpoint is picked by."""
    charts = []
    for step in dict.fromkeys([*report.training, *report.curves]):
        curve = report.curves.get(step, Curve())
        trained = report.training.get(step, Training())
        validated = _validations(step, trained, _monitor(report, step, trained), prefix)
        charts += [chart for chart in (_curve(step, "loss", curve.step, curve.loss, prefix), validated) if chart]
    return charts


def gradients(report: Report, prefix: str = "") -> list[Chart]:
    """Of each trained model: its gradient norm."""
    charts = (_curve(step, "grad_norm", curve.step, curve.grad_norm, prefix) for step, curve in report.curves.items())
    return [chart for chart in charts if chart]


def _monitor(report: Report, step: str, trained: Training) -> str:
    """The metric on validation rows by which a training's checkpoint is picked; without a teacher it is never KL."""
    settings = report.settings.get("teacher" if step == TEACHER else "distil") or {}
    name = str((settings.get("fit") or {}).get("monitor") or report.metric)
    return name if any(name in figures for figures in trained.validations) else report.metric


def _curve(step: str, name: str, xs: Sequence[Figure | None], ys: Sequence[Figure | None], prefix: str) -> Chart | None:
    title, axis, log = PANELS[name]
    role = trained_role(step)
    pairs = [(x, y) for x, y in zip(xs, ys, strict=False) if finite(x) and finite(y) and (y > 0 or not log)]
    if not pairs:
        return None
    points = tuple(Point(x, y, text=f"{role}, step {number(x)}\n{title.lower()} {number(y)}") for x, y in pairs)
    rows = [pairs[at] for at in evenly(len(pairs), MOST_ROWS)]
    note = f"{len(rows)} of {len(pairs)} points are in the table; all are in report.json." if rows != pairs else ""
    return Chart(
        _slug(f"{prefix}training-{role}-{name}"),
        f"{role}: {title.lower()}",
        Axis("optimizer step"),
        Axis(f"{axis}{', log' if log else ''}", log),
        (Series(role, points, mark(role), "line"),),
        ("step", title.lower()),
        tuple((number(x), number(y)) for x, y in rows),
        note,
    )


def evenly(count: int, most: int) -> list[int]:
    """At most that many places of a list, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)})


def _validations(step: str, trained: Training, metric: str, prefix: str) -> Chart | None:
    role, kept = trained_role(step), trained.kept_step
    figures = ((entry.get("step"), entry.get(metric)) for entry in trained.validations)
    pairs = [(x, y) for x, y in figures if finite(x) and finite(y)]
    if not pairs:
        return None
    points = tuple(
        Point(x, y, text=f"{role}, step {number(x)}{' (kept)' if x == kept else ''}\n{spoken(metric)} {number(y)}")
        for x, y in pairs
    )
    chosen = tuple(point for point in points if point.x == kept)
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    return Chart(
        _slug(f"{prefix}training-{role}-validation"),
        f"{role}: validation",
        Axis("optimizer step"),
        Axis(f"{spoken(metric)} ({better} is better)"),
        (
            *((Series("kept", chosen, kind="ring"),) if chosen else ()),
            Series(role, points, mark(role), "line"),
        ),
        ("step", spoken(metric), "kept"),
        tuple((number(x), number(y), "yes" if x == kept else "–") for x, y in pairs),
        "The ring is the kept step; step 0 is before training." if chosen else "Step 0 is before training.",
    )


def calibration(report: Report, prefix: str = "") -> list[Chart]:
    """Reliability of each trained model's confidence; models whose bins are the same share a chart."""
    groups: dict[tuple[tuple[float, float, int], ...], list[str]] = {}
    for model in report.models:
        bins = _bins(model.calibration or Calibration())
        if any(count >= FEWEST_IN_BIN for *_, count in bins) and model.role not in (MAJORITY, UNTRAINED):
            groups.setdefault(bins, []).append(model.role)
    return [_reliability(bins, roles, prefix) for bins, roles in groups.items()]


def _bins(curve: Calibration) -> tuple[tuple[float, float, int], ...]:
    """Confidence, share of right answers and rows of each bin that has any; rounded, so that alike is the same."""
    return tuple(
        (round(confidence, 3), round(right, 3), count)
        for confidence, right, count in zip(curve.confidence, curve.accuracy, curve.count, strict=False)
        if count and finite(confidence) and finite(right)
    )


def _reliability(bins: Sequence[tuple[float, float, int]], roles: Sequence[str], prefix: str) -> Chart:
    total, most = sum(count for *_, count in bins), max(count for *_, count in bins)
    labels = [short_name(role) for role in roles]
    low = 0.5 if min(confidence for confidence, *_ in bins) >= 0.5 else 0.0
    texts = [
        f"{labels[0]}, {count} rows\nconfidence {number(confidence, 3)}\nright {number(right, 3)}"
        for confidence, right, count in bins
    ]
    points = tuple(
        Point(confidence, right, text=text, weight=0.5 + 0.5 * (count / most) ** 0.5)
        for (confidence, right, count), text in zip(bins, texts, strict=True)
        if count >= FEWEST_IN_BIN
    )
    few = sum(count for *_, count in bins if count < FEWEST_IN_BIN)
    sparse = f" Not drawn: bins of fewer than {FEWEST_IN_BIN} rows ({few} in all)." if few else ""
    bars = tuple(Point(confidence, count / total) for confidence, _, count in bins)
    alike = f" Also of {', '.join(labels[1:])}: the same to three digits." if len(labels) > 1 else ""
    return Chart(
        _slug(f"{prefix}calibration-{labels[0]}"),
        labels[0] + (f" (+{len(labels) - 1} alike)" if len(labels) > 1 else ""),
        Axis("confidence"),
        Axis("share right; bars: share of rows"),
        (
            Series("share of rows", bars, mark(roles[0]), "bars"),
            Series("perfectly calibrated", (Point(low, low), Point(1, 1)), kind="guide"),
            Series(labels[0], points, mark(roles[0]), "line"),
        ),
        ("confidence", "share right", "rows"),
        tuple((number(confidence, 3), number(right, 3), str(count)) for confidence, right, count in bins),
        f"Below the dashed line the model is too sure.{sparse}{alike}",
    )


def _slug(text: str) -> str:
    """A file name that every system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "chart"
