"""Charts drawn as inline SVG. Colours come from the page's style sheet, so that they follow its theme.

Each point that may be pointed at is a `.point` with its text in `data-tip`, and in a `title` for pages without script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from distilpeft.report.page.scales import LETTER, Box, Scale, place, scale, tick_text
from distilpeft.report.plots.charts import Chart, Point, Series
from distilpeft.report.plots.markers import Mark

MOST_STOPS = 40
"""So many points of a line can be pointed at; more would lie on top of each other."""


@dataclass(frozen=True)
class Paper:
    """How large a chart is drawn.

    Attributes:
        width: of the view box.
        height: of the view box.
        font: the size of letters.
        labels: whether names stand next to the points.
    """

    width: int = 440
    height: int = 300
    font: float = 13
    labels: bool = False


@dataclass(frozen=True)
class _Plot:
    """A chart's two scales on its paper."""

    chart: Chart
    paper: Paper
    x: Scale
    y: Scale

    def at(self, point: Point) -> tuple[float, float]:
        return self.x(point.x), self.y(point.y)


def draw(chart: Chart, paper: Paper) -> str:
    """The chart as an SVG element."""
    plot = _plot(chart, paper)
    parts = [_grid(plot), *(LAYERS[series.kind](plot, series) for series in chart.series)]
    if paper.labels:
        parts.append(_labels(plot))
    return (
        f'<svg class="chart" viewBox="0 0 {paper.width} {paper.height}" role="group" '
        f'aria-label="{escape(chart.title)}" font-size="{paper.font:g}">{"".join(parts)}</svg>'
    )


def _plot(chart: Chart, paper: Paper) -> _Plot:
    points = [point for series in chart.series for point in series.points]
    ys = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
    if any(series.kind == "bars" for series in chart.series):
        ys.append(0.0)
    top, bottom = paper.font * 2.4, paper.height - paper.font * 3.1
    y = scale(ys, bottom, top, chart.y.log)
    wide = max((len(tick_text(tick)) for tick in y.ticks(5)), default=1) * paper.font * LETTER
    x = scale((point.x for point in points), wide + 10, paper.width - 12, chart.x.log, 0.05)
    return _Plot(chart, paper, x, y)


def _grid(plot: _Plot) -> str:
    """Grid, ticks and what the axes mean; the vertical axis is named above it, where it can be read."""
    font, x, y = plot.paper.font, plot.x, plot.y
    parts = []
    for tick in y.ticks(5):
        at = y(tick)
        parts.append(f'<path class="rule" d="M{x.start:.1f} {at:.1f}H{x.end:.1f}"/>')
        parts.append(_text("tick end", x.start - 6, at + font * 0.35, tick_text(tick)))
    for tick in x.ticks(max(3, int(plot.paper.width / font / 6))):
        at = x(tick)
        parts.append(f'<path class="rule" d="M{at:.1f} {y.start:.1f}V{y.end:.1f}"/>')
        parts.append(_text("tick middle", at, y.start + font * 1.3, tick_text(tick)))
    parts.append(f'<path class="base" d="M{x.start:.1f} {y.start:.1f}H{x.end:.1f}"/>')
    parts.append(_text("axis", 1, font, plot.chart.y.label))
    parts.append(_text("axis end", x.end, plot.paper.height - font * 0.4, plot.chart.x.label))
    if plot.chart.better:
        up = plot.chart.better == "up"
        at = y.end + font * 1.2 if up else y.start - font * 0.7
        parts.append(_text("better", x.start + 8, at, f"{'↖' if up else '↙'} better"))
    return "".join(parts)


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _points(plot: _Plot, series: Series) -> str:
    return "".join(_point(plot, point, series.mark or Mark(0, "circle"), 6.5) for point in series.points)


def _point(plot: _Plot, point: Point, mark: Mark, radius: float) -> str:
    """One marker with its interval, which can be pointed at and focused."""
    x, y = plot.at(point)
    bar = ""
    if point.low is not None and point.high is not None:
        low, high = plot.y(point.low), plot.y(point.high)
        bar = (
            f'<path class="error" d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"/>'
        )
    tip = escape(point.text)
    return (
        f'<g class="point c{mark.colour}" tabindex="-1" role="img" aria-label="{tip}" data-tip="{tip}" '
        f'data-x="{point.x:.6g}" data-y="{point.y:.6g}"><title>{tip}</title>{bar}'
        f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="{max(radius + 3, 7):g}"/>'
        f"{shape(mark, x, y, radius * point.weight)}</g>"
    )


