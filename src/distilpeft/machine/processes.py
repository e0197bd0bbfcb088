"""Several processes for one command: started with their share of the machine, stopped together and gently.

There are two kinds. Workers (`spread`) go their own ways: work is found by locks and checkpoints, so one that is killed
is reported, not replaced, and the others take its work. Ranks (`joined`) compute as one: when one is lost the others
can only stop. Either way the first fault stops everyone and is the one that is raised; nobody outlives this process.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from rich.console import Console

from distilpeft.errors import Crash, GateError, InputError, StoppedBySignal, machine_fault
from distilpeft.machine.host import join, on_signals, prepare_imports, take_share

T = TypeVar("T")
GRACE_S = 20.0
"""How long ranks may take to stop after a fault: one that waits for a lost one hears no signal."""
LEAVE_S = 60.0
"""How long a process that has answered may take to end."""
ORPHAN_S = 600.0
"""How long a process may take for its last checkpoint when its parent has died."""


@dataclass(frozen=True)
class Ranks:
    """How ranks find each other, and where all but the first write.

    Attributes:
        port: of the first one.
        logs: a folder; rank n writes what it prints into `rank-n.log`.
    """

    port: int
    logs: Path


@dataclass
class Worker:
    """One process and how it ended.

    Attributes:
        number: from 1.
        process: the process.
        answers: where its result comes from.
        result: what the function returned, once it has.
        error: what it raised.
        was_killed: whether it died of a signal that was not sent from here.
    """

    number: int
    process: Any
    answers: Connection
    result: Any = None
    error: Exception | None = None
    was_killed: bool = False


@dataclass
class Crew:
    """All processes of one command.

    Attributes:
        workers: in order.
        ended: those that have ended, in the order in which they did.
        stopped_by: the signal that this process got.
        sent: signals that were sent to all of them.
    """

    workers: list[Worker] = field(default_factory=list)
    ended: list[Worker] = field(default_factory=list)
    stopped_by: int | None = None
    sent: set[int] = field(default_factory=set)

    def send(self, number: int) -> None:
        """Send everyone a signal."""
        self.sent.add(number)
        for worker in self.workers:
            if worker.process.is_alive():
                os.kill(worker.process.pid, number)

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Pass on signals that this process gets; workers are in sessions of their own, so each gets it once."""

        def forward(number: int, _frame: FrameType | None) -> None:
            self.stopped_by = number
            self.send(number)

        with on_signals(forward):
            yield

    def start(
        self, count: int, ranks: Ranks | None, function: Callable[..., object], arguments: Sequence[object]
    ) -> None:
        """Start the processes, unless a signal comes."""
        context = multiprocessing.get_context("spawn")
        for number in range(1, count + 1):
            if self.sent:
                break
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(there, number, count, ranks, function, arguments))
            process.start()
            there.close()
            self.workers.append(Worker(number, process, here))

    def listen(self, killed: Callable[[Worker], bool], grace_s: float) -> None:
        """Collect results until all have ended; the first fault stops everyone, after `grace_s` by force.

        Args:
            killed: called with a worker that was killed; whether that is a fault.
            grace_s: how long they may take to stop.
        """
        running, deadline = list(self.workers), math.inf
        while running:
            ready = wait([worker.answers for worker in running], min(60.0, max(0.0, deadline - time.monotonic())))
            for worker in [worker for worker in running if worker.answers in ready]:
                running.remove(worker)
                self.ended.append(worker)
                self._hear(worker)
                fault = worker.error is not None or (worker.was_killed and killed(worker))
                if fault and not self.sent:
                    self.send(signal.SIGTERM)
                    deadline = time.monotonic() + grace_s
            if running and time.monotonic() >= deadline:
                self.send(signal.SIGKILL)
                deadline = math.inf
        for worker in self.workers:
            worker.process.join(LEAVE_S)
            if worker.process.is_alive():  # it has answered, but some library does not let it go
                worker.process.kill()
                worker.process.join()

    def _hear(self, worker: Worker) -> None:
        try:
            worker.result, worker.error = worker.answers.recv()
        except EOFError:
            worker.process.join()
            worker.was_killed = -worker.process.exitcode not in self.sent


