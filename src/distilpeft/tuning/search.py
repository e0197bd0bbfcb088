"""`distilpeft sweep --search`: let Optuna choose settings by the validation rows, and give up hopeless ones early.

A trial tunes one student on the shared teacher and cache; all it makes are artifacts, as of every run. The best
trial's recipe is then done in full. Any number of processes and machines share a search through Optuna's storage.
Imports torch only to compute.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft.machine import markdown as md
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.files import write_json, write_text
from distilpeft.machine.host import is_first_process, num_launched
from distilpeft.machine.locks import POLL_S, Lock, in_use
from distilpeft.machine.processes import spread
from distilpeft.pipeline import launch
from distilpeft.planning.plan import Plan
from distilpeft.planning.roles import STUDENT
from distilpeft.recipe.task import LOWER_IS_BETTER
from distilpeft.report import publish
from distilpeft.storage import records
from distilpeft.tuning.optuna_study import FINISHED, THOUSANDTHS, WAIT, Outcome, Study, Trial
from distilpeft.tuning.search_space import Range, Search
from distilpeft.tuning.sweep_points import settings_of, short

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from distilpeft.machine.runtime import Runtime


def run(search: Search, console: Console, jobs: int = 1) -> int:
    """Make all trials, do the best one's recipe in full, write and print the table.

    Args:
        search: what `make` has found.
        console: for the table.
        jobs: worker processes on this machine.

    Returns:
        0, or 3 if no trial came to an end.
    """
    with in_use(search.corner.folder):
        return _run(search, console, jobs)


def _run(search: Search, console: Console, jobs: int) -> int:
    study = Study(search) if is_first_process() else None
    # the processes of torchrun go on together: each for itself might see another state
    if study is None or num_launched() > 1 or study.trials_left() or not _best_is_done(search, study):
        _compute(search, console, jobs)
    else:
        console.print(f"nothing to do: all {len(study.counted())} trials are done")
    if study is None:
        return 0
    joint = save(search, study)
    show(joint, console)
    console.print(f"Table: {search.folder / 'search.md'}", soft_wrap=True)
    if joint["best"] is None:
        return 3
    publish.finish(search.plan(study.values(study.best())))
    console.print(f"Best student: {search.corner.folder / 'student'}", soft_wrap=True)
    return 0


def save(search: Search, study: Study) -> dict[str, Any]:
    """Write the table of all trials so far, as JSON and Markdown, and return it."""
    for trial in study.counted():
        if trial.params and not _record_of(search, trial.number).is_file():  # another version's, or another folder's
            _record(search, trial.number, study.values(trial))
    joint = table(search, study)
    write_json(search.folder / records.SEARCH, joint)
    write_text(search.folder / "search.md", markdown(joint))
    return joint


def _record_of(search: Search, number: int) -> Path:
    return search.folder / records.PLANS / f"{number}.json"


def _record(search: Search, number: int, values: Mapping[str, object], *, in_full: bool = False) -> None:
    """Write down what a trial leads to: its student and what that needs, or of the best one everything."""
    plan = search.plan(values)
    student = plan.weights_of(STUDENT)
    needed = [step.artifact for step in (*plan.needs(student), student)]
    records.save(_record_of(search, number), plan.steps().values() if in_full else needed, values)


def _best_is_done(search: Search, study: Study) -> bool:
    best = study.best()
    return best is None or not search.plan(study.values(best)).missing()


def _compute(search: Search, console: Console, jobs: int) -> None:
    from distilpeft.tasks.rows import read_task_rows

    read_task_rows(search.corner.recipe)  # bad rows are found here, before torch is even imported
    if jobs > 1:
        spread(jobs, make_trials, [search], console)
    corner = search.corner
    launch.on_devices(1 if jobs > 1 else corner.recipe.devices, finish_search, (search,), corner.folder)


def finish_search(search: Search) -> None:
    """Make the trials that are left and all that the best one needs, by all processes together."""
    from distilpeft.pipeline import chain
    from distilpeft.pipeline.jobs import jobs_of

    runtime = chain.runtime_of(search.corner.recipe)
    study = _make_trials(search, runtime)
    if study is not None:
        save(search, study)  # a gate may still stop the best one
    values = runtime.value_from_main(_note_best(search, study) if study else None)
    if values is not None:
        jobs_left = jobs_of(search.plan(values))
        for error in chain.do(jobs_left, runtime).values():
            raise error


def _note_best(search: Search, study: Study) -> dict[str, object] | None:
    """The values of the best trial, which is to be done in full; None if no trial came to its end."""
    best = study.best()
    if best is None:
        return None
    _record(search, best.number, study.values(best), in_full=True)
    return study.values(best)


def make_trials(number: int, search: Search) -> None:
    """What a worker does: make trials until there are enough.

    Args:
        number: which worker this is.
        search: what is searched.
    """
    from distilpeft.pipeline import chain

    _make_trials(search, chain.runtime_of(search.corner.recipe, f"[{number}] "))


def _make_trials(search: Search, runtime: Runtime) -> Study | None:
    """Make trials until there are enough, and wait for those of others; the main process asks and tells."""
    study = Study(search) if runtime.is_main else None
    waiting = False
    while True:
        turn = study.next() if study else None
        values = runtime.value_from_main(turn.values if isinstance(turn, Trial) else turn)
        if values == FINISHED:
            return study
        if values == WAIT:
            if not waiting:
                runtime.say("waiting for the last trials, which others are at")
            waiting = True
            time.sleep(POLL_S)
            continue
        assert isinstance(values, dict), "the main process has something to try"
        trial = turn if isinstance(turn, Trial) else None
        try:
            name = f"trial {trial.number + 1}" if trial else ""
            runtime.say(f"{name} (of {search.trials}): {_line(values)}")
            if trial:
                _record(search, trial.number, values)
            outcome = _try(search, runtime, values, trial)
            if study and trial:
                study.tell(trial, outcome)
            runtime.say(f"{name}: {outcome.said(search.monitor)}")
        finally:
            if trial:
                trial.lock.release()


class Pruned(Exception):
    """This trial is worse than most were at this point."""


def _try(search: Search, runtime: Runtime, values: Mapping[str, object], trial: Trial | None) -> Outcome:
    """Train the student of one setting."""
    from distilpeft.pipeline import chain
    from distilpeft.pipeline.jobs import Job

    plan = search.plan(values, "distil.gate=warn")  # what a trial is for is its student alone
    artifact = plan.weights_of(STUDENT).artifact

    def watch(share: float, value: float) -> None:
        if runtime.from_main(int(trial is not None and trial.is_hopeless(share, value))):
            raise Pruned

    try:
        student = plan.weights_of(STUDENT)
        jobs = [Job(plan, step) for step in (*plan.needs(student), student)]
        stopped = chain.do(jobs, runtime, watch)
    except Pruned:
        if runtime.is_main:
            _drop(plan, artifact)
        return Outcome()
    shared = {step.artifact.path for step in search.corner.own} - {artifact.path}
    for path, error in stopped.items():
        if path in shared:  # the teacher of all trials
            raise error
        return Outcome(stopped=str(error))
    return Outcome(artifact.figures()["best_value"])


def _drop(plan: Plan, artifact: Artifact) -> None:
    """Delete what was given up, unless somebody else has resumed it."""
    lock = Lock(plan.folder, artifact.path.name)
    if lock.acquire():
        shutil.rmtree(artifact.partial, ignore_errors=True)
        lock.release()


def table(search: Search, study: Study) -> dict[str, Any]:
    """Everything that the search has found."""
    best = study.best()
    return {
        "recipe": search.corner.recipe.name,
        "monitor": search.monitor,
        "space": {key: vars(axis) if isinstance(axis, Range) else list(axis) for key, axis in search.space.items()},
        "trials": [_row(search, study, trial) for trial in study.counted()],
        "best": best.number if best is not None else None,
    }


def _row(search: Search, study: Study, trial: FrozenTrial) -> dict[str, Any]:
    stopped = trial.user_attrs.get("stopped")
    state = "stopped" if stopped else {"COMPLETE": "done", "PRUNED": "given up"}.get(trial.state.name, "elsewhere")
    values = study.values(trial) if trial.params else {}
    artifact = search.plan(values).weights_of(STUDENT).artifact if values else None
    seconds = trial.duration.total_seconds() if trial.duration else None
    if artifact is not None and state == "done" and artifact.done:
        seconds = artifact.figures()["seconds"]  # the training alone: the first trial waits for the teacher
    return {
        "number": trial.number,
        "state": state,
        "values": values,
        "own": bool(trial.user_attrs.get("own")),
        "validation": trial.value if state == "done" else None,
        "validations": {str(step / THOUSANDTHS): value for step, value in trial.intermediate_values.items()},
        "seconds": round(seconds, 1) if seconds is not None else None,
        "stopped": stopped,
        "artifact": artifact.path.name if artifact is not None else None,
    }


TITLES = ("trial", "settings", "valid.", "state", "s")


def cells(joint: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table, best first; then what was given up or stopped."""
    sign = 1 if joint["monitor"] in LOWER_IS_BETTER else -1
    ranked = sorted(
        joint["trials"], key=lambda row: (row["state"] != "done", sign * (row["validation"] or 0), row["number"])
    )
    return [
        (
            str(row["number"] + 1),
            _line(row["values"], last=True) + (" (the recipe's own)" if row["own"] else ""),
            f"{row['validation']:.4f}" if row["validation"] is not None else "-",
            row["state"] if row["state"] != "given up" else f"given up at {_progress(row):.0%}",
            f"{row['seconds']:.0f}" if row["seconds"] is not None else "-",
        )
        for row in ranked
    ]


