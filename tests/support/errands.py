"""What workers are sent to do in tests; a module of its own, because their fresh processes import it by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from distilpeft.errors import GateError, InputError, StoppedBySignal
from distilpeft.machine import processes


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


def meet(folder: Path) -> dict[str, str]:
    (folder / f"port-{os.environ['RANK']}").write_text(os.environ["MASTER_PORT"])
    return {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}


def speak() -> None:
    os.system("echo rank $RANK speaks")  # as a library does that knows nothing of sys.stdout


def lose(kind: str, folder: Path) -> None:
    """The second rank fails; the others lose it, as the gloo of torch tells it."""
    number = int(os.environ["RANK"]) + 1
    if number == 2:
        while not {"1", "3"} <= {path.name for path in folder.iterdir()}:
            time.sleep(0.05)
        raise {"input": InputError("bad row"), "gate": GateError("not finite"), "bug": KeyError("x")}[kind]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    (folder / str(number)).touch()
    time.sleep(2)
    raise RuntimeError("Connection closed by peer")


def hang(folder: Path) -> None:
    """The second rank is killed while the first one waits for it where no signal is heard."""
    if os.environ["RANK"] == "1":
        while not (folder / "pid").exists():
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)


def start_ranks(folder: Path) -> None:
    processes.joined(2, sleep, (folder,), folder / "logs")


def sleep(folder: Path) -> None:
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(60)
