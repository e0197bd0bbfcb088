"""`distilpeft sweep`: several students or settings on one teacher and one cache, one joint table.

Every point is the recipe with other values for the swept keys. All points live in the recipe's own folder, where an
artifact is found by what it depends on: so the teacher, its soft targets, baselines and evaluations that points share
are made once, an interrupted sweep goes on where it stopped, and a point that was run before costs nothing.
Imports torch only to compute.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft import launch
from distilpeft.errors import GateError, InputError
from distilpeft.machine.files import digest_json, write_json, write_text
from distilpeft.machine.host import is_first_process, num_launched
from distilpeft.machine.processes import spread
from distilpeft.planning.plan import Plan, make_plan
from distilpeft.planning.roles import CE_ONLY, LAST_STAGES, STUDENT, TEACHER
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import KINDS, LOWER_IS_BETTER
from distilpeft.recipe.yaml_file import load_recipe, parse_values
from distilpeft.report import publish
from distilpeft.report.timings import summary


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
        return label_of(self.values)


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
    swept = dict(parse_over(text) for text in over)
    if len(swept) < len(over):
        raise InputError("--over: a key is given twice")
    if not swept:
        raise InputError("--over: give at least one key with its values, such as --over distil.temperature=1,2,4")
    values = [dict(zip(swept, combined, strict=True)) for combined in itertools.product(*swept.values())]
    settings = [[*overrides, *settings_of(point)] for point in values]
    recipes = []
    for point, given in zip(values, settings, strict=True):
        with named("--over", point):
            recipes.append(load_recipe(recipe, given))
    refuse_incomparable("--over", values, recipes)
    shared = shared_temperatures(recipes)
    found = []
    for point, given, own in zip(values, settings, recipes, strict=True):
        whole = [*given, *shared] if shared and _keeps_some(own) else given
        with named("--over", point):
            found.append(Point(point, make_plan(load_recipe(recipe, whole), runs)))
    return found


@contextmanager
def named(option: str, values: Mapping[str, Any]) -> Iterator[None]:
    """Let faults name the option and the values."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}, at {label_of(values)}: {error}") from None


def label_of(values: Mapping[str, Any]) -> str:
    """Values in a line."""
    return ", ".join(f"{key}={short(value)}" for key, value in values.items())


def settings_of(values: Mapping[str, Any]) -> list[str]:
    """Values as overrides of a recipe."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]  # JSON is YAML


def refuse_incomparable(option: str, values: Sequence[Mapping[str, Any]], recipes: Sequence[Recipe]) -> None:
    """Refuse points that are one and the same, or that no single figure can rank.

    Raises:
        InputError: there are some; `option` is what to call them by.
    """
    seen: list[tuple[Mapping[str, Any], dict[str, Any]]] = []
    for point, recipe in zip(values, recipes, strict=True):
        whole = recipe.model_dump()
        same = next((other for other, known in seen if known == whole), None)
        if same is not None:
            raise InputError(
                f"{option}, at {label_of(point)}: the same recipe as at {label_of(same)}; one key hides another"
            )
        seen.append((point, whole))
    for what, found in (
        ("distil.fit.monitor", {recipe.monitor(recipe.distil.fit) for recipe in recipes}),
        ("evaluate.split", {recipe.evaluate.split for recipe in recipes}),
        ("task.kind", {recipe.task.kind for recipe in recipes}),
    ):
        if len(found) > 1:
            raise InputError(f"{option}: {what} is {' or '.join(sorted(found))}, and such points cannot be compared")


def parse_over(text: str) -> tuple[str, list[Any]]:
    """Read `KEY=V1,V2`.

    Raises:
        InputError: it cannot be read.
    """
    key, found, values = text.partition("=")
    here = f"--over {text}"
    if not found or not key or not values.strip():
        raise InputError(f"{here}: write it as key=value,value")
    if key == "name":
        raise InputError(f"{here}: the points of a sweep share one folder, which the name is")
    parsed = parse_values(values, here)
    try:
        json.dumps(parsed)
    except TypeError as error:  # YAML has dates and sets, recipes do not
        raise InputError(f"{here}: no recipe holds such a value: {error}") from None
    if key == "student":
        parsed = [{"model": value} if isinstance(value, str) else value for value in parsed]
    if any(value == other for value, other in itertools.combinations(parsed, 2)):
        raise InputError(f"{here}: a value is given twice")
    return key, parsed


def _keeps_some(recipe: Recipe) -> bool:
    """Whether the point's cache serves only temperatures that are listed, and the recipe leaves the list open."""
    targets = recipe.targets
    cached = targets.mode == "cached" and targets.source is None and recipe.distil.alpha > 0
    return recipe.kind.language and cached and targets.format != "full" and targets.temperatures is None


