"""The joint table of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft.machine import markdown as md
from distilpeft.metrics.timings import summary
from distilpeft.planning.roles import CE_ONLY, CONTROLS, STUDENT, TEACHER
from distilpeft.recipe.task import KINDS, LOWER_IS_BETTER
from distilpeft.tuning import frontier, label_budget
from distilpeft.tuning.sweep_points import Point, label_of, short


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
    every = [artifact.path.name for point in points for artifact in point.plan.steps().values()]
    return {
        "recipe": recipe.name,
        "task": recipe.task.kind,
        "metric": metric,
        "split": recipe.evaluate.split,
        "monitors": sorted(monitors),
        "points": rows,
        "best_by_validation": best,
        "others": _others(points, every_point or points),
        "budget": label_budget.budget(points),
        "frontier": frontier.frontier(points),
        "failed": dict(failed),
        "artifacts": {"made": len(set(every)), "without_sharing": len(every)},
        "teachers": len({point.plan.step("teacher").key for point in points}),
        "caches": len({step.key for point in points if (step := point.plan.find("targets")) is not None}),
    }


def _row(point: Point) -> dict[str, Any]:
    plan = point.plan
    figures = {(step.stage, step.role): step.artifact.figures() for step in plan.own}
    trained, scored = figures["distil", STUDENT], figures["evaluate", STUDENT]
    timed = summary(figures["benchmark", ""], STUDENT)
    assert timed is not None, "the student is the benchmark's reference"
    recipe = plan.recipe
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
        "artifact": plan.artifact("distil", STUDENT).path.name,
    }


def _others(points: Sequence[Point], every: Sequence[Point]) -> list[dict[str, Any]]:
    """Teachers, and students that show where a gain comes from, each once with the values that set it apart."""
    entries: dict[str, dict[str, Any]] = {}
    for point in points:
        students = [(role, point.plan.find("distil", role)) for role in (CE_ONLY, *CONTROLS)]
        for role, trained in ((TEACHER, point.plan.find("teacher")), *students):
            if trained is None or trained.artifact.path.name in entries:
                continue
            steps = [(peer, peer.plan.find(trained.stage, trained.role)) for peer in every]
            users = [peer for peer, step in steps if step is not None and step.key == trained.key]
            scored = point.plan.artifact("evaluate", role).figures()
            timed = summary(point.plan.artifact("benchmark").figures(), role) or {}
            entries[trained.artifact.path.name] = {
                "role": role,
                "values": {
                    key: value
                    for key, value in point.values.items()
                    if len(users) < len(every) and all(peer.values.get(key) == value for peer in users)
                },
                "score": scored["scores"][point.plan.recipe.kind.main],
                "against_teacher": scored.get("against_teacher"),
                "num_parameters": timed.get("num_parameters", 0),
                "size_bytes": timed.get("size_bytes", 0),
                "latency_ms": timed["latency_ms"]["p50"] if timed else None,
                "seconds": trained.artifact.figures()["seconds"],
            }
    return list(entries.values())


def pareto(costs: Sequence[float], scores: Sequence[float], *, lower_is_better: bool) -> list[bool]:
    """Which points no other beats: cheaper without being worse, or better without being dearer."""
    sign = -1 if lower_is_better else 1
    own = [(cost, -sign * score) for cost, score in zip(costs, scores, strict=True)]
    return [not any(a <= c and b <= d and (a, b) != (c, d) for a, b in own) for c, d in own]


def sentences(joint: Mapping[str, Any]) -> list[str]:
    """What the table means."""
    counts, best = joint["artifacts"], joint["points"][joint["best_by_validation"]]
    seconds = sum(row["seconds"] for row in joint["others"] if row["role"] == TEACHER)
    shared = [f"{_count(joint['teachers'], 'teacher')} ({seconds:.0f} s)"]
    if joint["caches"]:
        shared.append(f"{_count(joint['caches'], 'cache')} of soft targets")
    fair = f" The {joint['split']} rows picked nothing." if joint["split"] != "validation" else ""
    return [
        f"{_count(len(joint['points']), 'point')} made {counts['made']} artifacts instead of "
        f"{counts['without_sharing']}: {', '.join(shared)}.",
        f"Best by validation {best['monitor']} ({best['validation']:.4f}): {label_of(best['values'])}.{fair}",
    ]


def _count(count: int, noun: str) -> str:
    return f"one {noun}" if count == 1 else f"{count} {noun}s"


COLUMNS = ("point", "valid.", "test (95 %)", "KL", "params", "size", "ms p50", "train s", "front")
ON_TERMINAL = frozenset({"point", "valid.", "test (95 %)", "KL", "size", "ms p50", "front"})
"""What fits into 80 characters."""


def columns(joint: Mapping[str, Any]) -> tuple[str, ...]:
    """The titles of the table; KL to the teacher is measured for tokens, on the evaluation rows."""
    return tuple(title for title in COLUMNS if title != "KL" or KINDS[joint["task"]].is_language_model)


def cells(joint: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: points, then teachers and baselines."""
    titles = columns(joint)
    rows: list[tuple[str, ...]] = []
    for row in [*joint["points"], *joint["others"]]:
        values = ", ".join(f"{key.rpartition('.')[2]}={short(value)}" for key, value in row["values"].items())
        marks = [word for name, word in (("latency", "speed"), ("size", "size")) if row.get(f"pareto_{name}")]
        score, against = row["score"], row["against_teacher"]
        texts = (
            " ".join(part for part in (row.get("role", ""), values) if part),
            f"{row['validation']:.4f}" if "validation" in row else "-",
            f"{score['value']:.4f} ({score['low']:.2f}-{score['high']:.2f})",
            f"{against['kl']:.4f}" if against else "-",
            f"{row['num_parameters'] / 1e6:.1f}M" if row["num_parameters"] else "-",
            f"{row['size_bytes'] / 1e6:.1f}MB" if row["size_bytes"] else "-",
            f"{row['latency_ms']:.1f}" if row["latency_ms"] is not None else "-",
            f"{row['seconds']:.0f}",
            "+".join(marks) or "-",
        )
        rows.append(tuple(cell for title, cell in zip(COLUMNS, texts, strict=True) if title in titles))
    return rows


def markdown(joint: Mapping[str, Any]) -> str:
    """The sweep as Markdown."""
    titles = columns(joint)
    lines = [f"# Sweep of {joint['recipe']}", "", *(f"- {line}" for line in sentences(joint)), ""]
    lines += md.table([titles, *cells(joint)])
    lines += label_budget.markdown(joint["budget"], joint["metric"])
    lines += frontier.markdown(joint["frontier"], joint["metric"])
    note = f"Test metric: {joint['metric']}. Front: no other point is both better and cheaper."
    return "\n".join([*lines, "", note]) + "\n"


def show(joint: Mapping[str, Any], console: Console) -> None:
    """Print the table and what it means."""
    grid = Table(title=f"sweep of {joint['recipe']}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    titles = columns(joint)
    shown_columns = [index for index, title in enumerate(titles) if title in ON_TERMINAL]
    for index in shown_columns:
        left: Any = {"justify": "left", "overflow": "fold", "min_width": 13}
        grid.add_column(titles[index], **(left if index == 0 else {"justify": "right", "no_wrap": True}))
    for number, row in enumerate(cells(joint)):
        style = "bold" if number == joint["best_by_validation"] else None
        grid.add_row(*(row[index] for index in shown_columns), style=style)
    console.print(grid)
    for line in [*sentences(joint), *frontier.budgets(joint["frontier"], joint["metric"])]:
        console.print(line, highlight=False)
