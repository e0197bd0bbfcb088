"""Locks between processes, here or on machines that share a folder: files that the kernel unlocks when a holder dies.

`flock` works on local disks and over NFS (Linux); a file system without it is told, not ignored.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distilpeft.errors import InputError

POLL_S = 0.5
"""How long to wait before trying again."""


class Lock:
    """One lock file, `.locks/NAME` in a run's folder; it stays: deleting what somebody waits for would let two in."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / ".locks" / name
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Take the lock if it is free.

        Raises:
            InputError: the file system knows no locks.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
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
    def held(self) -> Iterator[None]:
        """Wait for the lock, keep it for the block: for work of a moment."""
        while not self.acquire():
            time.sleep(POLL_S / 10)
        try:
            yield
        finally:
            self.release()
