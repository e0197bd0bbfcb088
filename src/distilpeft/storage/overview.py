"""`distilpeft runs`: the runs of a folder, how far they are, what came of them and what they take on disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft.errors import InputError
from distilpeft.machine.artifact import MANIFEST
from distilpeft.machine.files import names_in, size_text, usage
from distilpeft.machine.locks import held_by_others
from distilpeft.planning.roles import STUDENT, short_name
from distilpeft.report import build
from distilpeft.report.schema import Report
from distilpeft.storage import records
from distilpeft.storage.names import is_artifact, is_run


@dataclass(frozen=True)
class RunState:
    """One run.

    Attributes:
        name: the recipe's.
        folder: the run's.
        done: steps that are done, of those that belong to it.
        steps: steps that belong to it; None if nothing in the folder says so.
        finished: whether all are done and there is a report of them.
        working: who works on it now, such as "process 17 on host".
        metric: the main metric; None without a report.
        score: the student's, on the rows that the report is about.
        deploy: the export that the report recommends.
        bytes: on disk.
        changed: the last change, as an ISO time.
    """

    name: str
    folder: str
    done: int
    steps: int | None
    finished: bool
    working: tuple[str, ...]
    metric: str | None
    score: float | None
    deploy: str | None
    bytes: int
    changed: str

    @property
    def state(self) -> str:
        """The state in words."""
        plural = "" if self.done == 1 else "s"
        steps = f"{self.done} step{plural} done" if self.steps is None else f"{self.done} of {self.steps} steps"
        words = "finished" if self.finished else steps
        return ", ".join([words, *(f"{who} is working on it" for who in self.working)])


def find(runs: Path) -> list[RunState]:
    """All runs of a folder, by name.

    Raises:
        InputError: there is no such folder.
    """
    if not runs.is_dir():
        raise InputError(f"--runs {runs}: no such folder")
    return [_state(runs / name) for name in sorted(names_in(runs)) if is_run(runs / name)]


def _state(run: Path) -> RunState:
    report = _report(run)
    expected = _expected(run, report)
    names = names_in(run) if expected is None else expected
    done = sum(is_artifact(name) and (run / name / MANIFEST).is_file() for name in names)
    student = report.model(STUDENT) if report else None
    size = usage(run)
    return RunState(
        name=run.name, folder=str(run), done=done, steps=None if expected is None else len(expected),
        finished=report is not None and expected is not None and done == len(expected),
        working=tuple(dict.fromkeys(held_by_others(run).values())),
        metric=report.metric if report else None,
        score=float(student.scores[report.metric].value) if report and student else None,
        deploy=short_name(report.verdict.deploy) if report and report.verdict.deploy else None,
        bytes=round(size.bytes), changed=datetime.fromtimestamp(size.changed).astimezone().isoformat("T", "seconds"),
    )  # fmt: skip


def _report(run: Path) -> Report | None:
    try:
        return build.load(run)
    except InputError:  # none yet, or another version's: the list has the other columns
        return None


def _expected(run: Path, report: Report | None) -> frozenset[str] | None:
    """The artifacts of the last run or report, and of sweeps that are not finished; None if nothing names any."""
    try:
        plan, comparisons = records.plan_of(run), records.comparisons_of(run)
    except InputError:
        plan, comparisons = None, []
    names = set(plan.artifacts if plan else report.artifacts.values() if report else ())
    for comparison in comparisons:
        if not comparison.is_finished:
            names |= {name for point in comparison.points for name in point.artifacts}
    return frozenset(names) or None


def as_json(states: Sequence[RunState], runs: Path) -> dict[str, Any]:
    """The list for programs, with totals."""
    return {
        "runs": [{**asdict(run), "working": list(run.working)} for run in states],
        "bytes": sum(run.bytes for run in states),
        "free_bytes": shutil.disk_usage(runs).free,
    }


def show(states: Sequence[RunState], runs: Path, console: Console) -> None:
    """Print the list and its totals."""
    if not states:
        console.print(f"{runs}: no runs", highlight=False, soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title, right in (("run", False), ("state", False), ("student", True), ("deploy", False), ("size", True),
                         ("last change", False)):  # fmt: skip
        table.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=title != "state")
    for run in states:
        score = "-" if run.score is None else f"{run.metric} {run.score:.4f}"
        when = datetime.fromisoformat(run.changed).strftime("%Y-%m-%d %H:%M")
        table.add_row(run.name, run.state, score, run.deploy or "-", size_text(run.bytes), when)
    console.print(table)
    total, free = size_text(sum(run.bytes for run in states)), size_text(shutil.disk_usage(runs).free)
    count = f"{len(states)} run{'s' if len(states) > 1 else ''}"
    console.print(f"{count}, {total}; {free} free on this disk", highlight=False, soft_wrap=True)