def spread(count: int, function: Callable[..., T], arguments: Sequence[object], console: Console) -> list[T]:
    """Call `function(number, *arguments)` in `count` fresh processes, number = 1..count, and wait for all.

    Args:
        count: processes.
        function: a module's function; it and its arguments can be pickled.
        arguments: the same for all.
        console: where a worker that was killed is reported.

    Returns:
        What the calls have returned, without those that were killed.

    Raises:
        InputError, GateError, Crash: a call raised it; the others were stopped after a checkpoint.
        StoppedBySignal: a signal came and was passed on; or all workers were killed (InputError).
    """

    def killed(worker: Worker) -> bool:
        console.print(f"worker {worker.number} was killed (exit code {worker.process.exitcode}); others take its work")
        return False

    crew = Crew()
    with crew.forwarding():
        crew.start(count, None, function, arguments)
        crew.listen(killed, math.inf)
    _raise(crew, "stopped all workers; run the same command to resume")
    results = [worker.result for worker in crew.workers if not worker.was_killed]
    if not results:
        codes = ", ".join(str(worker.process.exitcode) for worker in crew.workers)
        raise InputError(
            f"--jobs {count}: all workers died (exit codes {codes}; -9 usually means a lack of memory); "
            "run the same command to resume, with fewer jobs if memory was short"
        )
    return results


def joined(count: int, function: Callable[..., T], arguments: Sequence[object], logs: Path) -> T:
    """Call `function(*arguments)` in `count` fresh processes that compute as one, and wait for all.

    Args:
        count: processes, on this machine.
        function: a module's function; it and its arguments can be pickled.
        arguments: the same for all.
        logs: the folder for what all but the first process print.

    Returns:
        What the call has returned in the first process.

    Raises:
        InputError, GateError, Crash: what was raised first, by whichever process; or a process was killed (InputError).
        StoppedBySignal: a signal came and was passed on.
    """
    crew = Crew()
    logs.mkdir(parents=True, exist_ok=True)
    with crew.forwarding():
        crew.start(count, Ranks(_free_port(), logs), function, arguments)
        crew.listen(lambda _: True, GRACE_S)
    for worker in crew.ended:
        if worker.was_killed:  # what the others said is only that they lost it
            raise InputError(
                f"process {worker.number} of {count} was killed (exit code {worker.process.exitcode}; -9 is mostly a "
                f"lack of memory) and the others were stopped; what it said is in {logs}. Run the same command to "
                "resume at the last checkpoint"
            )
    messages = [str(worker.error) for worker in crew.ended if isinstance(worker.error, StoppedBySignal)]
    _raise(crew, messages[0] if messages else "stopped; run the same command to resume")
    result: T = crew.workers[0].result
    return result


def _raise(crew: Crew, stopped: str) -> None:
    """Raise what ended the command: its own signal, or the first fault; what only followed comes last."""
    errors = [worker.error for worker in crew.ended if worker.error is not None]
    if crew.stopped_by is not None:
        raise StoppedBySignal(stopped, 130 if crew.stopped_by == signal.SIGINT else 75)
    errors.sort(key=lambda error: isinstance(error, StoppedBySignal))
    if errors:
        raise errors[0]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _work(
    answers: Connection, number: int, count: int, ranks: Ranks | None, function: Callable[..., object],
    arguments: Sequence[object],
) -> None:  # fmt: skip
    """The life of a process."""
    os.setsid()  # Ctrl-C reaches the first process only, which passes it on
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave in order where there is nothing to save
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    prepare_imports()
    if ranks is None:
        take_share(number - 1, count)
    else:
        join(number - 1, count, ranks.port)
        if number > 1:
            _print_into(ranks.logs / f"rank-{number - 1}.log")
    outcome: tuple[object, Exception | None]
    try:
        outcome = _outcome(function, arguments if ranks else (number, *arguments), f"process {number} of {count}")
        _hear_no_more()
    except KeyboardInterrupt:
        _hear_no_more()
        outcome = None, StoppedBySignal("stopped; run the same command to resume", 130)
    answers.send(outcome)


def _outcome(
    function: Callable[..., object], arguments: Sequence[object], name: str
) -> tuple[object, Exception | None]:
    """What the function returned, and what it raised."""
    try:
        return function(*arguments), None
    except (InputError, GateError, StoppedBySignal) as error:
        return None, error
    except Exception as error:
        fault = machine_fault(error)
        if fault is not None:
            return None, InputError(fault)
        return None, Crash(f"{name}: {traceback.format_exc()}")


def _hear_no_more() -> None:
    """All is done but the answer: a signal that is meant for work would only break the way out."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _print_into(log: Path) -> None:
    """Send everything that this process and its libraries print to a file."""
    with log.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _stop_with_parent() -> None:
    """Nobody would hear of what an orphan does: it leaves after a checkpoint, or after a while without."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S)
    os._exit(75)
