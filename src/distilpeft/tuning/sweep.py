"""`distilpeft sweep`: several students or settings on one teacher and one cache, one joint table.

Every point is the recipe with other values for the swept keys. All points live in the recipe's own folder, where an
artifact is found by what it depends on: so the teacher, its soft targets, baselines and evaluations that points share
are made once, an interrupted sweep goes on where it stopped, and a point that was run before costs nothing.
Imports torch only to compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from distilpeft.errors import GateError
from distilpeft.machine.files import digest_json, write_json, write_text
from distilpeft.machine.host import is_first_process, num_launched
from distilpeft.machine.locks import in_use
from distilpeft.machine.processes import spread
from distilpeft.pipeline import launch
from distilpeft.planning.roles import LAST_STAGES, STUDENT
from distilpeft.report import publish
from distilpeft.storage import records
from distilpeft.tuning import frontier, label_budget
from distilpeft.tuning.sweep_points import Point
from distilpeft.tuning.sweep_table import markdown, show, table

if TYPE_CHECKING:  # it imports torch
    from distilpeft.pipeline.jobs import Job


def run(points: Sequence[Point], console: Console, jobs: int = 1) -> int:
    """Do all points, then write and print the table.

    Args:
        points: what `points` has found.
        console: for the table.
        jobs: worker processes on this machine.

    Returns:
        0, or 3 if the figures stopped a point.
    """
    with in_use(points[0].plan.folder):
        return _run(points, console, jobs)


def _run(points: Sequence[Point], console: Console, jobs: int) -> int:
    folder = points[0].plan.folder / f"sweep-{key_of(points)}"
    if is_first_process():
        for number, point in enumerate(points):
            records.save(folder / records.PLANS / f"{number}.json", point.plan.steps().values(), point.values)
    failed: dict[str, str] = {}
    if num_launched() > 1 or any(point.plan.missing() for point in points):  # torchrun's processes go on together
        failed = _compute(points, console, jobs)
    else:
        console.print(f"nothing to do: all {len(points)} points are done")
    done = [point for point in points if not point.plan.missing()]
    assert done or failed, "every point ends done or stopped"
    if done:
        joint = table(done, failed, points)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / records.SWEEP, joint)
        write_text(folder / "sweep.md", markdown(joint))
        best = done[joint["best_by_validation"]]
        if is_first_process():  # the best point's report and student become the folder's
            publish.finish(best.plan)
        show(joint, console)
        drawn = label_budget.draw(joint["budget"], joint["metric"], folder)
        for file in [*drawn, *frontier.draw(joint["frontier"], joint["metric"], folder)]:
            console.print(f"Plot: {file}", soft_wrap=True)
        console.print(f"Table: {folder / 'sweep.md'}   Best student: {best.plan.folder / 'student'}", soft_wrap=True)
    for label, reason in failed.items():
        console.print(f"stopped: {label}: {reason}", soft_wrap=True)
    return 3 if failed else 0


def _compute(points: Sequence[Point], console: Console, jobs: int) -> dict[str, str]:
    """Make what is missing; returns the points that their figures have stopped, and why."""
    from distilpeft.tasks.rows import read_task_rows

    read_task_rows(points[0].plan.recipe)  # bad rows are found here, before torch is even imported
    stopped: dict[Path, GateError] = {}
    every = [made for point in points for made in point.plan.steps().values()]
    untimed = any(made.stage not in LAST_STAGES and not made.done for made in every)
    if jobs > 1 and untimed:
        for found in spread(jobs, train_points, [points], console):
            stopped |= found
    plan = points[0].plan
    devices = 1 if jobs > 1 else plan.recipe.devices
    stopped = launch.on_devices(devices, finish_points, (points, stopped), plan.folder)
    failed: dict[str, str] = {}
    for point in points:
        for made in point.plan.steps().values():
            if made.path in stopped:
                failed.setdefault(point.label, str(stopped[made.path]))
    return failed


def finish_points(points: Sequence[Point], stopped: Mapping[Path, GateError]) -> dict[Path, GateError]:
    """All that is left to do, by all processes together; returns what the figures have stopped, now and before."""
    from distilpeft.pipeline import chain

    return chain.do(_jobs(points), chain.runtime_of(points[0].plan.recipe), failed=stopped)


def train_points(number: int, points: Sequence[Point]) -> dict[Path, GateError]:
    """What a worker does: all but the timing, for which the machine has to be quiet.

    Args:
        number: which worker this is.
        points: those of the whole sweep.

    Returns:
        What its figures have stopped.
    """
    from distilpeft.pipeline import chain

    runtime = chain.runtime_of(points[0].plan.recipe, f"[{number}] ")
    return chain.do([job for job in _jobs(points) if job.stage not in LAST_STAGES], runtime)


def _jobs(points: Sequence[Point]) -> list[Job]:
    """The steps of all points with the recipe's own seed, then those of further seeds (`evaluate.seeds`)."""
    from distilpeft.pipeline.jobs import jobs_of

    jobs = [(point, job) for point in points for job in jobs_of(point.plan)]
    jobs.sort(key=lambda one: bool(one[1].label))  # only those of further seeds have one
    return [replace(job, label=", ".join(filter(None, (point.label, job.label)))) for point, job in jobs]


def key_of(points: Sequence[Point]) -> str:
    """Names a sweep by what its points are."""
    return digest_json([[dict(point.values), point.plan.weights_of(STUDENT).key] for point in points])[:12]
