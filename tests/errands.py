"""What workers are sent to do in tests; a module of its own, because their fresh processes import it by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from distilpeft.errors import GateError, InputError, StoppedBySignal


def environment(number: int, name: str) -> tuple[int, str | None]:
    return number, os.environ.get(name)


def fault(number: int, kind: str, folder: Path) -> None:
    """The second one fails once the others wait; they would go on for a minute."""
    if number != 2:
        wait_for_a_signal(number, folder)
        return
    while not {"1", "3"} <= {path.name for path in folder.iterdir()}:
        time.sleep(0.05)
    raise {"input": InputError("bad row"), "gate": GateError("not finite"), "bug": KeyError("x")}[kind]


def wait_for_a_signal(number: int, folder: Path) -> None:
    """Leave a file while waiting, and another one when stopped."""

    def leave(_number: int, _frame: object) -> None:
        (folder / f"stopped-{number}").touch()
        raise StoppedBySignal("stopped at step 3", 75)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    (folder / str(number)).touch()
    time.sleep(60)


def killed(number: int, victims: list[int]) -> int:
    if number in victims:
        os.kill(os.getpid(), signal.SIGKILL)
    return number