def shared_temperatures(recipes: Sequence[Recipe]) -> list[str]:
    """What to set so that one cache serves every temperature of the sweep."""
    found = sorted({recipe.distil.temperature for recipe in recipes if _keeps_some(recipe)})
    return settings_of({"targets.temperatures": found}) if len(found) > 1 else []


def run(points: Sequence[Point], console: Console, jobs: int = 1) -> int:
    """Do all points, then write and print the table.

    Args:
        points: what `points` has found.
        console: for the table.
        jobs: worker processes on this machine.

    Returns:
        0, or 3 if the figures stopped a point.
    """
    folder = points[0].plan.folder / f"sweep-{key_of(points)}"
    failed: dict[str, str] = {}
    if num_launched() > 1 or any(point.plan.missing() for point in points):  # torchrun's processes go on together
        failed = _compute(points, console, jobs)
    else:
        console.print(f"nothing to do: all {len(points)} points are done")
    done = [point for point in points if not point.plan.missing()]
    if done:
        joint = table(done, failed, points)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "sweep.json", joint)
        write_text(folder / "sweep.md", markdown(joint))
        best = done[joint["best_by_validation"]]
        if is_first_process():  # the best point's report and student become the folder's
            publish.finish(best.plan)
        show(joint, console)
        console.print(f"Table: {folder / 'sweep.md'}   Best student: {best.plan.folder / 'student'}", soft_wrap=True)
    for label, reason in failed.items():
        console.print(f"stopped: {label}: {reason}", soft_wrap=True)
    return 3 if failed else 0


def _compute(points: Sequence[Point], console: Console, jobs: int) -> dict[str, str]:
    """Make what is missing; returns the points that their figures have stopped, and why."""
    from distilpeft.tasks.rows import read_task_splits

    read_task_splits(points[0].plan.recipe)  # bad rows are found here, before torch is even imported
    stopped: dict[Path, GateError] = {}
    untimed = any(step.partition("/")[0] not in LAST_STAGES for point in points for step in point.plan.missing())
    if jobs > 1 and untimed:
        for found in spread(jobs, train_points, [points], console):
            stopped |= found
    plan = points[0].plan
    devices = 1 if jobs > 1 else plan.recipe.devices
    stopped = launch.on_devices(devices, finish_points, (points, stopped), plan.folder)
    failed: dict[str, str] = {}
    for point in points:
        for made in point.plan.artifacts.values():
            if made.path in stopped:
                failed.setdefault(point.label, str(stopped[made.path]))
    return failed


def finish_points(points: Sequence[Point], stopped: Mapping[Path, GateError]) -> dict[Path, GateError]:
    """All that is left to do, by all processes together; returns what the figures have stopped, now and before."""
    from distilpeft import pipeline

    return pipeline.do(_jobs(points), pipeline.runtime_of(points[0].plan.recipe), failed=stopped)


def train_points(number: int, points: Sequence[Point]) -> dict[Path, GateError]:
    """What a worker does: all but the timing, for which the machine has to be quiet.

    Args:
        number: which worker this is.
        points: those of the whole sweep.

    Returns:
        What its figures have stopped.
    """
    from distilpeft import pipeline

    runtime = pipeline.runtime_of(points[0].plan.recipe, f"[{number}] ")
    return pipeline.do([job for job in _jobs(points) if job.stage not in LAST_STAGES], runtime)


