"""Several worker processes for one command: each with its share of the machine, stopped together and gently.

A worker that is killed is told and not replaced: work is found by locks and checkpoints, so the others take it up.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from rich.console import Console

from distilpeft.errors import GateError, InputError, StoppedBySignal
from distilpeft.machine import on_signals, take_share


@dataclass
class Worker:
    """One process and how it ended.

    Attributes:
        number: from 1.
        process: the process.
        answers: where its result comes from.
        result: what the function returned, once it has.
        error: what it raised.
    """

    number: int
    process: Any
    answers: Connection
    result: Any = None
    error: Exception | None = None


@dataclass
class Crew:
    """All workers of one command."""

    workers: list[Worker]
    stopped_by: int | None = None
    stopping: bool = False

    def send(self, number: int) -> None:
        """Send everyone a signal."""
        self.stopping = True
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


def spread(count: int, function: Callable[..., Any], arguments: Sequence[Any], console: Console) -> list[Any]:
    """Call `function(number, *arguments)` in `count` fresh processes, number = 1..count, and wait for all.

    Args:
        count: processes.
        function: a module's function; it and its arguments can be pickled.
        arguments: the same for all.
        console: where a worker that was killed is told.

    Returns:
        What the calls have returned, without those that were killed.

    Raises:
        InputError, GateError: a call raised it; the others were stopped after a checkpoint.
        StoppedBySignal: a signal came and was passed on; or all workers were killed (InputError).
    """
    context = multiprocessing.get_context("spawn")
    crew = Crew([])
    with crew.forwarding():
        for number in range(1, count + 1):
            if crew.stopping:
                break
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(there, number, count, function, arguments))
            process.start()
            there.close()
            crew.workers.append(Worker(number, process, here))
        _listen(crew, console)
    for worker in crew.workers:
        worker.process.join()
    errors = [worker.error for worker in crew.workers if worker.error is not None]
    if crew.stopped_by is not None:
        code = 130 if crew.stopped_by == signal.SIGINT else 75
        raise StoppedBySignal("stopped all workers; the same command goes on from there", code)
    errors.sort(key=lambda error: isinstance(error, StoppedBySignal))  # the cause first
    if errors:
        raise errors[0]
    done = [worker.result for worker in crew.workers if worker.process.exitcode == 0]
    if not done:
        codes = ", ".join(str(worker.process.exitcode) for worker in crew.workers)
        raise InputError(
            f"--jobs {count}: all workers died (exit codes {codes}; -9 is mostly a lack of memory); "
            "the same command goes on, with fewer jobs if memory was short"
        )
    return done


def _listen(crew: Crew, console: Console) -> None:
    """Collect results; the first fault stops everyone."""
    left = list(crew.workers)
    while left:
        ready = wait([worker.answers for worker in left])
        for worker in [worker for worker in left if worker.answers in ready]:
            left.remove(worker)
            try:
                worker.result, worker.error = worker.answers.recv()
            except EOFError:
                worker.process.join()
                if worker.process.exitcode == 1:  # its traceback was printed
                    worker.error = RuntimeError(f"worker {worker.number} has a bug; its traceback is above")
                elif not crew.stopping:
                    console.print(
                        f"worker {worker.number} was killed (exit code {worker.process.exitcode}); others take its work"
                    )
            if worker.error is not None and not crew.stopping:
                crew.send(signal.SIGTERM)


def _work(answers: Connection, number: int, count: int, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """The life of a worker."""
    os.setsid()  # Ctrl-C reaches the first process only, which passes it on
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave in order where there is nothing to save
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    take_share(number - 1, count)
    try:
        answers.send((function(number, *arguments), None))
    except (InputError, GateError, StoppedBySignal) as error:
        answers.send((None, error))
    except KeyboardInterrupt:
        answers.send((None, StoppedBySignal("stopped; the same command goes on", 130)))


def _stop_with_parent() -> None:
    """Nobody would hear of what an orphan does: it leaves after a checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
