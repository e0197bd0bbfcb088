"""What a student of each size and speed gives: the exports of a sweep's students, from small and fast to good.

Points that differ in `seed` only are one student; its scores are means then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from distilpeft.machine import markdown as md
from distilpeft.planning.roles import STUDENT, TEACHER
from distilpeft.recipe.task import LOWER_IS_BETTER
from distilpeft.report import build
from distilpeft.report.plots import plot_files
from distilpeft.report.plots.charts import Axis, Chart, Series, front, number, spoken
from distilpeft.report.plots.charts import Point as Dot
from distilpeft.report.plots.markers import Mark, mark
from distilpeft.report.schema import Model, Report
from distilpeft.tuning.sweep_points import Point, label_of, short

SEED = "seed"
PLOT = "frontier"
COSTS = {"latency": "latency_ms", "size": "size_bytes"}
"""Front → what a model costs there."""
STEPS = (1, 2, 5)
"""Budgets are these times a power of ten."""


def frontier(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One entry for each form of each student, and for each teacher; none for a sweep over one student.

    Args:
        points: those that are done.

    Returns:
        `student`: its name; `values` of the swept keys but the seed; `form`: of its export, `student` without exports,
        or `teacher`; `seeds`: how many; `score`: `value`, `low`, `high`, of one seed with the 95 % interval over rows,
        of several the mean with the lowest and the highest; `size_bytes`, `memory_bytes`, `latency_ms` (p50 of one
        row) and `rows_per_s`, from the text where that was measured, as `with_encoding` says; `speedup` over the
        teacher of the same run; `front_latency`, `front_size`: whether no other is both better and cheaper.
    """
    groups = _students(points)
    if len(groups) < 2:
        return []
    entries = []
    metric = points[0].plan.recipe.kind.main
    for name, values, group in groups:
        reports = [build.build(point.plan) for point in group]
        for form in _forms(reports[0]):
            entries.append(_entry(name, values, form, reports))
    teachers = {point.plan.step("teacher").key: point for point in points}
    reports = [build.build(point.plan) for point in teachers.values()]
    entries.append(_entry("teacher", {}, TEACHER, reports))
    for cost, key in COSTS.items():
        own = [entry for entry in entries if entry["form"] != TEACHER and entry[key]]
        dots = {id(entry): Dot(entry[key], entry["score"]["value"]) for entry in own}
        edge = front(list(dots.values()), metric in LOWER_IS_BETTER)
        for entry in entries:
            entry[f"front_{cost}"] = dots.get(id(entry)) in edge
    return entries


def _students(points: Sequence[Point]) -> list[tuple[str, dict[str, Any], list[Point]]]:
    """Name, values and points of each student."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        values = {key: value for key, value in point.values.items() if key != SEED}
        groups.setdefault(json.dumps(values, sort_keys=True), []).append(point)
    swept = {key for point in points for key in point.values}
    if not any(key.split(".")[0] == "student" for key in swept):
        return []
    found = []
    for group in groups.values():
        values = {key: value for key, value in group[0].values.items() if key != SEED}
        found.append((_name(group[0], values), values, group))
    return found


def _name(point: Point, values: Mapping[str, Any]) -> str:
    """A student in few words: how it begins, and what else was swept."""
    student = point.plan.recipe.student
    words = student.words
    others = {key: value for key, value in values.items() if key.split(".")[0] != "student"}
    if student.vocabulary is not None:
        given = student.vocabulary.model_dump(exclude_defaults=True, exclude={"from"})
        words += ", vocabulary cut" + (f" ({label_of(given)})" if given else "")
    return ", ".join([words, *(f"{key.rpartition('.')[2]}={short(value)}" for key, value in others.items())])


def _forms(report: Report) -> list[str]:
    """The roles of a run's exports that were timed, or its student."""
    exports = [model.role for model in report.models if model.is_export]
    return exports or [STUDENT]


def _entry(name: str, values: Mapping[str, Any], role: str, reports: Sequence[Report]) -> dict[str, Any]:
    """One form of one student, over its seeds."""
    models = [model for report in reports if (model := report.model(role)) is not None]
    teachers = [report.model(TEACHER) for report in reports]
    metric = reports[0].metric
    scores = [model.scores[metric] for model in models]
    numbers = [score.value for score in scores]
    several = len(numbers) > 1
    with_encoding = all(model.text_latency_ms for model in models)
    latencies = [_latency(model, with_encoding) for model in models]
    pairs = [
        _latency(teacher, with_encoding) / latency
        for teacher, latency in zip(teachers, latencies, strict=True)
        if teacher is not None and latency and _latency(teacher, with_encoding)
    ]
    return {
        "student": name,
        "values": dict(values),
        "form": models[0].name,
        "seeds": len(models),
        "score": {
            "value": mean(numbers),
            "low": min(numbers) if several else scores[0].low,
            "high": max(numbers) if several else scores[0].high,
        },
        "size_bytes": _middle(models, lambda model: model.size_bytes),
        "memory_bytes": _middle(models, lambda model: model.memory_bytes),
        "latency_ms": median(latencies) or None,
        "rows_per_s": _middle(
            models, lambda model: model.text_rows_per_s if with_encoding else model.throughput_rows_per_s
        ),
        "with_encoding": with_encoding,
        "speedup": median(pairs) if pairs else None,
    }


