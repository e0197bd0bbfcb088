"""Which step comes next: a look at the artifacts that exist, and a lock on the first job that can start."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distilpeft.errors import InputError
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.locks import POLL_S, Lock
from distilpeft.machine.runtime import Runtime
from distilpeft.planning.plan import Plan
from distilpeft.planning.roles import LAST_STAGES, TEACHER


@dataclass(frozen=True)
class Job:
    """One step of one plan.

    Attributes:
        plan: whose step it is.
        step: its name there.
        label: which of several plans this is, for the user.
    """

    plan: Plan
    step: str
    label: str = ""

    @property
    def made(self) -> Artifact:
        """What the step leaves behind."""
        return self.plan.artifacts[self.step]

    @property
    def stage(self) -> str:
        """The verb."""
        return self.step.partition("/")[0]

    def needs(self) -> list[Artifact]:
        """What has to be there first: all earlier stages, and the evaluated teacher before what is compared with it."""
        steps = list(self.plan.artifacts)
        return [
            self.plan.artifacts[step]
            for step in steps[: steps.index(self.step)]
            if step.partition("/")[0] != self.stage or step == f"evaluate/{TEACHER}"
        ]


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
    _look(folder)
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
    for label, one in {"": plan, **{f"seed {seed}": repeat for seed, repeat in plan.repeats.items()}}.items():
        names = list(one.artifacts)
        if until is not None:
            last = [index for index, name in enumerate(names) if name.partition("/")[0] == until]
            if not last and one is plan:
                raise InputError(f"--until {until}: this recipe has no such stage")
            names = names[: last[-1] + 1] if last else []
        jobs += [Job(one, name, label) for name in names]
    return jobs


def _next(jobs: Sequence[Job], runtime: Runtime, told: set[Path]) -> tuple[int, Turn]:
    """The main process looks and locks, the others follow: the index of the next job, or `FINISHED`."""
    while True:
        turn = Turn(jobs if runtime.is_main else ())
        number = runtime.from_main(turn.number)
        if number != WAIT:
            return number, turn
        for job, lock in turn.busy:
            if job.made.path not in told:
                told.add(job.made.path)
                runtime.say(f"waiting for {job.made.path.name}: {lock.holder() or 'another run'} is at work on it")
        time.sleep(POLL_S)


FINISHED, WAIT = -1, -2


class Turn:
    """A look at what is done, and the lock of the first job that can be begun.

    Attributes:
        number: its index, or `FINISHED` or `WAIT`.
        num_done: artifacts that are there.
        num_all: artifacts that there will be.
        busy: jobs that somebody else is at, and their locks.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        for folder in {job.plan.folder for job in jobs}:
            _look(folder)
        done = {made.path: made.done for job in jobs for made in job.plan.artifacts.values()}
        wanted = {job.made.path for job in jobs}
        self.num_all, self.num_done = len(wanted), sum(done[path] for path in wanted)
        self.busy: list[tuple[Job, Lock]] = []
        self._locks: list[Lock] = []
        left = [index for index, job in enumerate(jobs) if not done[job.made.path]]
        self.number = WAIT if left else FINISHED
        early = [index for index in left if jobs[index].stage not in LAST_STAGES]
        for index in early or left:
            if all(done[need.path] for need in jobs[index].needs()) and self._take(jobs[index]):
                self.number = index
                return

    def _take(self, job: Job) -> bool:
        """Lock a job, unless it is taken, or was done a moment ago."""
        names = [job.made.path.name]
        if job.stage == "benchmark":
            names.append(f"benchmark-{socket.gethostname()}")
        for name in names:
            lock = Lock(job.plan.folder, name)
            if not lock.acquire():
                self.busy.append((job, lock))
                self.release()
                return False
            self._locks.append(lock)
        _look(job.plan.folder)
        if job.made.done:
            self.release()
        return bool(self._locks)

    def release(self) -> None:
        """Let others at the job."""
        for lock in self._locks:
            lock.release()
        self._locks = []


def _look(folder: Path) -> None:
    """Read a folder anew: over NFS, what others have renamed is otherwise seen only after a while."""
    if folder.is_dir():
        list(folder.iterdir())
