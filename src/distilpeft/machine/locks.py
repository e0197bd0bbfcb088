"""Locks between processes, here or on machines that share a folder: files that the kernel unlocks when a holder dies.

`flock` works on local disks and over NFS (Linux); a file system without it is reported, not ignored.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from distilpeft.errors import InputError
from distilpeft.machine.files import names_in

POLL_S = 0.5
"""How long to wait before trying again."""
LOCKS, IN_USE = ".locks", "in-use"
"""The folder of the locks in a run's folder; the lock that all share who work there."""
BUSY = (errno.EWOULDBLOCK, errno.EACCES)
"""What the system says of a lock that somebody holds."""


class Lock:
    """One lock file, `.locks/NAME` in a run's folder; it stays: deleting what somebody waits for would let two in."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / LOCKS / name
        self._handle: int | None = None

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock if it is free; `shared`, also if it is held by others who share it.

        Raises:
            InputError: the file system knows no locks.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in BUSY:
                return False
            message = f"{self.path}: cannot be locked ({error.strerror}); use a file system with locks"
            raise InputError(message) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._handle = handle
        return True

    def release(self) -> None:
        """Let others in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def holder(self) -> str:
        """Who took it last."""
        return self.path.read_text(encoding="utf-8") if self.path.is_file() else ""

    @contextmanager
    def held(self, *, shared: bool = False) -> Iterator[None]:
        """Wait for the lock, which others hold for a moment only, and keep it for the block."""
        while not self.acquire(shared=shared):
            time.sleep(POLL_S / 10)
        try:
            yield
        finally:
            self.release()


def in_use(folder: Path) -> AbstractContextManager[None]:
    """For the block, let nobody clear away anything in a run's folder; any number of processes may do so at once."""
    return Lock(folder, IN_USE).held(shared=True)


def held_by_others(folder: Path) -> dict[str, str]:
    """The locks of a run's folder that somebody works under, with who that is; nothing is written."""
    holders = {}
    for name in sorted(names_in(folder / LOCKS) - {IN_USE}):
        lock = Lock(folder, name)
        with lock.path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in BUSY:
                    holders[name] = lock.holder()
    return holders
