"""What labels are worth: a sweep over `data.labelled` as a curve for each way to train the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilpeft.machine import markdown as md
from distilpeft.planning.roles import CE_LONG, CE_ONLY, HARD, LABELLED, STUDENT, TEACHER
from distilpeft.recipe.task import gap, gap_unit
from distilpeft.report import build, verdict
from distilpeft.report.plots import plot_files
from distilpeft.report.plots.charts import Axis, Chart, Series
from distilpeft.report.plots.charts import Point as Dot
from distilpeft.report.plots.markers import mark
from distilpeft.report.schema import Report
from distilpeft.tuning.sweep_points import Point

KEY = "data.labelled"
NAMES = {
    TEACHER: "teacher", STUDENT: "student", HARD: "student, teacher's likeliest class",
    LABELLED: "student, teacher on labelled rows", CE_LONG: "labels alone, as many steps", CE_ONLY: "labels alone",
}  # fmt: skip
PLOT = "label-budget"


def budget(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One entry per number of labels, ascending; empty for a sweep over anything else.

    Args:
        points: those that are done.

    Returns:
        `labels`; `scores`: role → `value`, `low`, `high`, of one seed with the 95 % interval over rows, of several the
        mean with the lowest and the highest; `lead`: how far the student is ahead of labels alone, `value`, `low` and
        `high` (95 %), and `against`, the better of the students on labels alone.
    """
    if any(set(point.values) != {KEY} for point in points):
        return []
    reports = {int(point.values[KEY]): build.build(point.plan) for point in points}
    return [_entry(labels, reports[labels]) for labels in sorted(reports)]


def _entry(labels: int, report: Report) -> dict[str, Any]:
    over = {} if report.seeds is None else {model.role: model for model in report.seeds.models}
    scores = {}
    for role in NAMES:
        model = report.model(role)
        if model is None:
            continue
        score = model.scores[report.metric]
        scores[role] = {"value": score.value, "low": score.low, "high": score.high}
        if role in over:
            values = over[role].values
            scores[role] = {"value": over[role].mean, "low": min(values), "high": max(values)}
    against = verdict.on_labels(report)
    lead = verdict.lead(report, STUDENT, against)
    entry = None
    if lead is not None:
        entry = {"against": against, "value": lead.value, "low": lead.low, "high": lead.high}
    return {"labels": labels, "scores": scores, "lead": entry}


def fades(entries: Sequence[Mapping[str, Any]]) -> int | None:
    """From how many labels on the student is not ahead of labels alone beyond chance; None if it is to the end."""
    count = None
    for entry in reversed(entries):
        if entry["lead"] is None or entry["lead"]["low"] > 0:
            break
        count = int(entry["labels"])
    return count


def markdown(entries: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """The curves as a table, and where the gain fades; nothing for no entries."""
    if not entries:
        return []
    roles = [role for role in NAMES if any(role in entry["scores"] for entry in entries)]
    unit = gap_unit(metric)
    titles = ["labels", *(NAMES[role] for role in roles), f"student less labels alone{',' * bool(unit)}{unit} (95 %)"]
    rows = []
    for entry in entries:
        cells = [f"{entry['scores'][role]['value']:.4f}" if role in entry["scores"] else "-" for role in roles]
        lead = entry["lead"]
        gains = () if lead is None else tuple(gap(metric, lead[name]) for name in ("value", "low", "high"))
        rows.append([str(entry["labels"]), *cells, "{} ({} to {})".format(*gains) if gains else "-"])
    at = fades(entries)
    end = f"From {at} labels on, the student is not ahead of labels alone beyond chance."
    lines = ["", f"## {metric} by number of labels", "", *md.table([titles, *rows])]
    return [*lines, "", end if at is not None else "With the most labels, too, the student is ahead of labels alone."]


def draw(entries: Sequence[Mapping[str, Any]], metric: str, folder: Path) -> list[Path]:
    """The plot's files; none for no entries, or without matplotlib."""
    if not entries:
        return []
    series = []
    for role, name in NAMES.items():
        dots = tuple(
            Dot(entry["labels"], score["value"], score["low"], score["high"])
            for entry in entries
            if (score := entry["scores"].get(role)) is not None
        )
        if dots:
            series += [Series(name, dots, mark(role), "line"), Series("", dots, mark(role), "points")]
    labels = Axis("labels", log=True, ticks=tuple(int(entry["labels"]) for entry in entries))
    chart = Chart(PLOT, f"{metric} by number of labels", labels, Axis(metric), tuple(series), (), ())
    return plot_files.draw([chart], folder)
