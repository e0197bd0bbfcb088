"""What the plots of reports show, as plain data: `svg` draws it into the page, `plots` into files.

Torch-free. Every chart carries its figures as a table too. A chart without data is not made; `missing` reports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from distilpeft.planning.roles import MAJORITY, UNTRAINED
from distilpeft.recipe.task import KINDS, LOWER_IS_BETTER
from distilpeft.report.figures import Figure
from distilpeft.report.plots.markers import Mark, mark
from distilpeft.report.schema import Model, Report


@dataclass(frozen=True)
class Point:
    """One measured pair.

    Attributes:
        x: where on the horizontal axis.
        y: where on the vertical axis.
        low: lower end of y's interval, if it has one.
        high: upper end.
        text: what hovering shows, line by line.
        weight: how large it is drawn, up to 1.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    text: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        label: their name.
        points: in the order in which a line joins them.
        mark: how they look; None for lines that are no model's.
        kind: `points` alone, joined by a `line`, a `step` line, a dashed `guide`, `bars` from zero, or a `ring`
            around each.
    """

    label: str
    points: tuple[Point, ...]
    mark: Mark | None = None
    kind: Literal["points", "line", "step", "guide", "bars", "ring"] = "points"


@dataclass(frozen=True)
class Axis:
    """An axis: its label with the unit, whether it is logarithmic, and the values that are written on it."""

    label: str
    log: bool = False
    ticks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chart:
    """One plot and the same figures as a table.

    Attributes:
        name: a file name without its ending.
        title: above the plot.
        x: the horizontal axis.
        y: the vertical axis.
        series: what is drawn, the lowest layer first.
        titles: the table's columns.
        rows: the table, cell by cell.
        note: how to read it.
        better: the corner where good models are, `up` or `down` on the left; None where there is none.
    """

    name: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    better: Literal["up", "down"] | None = None


@dataclass(frozen=True)
class _Cost:
    """What a score is plotted against."""

    name: str
    title: str
    axis: str
    of: Callable[[Model], float | None]


def _latency(model: Model) -> float | None:
    return model.latency_ms.p50 if model.latency_ms else None


def _mega(count: Figure | None) -> float | None:
    return count / 1e6 if count else None


LATENCY = _Cost("latency", "Latency and score", "latency p50 at batch 1 (ms)", _latency)
FIRST_TOKEN = _Cost("latency", "Latency and score", "time to first token p50 at batch 1 (ms)", _latency)
MEMORY = _Cost(
    "memory", "Memory and score", "peak memory of a fresh process (MB)", lambda model: _mega(model.memory_bytes)
)
SIZE = _Cost("size", "Size and score", "size of the weights (MB)", lambda model: _mega(model.size_bytes))


def names(reports: Sequence[Report]) -> list[str]:
    """What to call each run: its recipe, with the seed and a number where that is not enough."""
    plain = [report.recipe for report in reports]
    seeded = [
        f"{name} (seed {report.seed})" if plain.count(name) > 1 else name
        for name, report in zip(plain, reports, strict=True)
    ]
    return [
        f"{name} #{seeded[: at + 1].count(name)}" if seeded.count(name) > 1 else name for at, name in enumerate(seeded)
    ]


def number(value: float | None, signs: int = 4) -> str:
    """A figure as people write it."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10 ** (signs - 1) else f"{value:.{signs}g}"


def spoken(metric: str) -> str:
    """A metric's name in words."""
    return metric.replace("_", " ")


def latency(reports: Sequence[Report]) -> list[Chart]:
    """Score over latency, one chart for each kind of task among the reports."""
    return _all_against(lambda report: FIRST_TOKEN if KINDS[report.task].is_language_model else LATENCY, reports)


def memory(reports: Sequence[Report]) -> list[Chart]:
    """Score over memory, one chart for each kind of task."""
    return _all_against(lambda _: MEMORY, reports)


def size(reports: Sequence[Report]) -> list[Chart]:
    """Score over size, one chart for each kind of task."""
    return _all_against(lambda _: SIZE, reports)


def by_metric(reports: Sequence[Report]) -> list[list[int]]:
    """Places of the reports that are judged by the same metric of the same task, together."""
    groups: dict[tuple[str, str], list[int]] = {}
    for at, report in enumerate(reports):
        groups.setdefault((report.task, report.metric), []).append(at)
    return list(groups.values())


def _all_against(cost_of: Callable[[Report], _Cost], reports: Sequence[Report]) -> list[Chart]:
    called, groups = names(reports), by_metric(reports)
    charts = []
    for group in groups:
        first = reports[group[0]]
        runs = [(at, called[at] + "/" if len(reports) > 1 else "", reports[at]) for at in group]
        chart = _against(cost_of(first), runs, first.metric, f"-{first.task}" if len(groups) > 1 else "")
        charts += [chart] if chart else []
    return charts


def _against(cost: _Cost, runs: Sequence[tuple[int, str, Report]], metric: str, suffix: str) -> Chart | None:
    """The main score over what a model costs; the front joins the models that no other beats at both."""
    series, rows = [], []
    for run, prefix, report in runs:
        for model in report.models:
            role, spent, score = model.role, cost.of(model), model.scores.get(metric)
            # Without training there is nothing to deploy, and its score would squeeze all others into a corner.
            if not spent or not score or role in (MAJORITY, UNTRAINED):
                continue
            name = prefix + model.name
            low, high = score.low, score.high
            span = "" if low is None or high is None else f"{number(low)} to {number(high)}"
            text = f"{name}\n{spoken(metric)} {number(score.value)}" + (f", 95 % {span}" if span else "")
            point = Point(spent, score.value, low, high, f"{text}\n{cost.axis}: {number(spent)}")
            series.append(Series(name, (point,), mark(role, run)))
            rows.append((name, number(spent), number(score.value), span or "–"))
    if not series:
        return None
    lower = metric in LOWER_IS_BETTER
    edge = front([line.points[0] for line in series], lower)
    best = [line.label for line in series if line.points[0] in edge]
    titles = ("model", cost.axis, spoken(metric), "95 % interval", "on the front")
    return Chart(
        cost.name + suffix,
        cost.title,
        Axis(cost.axis, log=True),
        Axis(f"{spoken(metric)} ({'lower' if lower else 'higher'} is better)"),
        (Series("Pareto front", tuple(edge), kind="step"), *series),
        titles,
        tuple((*row, "yes" if row[0] in best else "–") for row in rows),
        "Bars: 95 % intervals. Line: the front, models that no other beats at both.",
        "down" if lower else "up",
    )


def front(points: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """The points that no other equals or beats at both x and y, by rising x; x is better when lower."""
    sign = 1 if lower_is_better else -1
    edge: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if not edge or sign * point.y < sign * edge[-1].y:
            edge.append(point)
    return edge


def finite(value: object) -> TypeGuard[Figure]:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def missing(reports: Sequence[Report]) -> list[str]:
    """What there is no plot of, and why."""
    plots = {
        "latency and score": (latency, "no model was timed"),
        "memory and score": (memory, "no model's memory was measured"),
        "size and score": (size, "no model's size is known"),
    }
    return [f"plot of {what}: {why}" for what, (draw, why) in plots.items() if not draw(reports)]
