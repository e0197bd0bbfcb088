"""Which job comes next: a look at the artifacts that exist, and a lock on the first job that can start.

`look` returns `Ready`, `Waiting` or `Finished`. With several processes the main one looks and the others follow.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distilpeft.errors import InputError
from distilpeft.machine.artifact import Artifact, Published
from distilpeft.machine.files import names_in
from distilpeft.machine.locks import POLL_S, Lock
from distilpeft.machine.runtime import Runtime
from distilpeft.planning.plan import Plan, Step
from distilpeft.planning.roles import LAST_STAGES


@dataclass(frozen=True)
class Job:
    """One step of one plan.

    Attributes:
        plan: whose step it is.
        step: one of the plan's own.
        label: which of several plans this is, for the user.
    """

    plan: Plan
    step: Step
    label: str = ""

    @property
    def artifact(self) -> Artifact:
        """What the step leaves behind."""
        return self.step.artifact

    @property
    def stage(self) -> str:
        """The verb."""
        return self.step.stage

    def needs(self) -> list[Artifact]:
        """What has to be there first."""
        return [step.artifact for step in self.plan.needs(self.step)]


def check_shared(runtime: Runtime, folder: Path) -> None:
    """Refuse machines that do not share the run's folder, before anything slow starts.

    Raises:
        InputError: a process does not see what the main one writes there.
    """
    if runtime.accelerator.num_processes == 1:
        return
    mark = folder / f".shared-{runtime.value_from_main(uuid.uuid4().hex)}"
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    runtime.accelerator.wait_for_everyone()
    names_in(folder)
    blind = runtime.count(not mark.exists())
    if runtime.is_main:
        mark.unlink()
    if blind:
        raise InputError(
            f"{folder}: {blind} of {runtime.accelerator.num_processes} processes do not see what the first one writes "
            "there; all machines of a run have to share this folder (--runs)"
        )


def jobs_of(plan: Plan, until: str | None = None) -> list[Job]:
    """The plan's steps, up to the last one of a stage."""
    jobs = []
    for label, seed_plan in {"": plan, **{f"seed {seed}": repeat for seed, repeat in plan.repeats.items()}}.items():
        steps = seed_plan.own
        if until is not None:
            last = [index for index, step in enumerate(steps) if step.stage == until]
            if not last and seed_plan is plan:
                raise InputError(f"--until {until}: this recipe has no such stage")
            steps = steps[: last[-1] + 1] if last else ()
        jobs += [Job(seed_plan, step, label) for step in steps]
    return jobs


@dataclass(frozen=True)
class Ready:
    """A job that can start.

    Attributes:
        job: the job.
        locks: held by this process until `release`; only the main process holds any.
        num_done: how many artifacts of all jobs are done.
        num_all: how many there are.
    """

    job: Job
    locks: tuple[Lock, ...] = ()
    num_done: int = 0
    num_all: int = 0

    def release(self) -> None:
        """Release the locks, so that others can take the job."""
        for lock in self.locks:
            lock.release()


@dataclass(frozen=True)
class Waiting:
    """No job can start now.

    Attributes:
        busy: jobs whose inputs are done but whose lock somebody else holds, with that lock.
    """

    busy: tuple[tuple[Job, Lock], ...] = ()


@dataclass(frozen=True)
class Finished:
    """No job is left."""


NextJob = Ready | Waiting | Finished


def next_job(jobs: Sequence[Job], runtime: Runtime, published: Published, announced: set[Path]) -> Ready | Finished:
    """Wait for a job that can start, or for the end of all; the same one in every process.

    Args:
        jobs: in the order in which they are to be done.
        runtime: the machine.
        published: the artifacts known to be done; brought up to date by every look.
        announced: artifacts whose wait has been reported already.
    """
    while True:
        state = _on_all(look(jobs, published) if runtime.is_main else None, jobs, runtime)
        if not isinstance(state, Waiting):
            return state
        for job, lock in state.busy:
            if job.artifact.path not in announced:
                announced.add(job.artifact.path)
                runtime.say(f"waiting for {job.artifact.path.name}: {lock.holder() or 'another run'} is working on it")
        time.sleep(POLL_S)


def _on_all(state: NextJob | None, jobs: Sequence[Job], runtime: Runtime) -> NextJob:
    """Send what the main process has found to the others: the index of the job, or a negative number."""
    finished, waiting = -1, -2
    match state:
        case Ready(job):
            number = next(index for index, item in enumerate(jobs) if item is job)
        case Finished():
            number = finished
        case _:
            number = waiting
    number = runtime.from_main(number)
    if state is not None:
        return state
    if number == finished:
        return Finished()
    return Waiting() if number == waiting else Ready(jobs[number])


def look(jobs: Sequence[Job], published: Published) -> NextJob:
    """Look at what is done, and lock the first job that can start."""
    for folder in {job.plan.folder for job in jobs}:
        published.look(folder)
    left = [job for job in jobs if job.artifact not in published]
    if not left:
        return Finished()
    artifacts = {job.artifact.path: job.artifact for job in jobs}
    num_done = sum(artifact in published for artifact in artifacts.values())
    early = [job for job in left if job.stage not in LAST_STAGES]
    busy: tuple[tuple[Job, Lock], ...] = ()
    for job in early or left:
        if all(need in published for need in job.needs()):
            state = _take(Ready(job, _locks(job), num_done, len(artifacts)), published)
            if isinstance(state, Ready):
                return state
            busy += state.busy
    return Waiting(busy)


def _locks(job: Job) -> tuple[Lock, ...]:
    """The locks of a job; the benchmark also has one per machine, so that only one runs there at a time."""
    host = [f"benchmark-{socket.gethostname()}"] if job.stage == "benchmark" else []
    return tuple(Lock(job.plan.folder, name) for name in (job.artifact.path.name, *host))


def _take(ready: Ready, published: Published) -> Ready | Waiting:
    """Take the locks of a job, unless somebody else holds one or has just finished the job."""
    for lock in ready.locks:
        if not lock.acquire():
            ready.release()
            return Waiting(((ready.job, lock),))
    published.look(ready.job.plan.folder)
    if ready.job.artifact in published:
        ready.release()
        return Waiting()
    return ready