def _progress(row: Mapping[str, Any]) -> float:
    return max(map(float, row["validations"]), default=0.0)


def _line(values: Mapping[str, object], *, last: bool = False) -> str:
    """Values in a line; `last`: by the last part of their keys."""
    return ", ".join(
        f"{key.rpartition('.')[2] if last else key}={f'{value:.4g}' if isinstance(value, float) else short(value)}"
        for key, value in values.items()
    )


def sentences(joint: Mapping[str, Any]) -> list[str]:
    """What the table means."""
    states = [row["state"] for row in joint["trials"]]
    kinds = [(state, states.count(state)) for state in ("done", "given up", "stopped", "elsewhere")]
    lines = [f"{len(states)} trials: " + ", ".join(f"{count} {state}" for state, count in kinds if count) + "."]
    best = next((row for row in joint["trials"] if row["number"] == joint["best"]), None)
    if best is None:
        return [*lines, "None came to its end."]
    settings = " ".join(f"--set '{setting}'" for setting in settings_of(best["values"]))
    lines.append(f"Best by validation {joint['monitor']}: {best['validation']:.4f}, as a run with {settings}")
    own = next((row for row in joint["trials"] if row["own"] and row["validation"] is not None), None)
    if own is not None and own is not best:
        lines.append(f"The recipe's own settings have {own['validation']:.4f}.")
    return [*lines, "The test rows picked nothing."]


def markdown(joint: Mapping[str, Any]) -> str:
    """The search as Markdown."""
    lines = [f"# Search of {joint['recipe']}", "", *(f"- {line}" for line in sentences(joint)), ""]
    lines += md.table([TITLES, *cells(joint)])
    return "\n".join([*lines, "", f"Validation metric: {joint['monitor']}."]) + "\n"


def show(joint: Mapping[str, Any], console: Console) -> None:
    """Print the table and what it means."""
    grid = Table(title=f"search of {joint['recipe']}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in TITLES:
        left = title in ("settings", "state")
        grid.add_column(title, justify="left" if left else "right", overflow="fold", no_wrap=title != "settings")
    for number, row in enumerate(cells(joint)):
        grid.add_row(*row, style="bold" if number == 0 and joint["best"] is not None else None)
    console.print(grid)
    for line in sentences(joint):
        console.print(line, highlight=False, soft_wrap=True)
