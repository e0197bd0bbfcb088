"""`distilpeft sweep`: several students or settings on one teacher and one cache, one joint table.

Every point is the recipe with other values for the swept keys. All points live in the recipe's own folder, where an
artifact is found by what it depends on: so the teacher, its soft targets, baselines and evaluations that points share
are made once, an interrupted sweep goes on where it stopped, and a point that was run before costs nothing.
Imports torch only to compute.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft import report
from distilpeft.artifact import digest_json, write_json, write_text
from distilpeft.errors import GateError, InputError
from distilpeft.plan import CE_ONLY, STUDENT, TEACHER, Plan, make_plan
from distilpeft.recipe import LOWER_IS_BETTER, METRICS, Recipe
from distilpeft.recipe_file import load_recipe, parse_values


@dataclass(frozen=True)
class Point:
    """One setting of the swept keys.

    Attributes:
        values: key → value.
        plan: what there is to do.
    """

    values: Mapping[str, Any]
    plan: Plan

    @property
    def label(self) -> str:
        """The values, shortly."""
        return ", ".join(f"{key}={short(value)}" for key, value in self.values.items())


def short(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {short(one)}" for key, one in value.items()) + "}"
    return "[" + ", ".join(map(short, value)) + "]" if isinstance(value, list | tuple) else str(value)


def points(recipe: Path, over: Sequence[str], overrides: Sequence[str], runs: Path) -> list[Point]:
    """Every combination of the swept values, checked as a run checks it.

    Args:
        recipe: the file.
        over: `KEY=V1,V2` for each swept key.
        overrides: `KEY=VALUE` for all points.
        runs: the folder of all runs.

    Raises:
        InputError: an option cannot be read, or a point is no good recipe; the option is named.
    """
    swept = dict(_parse_over(text) for text in over)
    if len(swept) < len(over):
        raise InputError("--over: a key is given twice")
    if not swept:
        raise InputError("--over: give at least one key with its values, such as --over distil.temperature=1,2,4")
    common = [*overrides, *_shared_temperatures(load_recipe(recipe, overrides), swept)]
    found = []
    for values in itertools.product(*swept.values()):
        point = dict(zip(swept, values, strict=True))
        settings = [f"{key}={json.dumps(value)}" for key, value in point.items()]  # JSON is YAML
        try:
            plan = make_plan(load_recipe(recipe, [*common, *settings]), runs)
        except InputError as error:
            said = ", ".join(f"{key}={short(value)}" for key, value in point.items())
            raise InputError(f"--over, at {said}: {error}") from None
        found.append(Point(point, plan))
    return found


def _parse_over(text: str) -> tuple[str, list[Any]]:
    key, found, values = text.partition("=")
    here = f"--over {text}"
    if not found or not key or not values.strip():
        raise InputError(f"{here}: write it as key=value,value")
    if key == "name":
        raise InputError(f"{here}: the points of a sweep share one folder, which the name is")
    parsed = parse_values(values, here)
    if key == "student":
        parsed = [{"model": value} if isinstance(value, str) else value for value in parsed]
    if any(value == other for value, other in itertools.combinations(parsed, 2)):
        raise InputError(f"{here}: a value is given twice")
    return key, parsed


def _shared_temperatures(recipe: Recipe, swept: Mapping[str, Sequence[Any]]) -> list[str]:
    """Let one cache serve every temperature of the sweep."""
    targets = recipe.targets
    keeps_some = targets.mode == "cached" and targets.source is None and targets.format != "full"
    temperatures = [value for value in swept.get("distil.temperature", ()) if isinstance(value, int | float)]
    if recipe.task.kind != "causal_lm" or not keeps_some or targets.temperatures is not None or not temperatures:
        return []
    return [f"targets.temperatures={sorted(float(value) for value in temperatures)}"]


def run(points: Sequence[Point], console: Console) -> int:
    """Do all points, then write and print the table.

    Returns:
        0, or 3 if the figures stopped a point.
    """
    folder = points[0].plan.folder / f"sweep-{key_of(points)}"
    missing = [point for point in points if point.plan.missing()]
    failed: dict[str, str] = {}
    if missing:
        _compute(points, missing, failed, console)
    else:
        console.print(f"nothing to do: all {len(points)} points are done")
    done = [point for point in points if not point.plan.missing()]
    if done:
        joint = table(done, failed)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "sweep.json", joint)
        write_text(folder / "sweep.md", markdown(joint))
        best = done[joint["best_by_validation"]]
        _finish(best.plan)
        show(joint, console)
        console.print(f"Table: {folder / 'sweep.md'}   Best student: {best.plan.folder / 'student'}", soft_wrap=True)
    for label, reason in failed.items():
        console.print(f"stopped: {label}: {reason}", soft_wrap=True)
    return 3 if failed else 0


def _compute(points: Sequence[Point], missing: Sequence[Point], failed: dict[str, str], console: Console) -> None:
    from distilpeft.tasks import read_task_splits

    read_task_splits(missing[0].plan.recipe)  # bad rows are found here, before torch is even imported
    from distilpeft import pipeline
    from distilpeft.runtime import Runtime

    runtime = Runtime()
    for number, point in enumerate(points, 1):
        if point not in missing:
            continue
        console.print(f"point {number}/{len(points)}: {point.label}", soft_wrap=True)
        try:
            pipeline.run(point.plan, runtime=runtime, write_report=False)
        except GateError as error:
            failed[point.label] = str(error)


def _finish(plan: Plan) -> None:
    """The best point's report and student become the folder's."""
    from distilpeft.machine import is_first_process

    if is_first_process():
        report.finish(plan)


def key_of(points: Sequence[Point]) -> str:
    """Names a sweep by what its points are."""
    return digest_json([[dict(point.values), point.plan.artifacts[f"distil/{STUDENT}"].key] for point in points])[:12]


def table(points: Sequence[Point], failed: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the sweep has found.

    Args:
        points: those that are done.
        failed: label → reason.
    """
    recipe = points[0].plan.recipe
    metric = METRICS[recipe.task.kind][0]
    rows = [_row(point) for point in points]
    monitors = {row["monitor"] for row in rows}
    sign = -1 if rows[0]["monitor"] in LOWER_IS_BETTER else 1
    best = max(range(len(rows)), key=lambda index: sign * rows[index]["validation"])
    for front, cost in (("pareto_latency", "latency_ms"), ("pareto_size", "size_bytes")):
        scores = [row["score"]["value"] for row in rows]
        marks = pareto([row[cost] for row in rows], scores, lower_is_better=metric in LOWER_IS_BETTER)
        for row, mark in zip(rows, marks, strict=True):
            row[front] = mark
    every = [made.path.name for point in points for made in point.plan.artifacts.values()]
    return {
        "recipe": recipe.name,
        "metric": metric,
        "split": recipe.evaluate.split,
        "monitors": sorted(monitors),
        "points": rows,
        "best_by_validation": best,
        "others": _others(points),
        "failed": dict(failed),
        "artifacts": {"made": len(set(every)), "without_sharing": len(every)},
        "teachers": len({point.plan.artifacts["teacher"].key for point in points}),
        "caches": len({made.key for point in points if (made := point.plan.artifacts.get("targets")) is not None}),
    }


