"""The ways in which a run ends early, each with its exit code. Everything else is a bug and shows a traceback."""

from __future__ import annotations


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
    """Stopped by a signal after a checkpoint; the same command goes on from there. Exit code 75 (or 130)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)  # both, so that it comes whole out of another process
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])