def _latency(model: Model, with_encoding: bool) -> float:
    """p50 of one row, from its text or from its tokens; 0 for a model that was not timed."""
    timed = model.text_latency_ms if with_encoding else model.latency_ms
    return float(timed.p50) if timed else 0.0


def _middle(models: Sequence[Model], of: Callable[[Model], float | None]) -> float | None:
    values = [value for model in models if (value := of(model)) is not None]
    return median(values) if values else None


TITLES = ("student", "form", "score", "MB", "memory MB", "ms p50", "rows/s", "× teacher", "front")


def table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The entries as lines of Markdown."""
    rows = []
    for entry in entries:
        marks = [word for cost, word in (("latency", "speed"), ("size", "size")) if entry[f"front_{cost}"]]
        score = entry["score"]
        rows.append([
            entry["student"],
            entry["form"],
            f"{score['value']:.4f} ({score['low']:.3f} to {score['high']:.3f})",
            *(number(entry[key] / 1e6 if entry[key] else None, 3) for key in ("size_bytes", "memory_bytes")),
            *(number(entry[key], 3) for key in ("latency_ms", "rows_per_s", "speedup")),
            "+".join(marks) or "–",
        ])  # fmt: skip
    return md.table([TITLES, *rows])


def budgets(entries: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """What to deploy under a limit on size or latency, where a larger limit gives something better."""
    lines = []
    for key, unit, scale in (("size_bytes", "MB", 1e6), ("latency_ms", "ms", 1.0)):
        own = [entry for entry in entries if entry["form"] != TEACHER and entry[key]]
        if not own:
            continue
        sign = -1 if metric in LOWER_IS_BETTER else 1
        best = None
        for limit in _limits([entry[key] / scale for entry in own]):
            fit = [entry for entry in own if entry[key] / scale <= limit]
            choice = max(fit, key=lambda entry: (sign * entry["score"]["value"], -entry[key]), default=None)
            if choice is None or choice is best:
                continue
            best = choice
            lines.append(
                f"Up to {limit:g} {unit}: {choice['student']}, {choice['form']}: {metric} "
                f"{choice['score']['value']:.4f}, {choice[key] / scale:.3g} {unit}."
            )
    return lines


def _limits(costs: Sequence[float]) -> list[float]:
    """Round limits from one that only the cheapest meets, or so, to one that all meet."""
    ladder = [step * 10.0**power for power in range(-4, 7) for step in STEPS]
    first = next(limit for limit in ladder if limit >= min(costs))
    last = next(limit for limit in ladder if limit >= max(costs))
    return [limit for limit in ladder if first <= limit <= last]


def markdown(entries: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Table and budgets; nothing for no entries."""
    if not entries:
        return []
    how = "from the text" if all(entry["with_encoding"] for entry in entries) else "of encoded rows"
    span = "95 % over rows" if all(entry["seeds"] == 1 for entry in entries) else "lowest to highest of the seeds"
    note = (
        f"{metric} ({span}); latency of one row and rows/s of the largest batch {how}; front: no other is both better "
        "and cheaper. Chosen by the scores of this table, so expect a little less of new rows."
    )
    return ["", "## What each size gives", "", *table(entries), "", *(f"- {line}" for line in budgets(entries, metric)),
            "", note]  # fmt: skip


def draw(entries: Sequence[Mapping[str, Any]], metric: str, folder: Path) -> list[Path]:
    """The plot's files, score over latency; none for no entries, or without matplotlib."""
    return plot_files.draw([chart], folder) if (chart := _chart(entries, metric)) is not None else []


def _chart(entries: Sequence[Mapping[str, Any]], metric: str) -> Chart | None:
    timed = [entry for entry in entries if entry["latency_ms"]]
    if not timed:
        return None
    students = list(dict.fromkeys(entry["student"] for entry in timed))
    series = []
    for entry in timed:
        score = entry["score"]
        dot = Dot(entry["latency_ms"], score["value"], score["low"], score["high"])
        look = mark(TEACHER) if entry["form"] == TEACHER else _look(students.index(entry["student"]), entry["form"])
        label = entry["student"] if entry["form"] == TEACHER else f"{entry['student']}, {entry['form']}"
        series.append(Series(label, (dot,), look))
    edge = [Dot(entry["latency_ms"], entry["score"]["value"]) for entry in timed if entry["front_latency"]]
    lower = metric in LOWER_IS_BETTER
    how = ", with encoding" if all(entry["with_encoding"] for entry in timed) else ""
    return Chart(
        PLOT, "What each size gives", Axis(f"latency p50 of one row{how} (ms)", log=True), Axis(spoken(metric)),
        (Series("", tuple(sorted(edge, key=lambda dot: dot.x)), kind="step"), *series), (), (),
        better="down" if lower else "up",
    )  # fmt: skip


def _look(student: int, form: str) -> Mark:
    """A colour for each student, a shape for each form."""
    return Mark(1 + student % 11, mark(f"export:{form}").shape if form != STUDENT else "circle")