def shape(mark: Mark, x: float, y: float, radius: float) -> str:
    """A marker around a place."""
    kind = "solid" if mark.fill == "solid" else "hollow"
    dot = f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius * 0.3:.1f}"/>' if mark.fill == "dotted" else ""
    corners = " ".join(f"{x + dx:.1f},{y - dy:.1f}" for dx, dy in mark.outline(radius))
    if not corners:
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>{dot}'
    return f'<polygon class="{kind}" points="{corners}"/>{dot}'


def swatch(mark: Mark) -> str:
    """A marker on its own, for tables and legends."""
    return f'<svg class="swatch c{mark.colour}" viewBox="0 0 16 16" aria-hidden="true">{shape(mark, 8, 8, 5.5)}</svg>'


def _line(plot: _Plot, series: Series) -> str:
    mark = series.mark or Mark(0, "circle")
    joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(plot.at, series.points))
    many = len(series.points) > MOST_STOPS
    every = max(1, len(series.points) // MOST_STOPS)
    stops = "".join(_point(plot, point, mark, 2.2 if many else 4.5) for point in series.points[::every])
    return f'<path class="line c{mark.colour}" d="M{joined}"/><g class="{"dense" if many else "sparse"}">{stops}</g>'


def _step(plot: _Plot, series: Series) -> str:
    """A line that stays level until the next point, and runs on to the right."""
    (x, y), *rest = map(plot.at, series.points)
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)
    return f'<path class="front" d="M{x:.1f} {y:.1f}{steps}H{plot.x.end:.1f}"/>'


def _guide(plot: _Plot, series: Series) -> str:
    joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(plot.at, series.points))
    return f'<path class="guide" d="M{joined}"/>'


def _bars(plot: _Plot, series: Series) -> str:
    places = sorted(plot.x(point.x) for point in series.points)
    gaps = [after - before for before, after in pairwise(places)]
    width = min(14.0, max(3.0, 0.8 * min(gaps, default=14.0)))
    base = plot.y(0.0)
    rects = "".join(
        f'<rect x="{plot.x(point.x) - width / 2:.1f}" y="{plot.y(point.y):.1f}" width="{width:.1f}" '
        f'height="{base - plot.y(point.y):.1f}"/>'
        for point in series.points
    )
    return f'<g class="bars c{series.mark.colour if series.mark else 0}">{rects}</g>'


def _ring(plot: _Plot, series: Series) -> str:
    return "".join(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9"/>' for x, y in map(plot.at, series.points))


LAYERS: Mapping[str, Callable[[_Plot, Series], str]] = {
    "points": _points, "line": _line, "step": _step, "guide": _guide, "bars": _bars, "ring": _ring,
}  # fmt: skip


def _labels(plot: _Plot) -> str:
    """Names next to the points, with a line to those that are further off."""
    named = [series for series in plot.chart.series if series.kind == "points"]
    places = [(series.label, *plot.at(point)) for series in named for point in series.points]
    bounds = (plot.x.start + 2, plot.y.end, plot.paper.width - 2.0, plot.y.start - 2)
    labels = place(places, _lines(plot), bounds, plot.paper.font)
    parts = []
    for label, (_, x, y) in zip(labels, places, strict=True):
        if label.leader:
            parts.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{label.leader[0]:.1f} {label.leader[1]:.1f}"/>')
        parts.append(_text("name", label.x, label.y, label.text))
    return f'<g class="labels" aria-hidden="true">{"".join(parts)}</g>'


def _lines(plot: _Plot) -> list[Box]:
    """Where error bars and the front run: labels had better keep off them."""
    boxes = []
    for series in plot.chart.series:
        places = [plot.at(point) for point in series.points]
        for point, (x, _) in zip(series.points, places, strict=True):
            if point.low is not None and point.high is not None and series.kind == "points":
                boxes.append((x - 4, plot.y(point.high), x + 4, plot.y(point.low)))
        if series.kind == "step":
            for (x, y), (x2, y2) in pairwise([*places, (plot.x.end, places[-1][1])]):
                boxes += [(x, y - 1, x2, y + 1), (x2 - 1, min(y, y2), x2 + 1, max(y, y2))]
    return boxes