def _jobs(points: Sequence[Point]) -> list[Any]:
    from distilpeft.pipeline import Job

    return [Job(point.plan, step, point.label) for point in points for step in point.plan.artifacts]


def key_of(points: Sequence[Point]) -> str:
    """Names a sweep by what its points are."""
    return digest_json([[dict(point.values), point.plan.artifacts[f"distil/{STUDENT}"].key] for point in points])[:12]


def table(
    points: Sequence[Point], failed: Mapping[str, str], every_point: Sequence[Point] | None = None
) -> dict[str, Any]:
    """Everything that the sweep has found.

    Args:
        points: those that are done.
        failed: label → reason.
        every_point: those that are not done, too; default: `points`.
    """
    recipe = points[0].plan.recipe
    metric = recipe.kind.main
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
        "task": recipe.task.kind,
        "metric": metric,
        "split": recipe.evaluate.split,
        "monitors": sorted(monitors),
        "points": rows,
        "best_by_validation": best,
        "others": _others(points, every_point or points),
        "failed": dict(failed),
        "artifacts": {"made": len(set(every)), "without_sharing": len(every)},
        "teachers": len({point.plan.artifacts["teacher"].key for point in points}),
        "caches": len({made.key for point in points if (made := point.plan.artifacts.get("targets")) is not None}),
    }


def _row(point: Point) -> dict[str, Any]:
    figures = {step: made.figures() for step, made in point.plan.artifacts.items()}
    trained, scored = (figures[f"{stage}/{STUDENT}"] for stage in ("distil", "evaluate"))
    timed = summary(figures["benchmark"], STUDENT)
    assert timed is not None, "the student is the benchmark's reference"
    recipe = point.plan.recipe
    return {
        "values": dict(point.values),
        "monitor": recipe.monitor(recipe.distil.fit),
        "validation": trained["best_value"],
        "score": scored["scores"][recipe.kind.main],
        "scores": scored["scores"],
        "against_teacher": scored["against_teacher"],
        "num_parameters": timed["num_parameters"],
        "size_bytes": timed["size_bytes"],
        "latency_ms": timed["latency_ms"]["p50"],
        "seconds": trained["seconds"],
        "artifact": point.plan.artifacts[f"distil/{STUDENT}"].path.name,
    }


def _others(points: Sequence[Point], every: Sequence[Point]) -> list[dict[str, Any]]:
    """The teachers and CE-only students beside the points, each once, with the values that set it apart."""
    found: dict[str, dict[str, Any]] = {}
    for point in points:
        for role, trained in ((TEACHER, "teacher"), (CE_ONLY, f"distil/{CE_ONLY}")):
            made = point.plan.artifacts
            if trained not in made or made[trained].path.name in found:
                continue
            users = [one for one in every if _name_of(one, trained) == made[trained].path.name]
            scored = made[f"evaluate/{role}"].figures()
            timed = summary(made["benchmark"].figures(), role) or {}
            found[made[trained].path.name] = {
                "role": role,
                "values": {
                    key: value
                    for key, value in point.values.items()
                    if len(users) < len(every) and all(one.values[key] == value for one in users)
                },
                "score": scored["scores"][point.plan.recipe.kind.main],
                "against_teacher": scored.get("against_teacher"),
                "num_parameters": timed.get("num_parameters", 0),
                "size_bytes": timed.get("size_bytes", 0),
                "latency_ms": timed["latency_ms"]["p50"] if timed else None,
                "seconds": made[trained].figures()["seconds"],
            }
    return list(found.values())


def _name_of(point: Point, step: str) -> str | None:
    made = point.plan.artifacts.get(step)
    return made.path.name if made is not None else None


def pareto(costs: Sequence[float], scores: Sequence[float], *, lower_is_better: bool) -> list[bool]:
    """Which points no other beats: cheaper without being worse, or better without being dearer."""
    sign = -1 if lower_is_better else 1
    own = [(cost, -sign * score) for cost, score in zip(costs, scores, strict=True)]
    return [not any(a <= c and b <= d and (a, b) != (c, d) for a, b in own) for c, d in own]