def _row(point: Point) -> dict[str, Any]:
    figures = {step: made.figures() for step, made in point.plan.artifacts.items()}
    trained, scored, timed = (figures[f"{stage}/{STUDENT}"] for stage in ("distil", "evaluate", "benchmark"))
    recipe = point.plan.recipe
    return {
        "values": dict(point.values),
        "monitor": recipe.monitor(recipe.distil.fit),
        "validation": trained["best_value"],
        "score": scored["scores"][METRICS[recipe.task.kind][0]],
        "scores": scored["scores"],
        "against_teacher": scored["against_teacher"],
        "num_parameters": timed["num_parameters"],
        "size_bytes": timed["size_bytes"],
        "latency_ms": timed["latency_ms"]["p50"],
        "seconds": trained["seconds"],
        "artifact": point.plan.artifacts[f"distil/{STUDENT}"].path.name,
    }


def _others(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The teachers and CE-only students beside the points, each once."""
    found: dict[str, dict[str, Any]] = {}
    for point in points:
        for role, trained in ((TEACHER, "teacher"), (CE_ONLY, f"distil/{CE_ONLY}")):
            made = point.plan.artifacts
            if trained not in made or made[trained].path.name in found:
                continue
            timed = made[f"benchmark/{role}"].figures()
            found[made[trained].path.name] = {
                "role": role,
                "values": {k: v for k, v in point.values.items() if role == CE_ONLY and k.startswith("student")},
                "score": made[f"evaluate/{role}"].figures()["scores"][METRICS[point.plan.recipe.task.kind][0]],
                "num_parameters": timed["num_parameters"],
                "size_bytes": timed["size_bytes"],
                "latency_ms": timed["latency_ms"]["p50"],
                "seconds": made[trained].figures()["seconds"],
            }
    return list(found.values())


def pareto(costs: Sequence[float], scores: Sequence[float], *, lower_is_better: bool) -> list[bool]:
    """Which points no other beats: cheaper without being worse, or better without being dearer."""
    sign = -1 if lower_is_better else 1
    own = [(cost, -sign * score) for cost, score in zip(costs, scores, strict=True)]
    return [not any(a <= c and b <= d and (a, b) != (c, d) for a, b in own) for c, d in own]


def sentences(joint: Mapping[str, Any]) -> list[str]:
    """What the table means."""
    made, count = joint["artifacts"], len(joint["points"])
    best = joint["points"][joint["best_by_validation"]]
    values = ", ".join(f"{key}={short(value)}" for key, value in best["values"].items())
    return [
        f"{count} points made {made['made']} artifacts instead of {made['without_sharing']}: "
        f"{joint['teachers']} teacher(s), {joint['caches']} cache(s) of soft targets.",
        f"Best by validation {best['monitor']} ({best['validation']:.4f}): {values}. "
        f"The {joint['split']} rows picked nothing.",
    ]


COLUMNS = ("point", "validation", "test (95 %)", "params", "size", "ms p50", "train s", "front")
ON_TERMINAL = (0, 1, 2, 4, 5, 7)  # what fits into 80 characters


def cells(joint: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: points, then teachers and baselines."""
    rows: list[tuple[str, ...]] = []
    for row in [*joint["points"], *joint["others"]]:
        values = ", ".join(f"{key.rpartition('.')[2]}={short(value)}" for key, value in row["values"].items())
        marks = [word for name, word in (("latency", "speed"), ("size", "size")) if row.get(f"pareto_{name}")]
        score = row["score"]
        rows.append((
            " ".join(part for part in (row.get("role", ""), values) if part),
            f"{row['validation']:.4f}" if "validation" in row else "-",
            f"{score['value']:.4f} ({score['low']:.2f}-{score['high']:.2f})",
            f"{row['num_parameters'] / 1e6:.1f}M",
            f"{row['size_bytes'] / 1e6:.1f}MB",
            f"{row['latency_ms']:.1f}",
            f"{row['seconds']:.0f}",
            "+".join(marks) or "-",
        ))  # fmt: skip
    return rows


def markdown(joint: Mapping[str, Any]) -> str:
    """The sweep as Markdown."""
    lines = [f"# Sweep of {joint['recipe']}", "", *(f"- {line}" for line in sentences(joint)), ""]
    lines += [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS), *(" | ".join(row) for row in cells(joint))]
    note = f"Test metric: {joint['metric']}. Front: no other point is both better and cheaper."
    return "\n".join([*lines, "", note]) + "\n"


def show(joint: Mapping[str, Any], console: Console) -> None:
    """Print the table and what it means."""
    shown = Table(title=f"sweep of {joint['recipe']}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index in ON_TERMINAL:
        left: Any = {"justify": "left", "overflow": "fold", "min_width": 18}
        shown.add_column(COLUMNS[index], **(left if index == 0 else {"justify": "right", "no_wrap": True}))
    for number, row in enumerate(cells(joint)):
        style = "bold" if number == joint["best_by_validation"] else None
        shown.add_row(*(row[index] for index in ON_TERMINAL), style=style)
    console.print(shown)
    for line in sentences(joint):
        console.print(line, highlight=False)
