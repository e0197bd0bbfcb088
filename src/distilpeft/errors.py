"""The ways in which a run ends early, each with its exit code. Everything else is a bug and shows a traceback."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

import typer


class InputError(ValueError):
    """Something a user can fix: one line that names the place, what is wrong and what is allowed. Exit code 2."""


class GateError(RuntimeError):
    """The figures say that going on would waste time (a broken teacher, an unequal export). Exit code 3."""


class Crash(Exception):
    """A bug in another process; the message is its traceback."""


class Terminated(BaseException):
    """SIGTERM or Ctrl-C where nothing is to be saved; no `Exception`, so that nobody takes it for a fault."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class StoppedBySignal(RuntimeError):
    """Stopped by a signal after a checkpoint; run the same command to resume. Exit code 75 (or 130)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)  # both, so that it comes intact out of another process
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}
DISK_TEXT = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|File too large|Input/output error|Permission "
    r"denied|\d+ requested and \d+ written", re.IGNORECASE,
)  # fmt: skip
"""What safetensors, Arrow, numpy and others say where they do not raise an OSError with its number."""
LOST_PEER = re.compile(r"(closed|reset) by peer|Broken pipe|remote process exited|Socket closed")
"""What gloo and NCCL say when a process on the other side of a connection is gone."""
LOST = (
    "stopped: another process of this run has ended, and its own message says why; run the same command to resume at "
    "the last checkpoint"
)
AGAIN = "nothing finished was lost, run the same command again"


def outcome(error: BaseException) -> tuple[str, int] | None:
    """What to say and the exit code, or None for a bug."""
    match error:
        case InputError() | GateError():
            stopped = isinstance(error, GateError)
            return f"{'stopped' if stopped else 'error'}: {error}", 3 if stopped else 2
        case StoppedBySignal():
            return str(error), error.exit_code
        case Terminated():
            return "stopped; run the same command to resume at the last checkpoint", error.exit_code
        case typer.Exit():
            return "", error.exit_code
        case typer.Abort() | KeyboardInterrupt():
            return "stopped", 130
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        return LOST, 75
    fault = machine_fault(error)
    return (f"error: {fault}", 2) if fault else _mistyped(error)


def machine_fault(error: BaseException) -> str | None:
    """What is wrong with the machine, not with us: its disk, its memory, its operations; None for anything else."""
    if "does not have a deterministic implementation" in str(error):
        return f"deterministic: {str(error).partition(' does not')[0]} has no such form on this device; leave it out"
    if is_out_of_memory(error):
        return (
            "out of memory; lower the micro_batch_size of what was at work (teacher.fit, distil.fit, targets, "
            f"evaluate); {AGAIN}"
        )
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in DISK:
            where = f"{cause.filename}: " if cause.filename else ""
            return f"{where}{cause.strerror}; {AGAIN}"
        match = DISK_TEXT.search(str(cause))
        if match is not None and not isinstance(cause, AssertionError):
            return f"{match.group()}, while writing or reading a file; {AGAIN}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in main memory."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's; not imported for a message
    return named or isinstance(error, MemoryError) or "DefaultCPUAllocator: " in str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    ids: set[int] = set()
    while error is not None and id(error) not in ids:
        ids.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _mistyped(error: BaseException) -> tuple[str, int] | None:
    """A mistake on the command line; its text is empty after the help was printed."""
    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
        text = error.format_message()
        return (f"error: {text}" if text else ""), 2
    return None