def sentences(joint: Mapping[str, Any]) -> list[str]:
    """What the table means."""
    made, best = joint["artifacts"], joint["points"][joint["best_by_validation"]]
    seconds = sum(row["seconds"] for row in joint["others"] if row["role"] == TEACHER)
    shared = [f"{_counted(joint['teachers'], 'teacher')} ({seconds:.0f} s)"]
    if joint["caches"]:
        shared.append(f"{_counted(joint['caches'], 'cache')} of soft targets")
    fair = f" The {joint['split']} rows picked nothing." if joint["split"] != "validation" else ""
    return [
        f"{_counted(len(joint['points']), 'point')} made {made['made']} artifacts instead of "
        f"{made['without_sharing']}: {', '.join(shared)}.",
        f"Best by validation {best['monitor']} ({best['validation']:.4f}): {label_of(best['values'])}.{fair}",
    ]


def _counted(count: int, noun: str) -> str:
    return f"one {noun}" if count == 1 else f"{count} {noun}s"


COLUMNS = ("point", "valid.", "test (95 %)", "KL", "params", "size", "ms p50", "train s", "front")
ON_TERMINAL = frozenset({"point", "valid.", "test (95 %)", "KL", "size", "ms p50", "front"})
"""What fits into 80 characters."""


def columns(joint: Mapping[str, Any]) -> tuple[str, ...]:
    """The titles of the table; KL to the teacher is measured for tokens, on the evaluation rows."""
    return tuple(title for title in COLUMNS if title != "KL" or KINDS[joint["task"]].language)


def cells(joint: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: points, then teachers and baselines."""
    titles = columns(joint)
    rows: list[tuple[str, ...]] = []
    for row in [*joint["points"], *joint["others"]]:
        values = ", ".join(f"{key.rpartition('.')[2]}={short(value)}" for key, value in row["values"].items())
        marks = [word for name, word in (("latency", "speed"), ("size", "size")) if row.get(f"pareto_{name}")]
        score, against = row["score"], row["against_teacher"]
        found = (
            " ".join(part for part in (row.get("role", ""), values) if part),
            f"{row['validation']:.4f}" if "validation" in row else "-",
            f"{score['value']:.4f} ({score['low']:.2f}-{score['high']:.2f})",
            f"{against['kl']:.4f}" if against else "-",
            f"{row['num_parameters'] / 1e6:.1f}M",
            f"{row['size_bytes'] / 1e6:.1f}MB",
            f"{row['latency_ms']:.1f}" if row["latency_ms"] is not None else "-",
            f"{row['seconds']:.0f}",
            "+".join(marks) or "-",
        )
        rows.append(tuple(cell for title, cell in zip(COLUMNS, found, strict=True) if title in titles))
    return rows


def markdown(joint: Mapping[str, Any]) -> str:
    """The sweep as Markdown."""
    titles = columns(joint)
    lines = [f"# Sweep of {joint['recipe']}", "", *(f"- {line}" for line in sentences(joint)), ""]
    lines += [" | ".join(titles), " | ".join("---" for _ in titles), *(" | ".join(row) for row in cells(joint))]
    note = f"Test metric: {joint['metric']}. Front: no other point is both better and cheaper."
    return "\n".join([*lines, "", note]) + "\n"


def show(joint: Mapping[str, Any], console: Console) -> None:
    """Print the table and what it means."""
    shown = Table(title=f"sweep of {joint['recipe']}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    titles = columns(joint)
    shown_columns = [index for index, title in enumerate(titles) if title in ON_TERMINAL]
    for index in shown_columns:
        left: Any = {"justify": "left", "overflow": "fold", "min_width": 13}
        shown.add_column(titles[index], **(left if index == 0 else {"justify": "right", "no_wrap": True}))
    for number, row in enumerate(cells(joint)):
        style = "bold" if number == joint["best_by_validation"] else None
        shown.add_row(*(row[index] for index in shown_columns), style=style)
    console.print(shown)
    for line in sentences(joint):
        console.print(line, highlight=False)
