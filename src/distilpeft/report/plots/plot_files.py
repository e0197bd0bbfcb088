"""The page's plots as PNG and SVG files, through matplotlib (extra `report`)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilpeft.report.plots import charts, training_charts
from distilpeft.report.plots.charts import Chart, Series
from distilpeft.report.plots.markers import COLOURS, SHAPES, Mark
from distilpeft.report.schema import Report

DPI, SIZE_IN = 160, (7.2, 4.6)
SETTINGS = {"svg.hashsalt": "distilpeft", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False,
            "axes.spines.right": False}  # fmt: skip
QUIET = "#5b6470"


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write every plot of the reports' page; returns the files, none without matplotlib."""
    return draw(every(reports), folder) if available() else []


def draw(figures: Sequence[Chart], folder: Path) -> list[Path]:
    """Write charts; returns the files, none without matplotlib."""
    if not available():
        return []
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS):
        return [file for chart in figures for file in _files(chart, folder)]


def every(reports: Sequence[Report]) -> list[Chart]:
    """The charts of a page; those of single runs carry a number where there are several."""
    joint = [*charts.latency(reports), *charts.memory(reports), *charts.size(reports)]
    for at, report in enumerate(reports):
        prefix = f"r{at + 1}-" if len(reports) > 1 else ""
        for make in (training_charts.training, training_charts.gradients, training_charts.calibration):
            joint += make(report, prefix)
    return joint


def _files(chart: Chart, folder: Path) -> list[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_IN, layout="constrained")
    axes = figure.add_subplot()
    for axis, name in ((chart.x, "x"), (chart.y, "y")):
        if axis.log:
            getattr(axes, f"set_{name}scale")("log")
        if axis.ticks:
            getattr(axes, f"set_{name}ticks")(axis.ticks, [f"{tick:,}" for tick in axis.ticks])
            getattr(axes, f"set_{name}ticks")([], minor=True)
        getattr(axes, f"set_{name}label")(axis.label)
    axes.set_title(chart.title, loc="left", fontweight="bold")
    axes.grid(color="#e4e5e2", linewidth=0.8)
    axes.set_axisbelow(True)
    points = [point for series in chart.series for point in series.points]
    ys = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
    floor = [0.0] if any(series.kind == "bars" for series in chart.series) else []
    # matplotlib's own limits are singular where a power of ten is alone on a logarithmic axis
    axes.set_xlim(room([point.x for point in points], log=chart.x.log))
    axes.set_ylim(room(ys + floor, log=chart.y.log))
    for series in chart.series:
        _draw(axes, series)
    if any(series.kind in ("points", "line") and series.mark for series in chart.series):
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    files = [folder / f"{chart.name}.{kind}" for kind in ("svg", "png")]
    for file in files:
        # without a date the same figures make the same file
        stamped = {"metadata": {"Date": None}} if file.suffix == ".svg" else {"dpi": DPI}
        figure.savefig(file, **stamped)
    return files


def room(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    """Limits of an axis with some room around the values, also around a single one."""
    places = [math.log10(value) if log else value for value in values if value > 0 or not log] or [0.0]
    low, high = min(places), max(places)
    margin = 0.05 * (high - low) or (0.2 if log else 0.05 * abs(high) or 1.0)
    ends = (low - margin, high + margin)
    return (10 ** ends[0], 10 ** ends[1]) if log else ends


def _draw(axes: Any, series: Series) -> None:
    """One series, as `svg` draws it."""
    xs, ys = [point.x for point in series.points], [point.y for point in series.points]
    mark = series.mark or Mark(0, "circle")
    colour = COLOURS[mark.colour]
    match series.kind:
        case "step":
            axes.step(xs, ys, where="post", color=QUIET, linestyle=":", label=None)
        case "guide":
            axes.plot(xs, ys, color=QUIET, linestyle="--")
        case "bars":
            axes.bar(xs, ys, width=0.02, color=colour, alpha=0.22)
        case "ring":
            axes.scatter(xs, ys, s=130, facecolors="none", edgecolors="black", linewidths=1.2)
        case "line":
            few = len(xs) <= 30
            axes.plot(xs, ys, color=colour, label=series.label, marker=_marker(mark) if few else None, markersize=6)
        case _:
            if all(point.low is not None and point.high is not None for point in series.points):
                spans = [[p.y - (p.low or 0.0) for p in series.points], [(p.high or 0.0) - p.y for p in series.points]]
                axes.errorbar(xs, ys, yerr=spans, fmt="none", ecolor=colour, alpha=0.5, capsize=3)
            face = colour if mark.fill == "solid" else "white"
            sizes = [60 * point.weight for point in series.points]
            axes.scatter(xs, ys, s=sizes, marker=_marker(mark), c=face, edgecolors=colour, label=series.label, zorder=3)
            if mark.fill == "dotted":
                axes.scatter(xs, ys, s=8, c=colour, zorder=4)


def _marker(mark: Mark) -> Any:
    """Matplotlib takes a marker's corners."""
    return list(SHAPES[mark.shape]) or "o"
