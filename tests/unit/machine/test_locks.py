"""Locks between processes: one holder, named; free when he lets go or dies; told where there are none."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket

import pytest

from distilpeft.errors import InputError
from distilpeft.machine.locks import IN_USE, Lock, held_by_others, in_use


def test_only_one_holds_a_lock_and_is_named(tmp_path):
    first, second = Lock(tmp_path, "teacher-1"), Lock(tmp_path, "teacher-1")
    assert first.acquire()
    assert not second.acquire()
    assert second.holder() == f"process {os.getpid()} on {socket.gethostname()}"
    assert Lock(tmp_path, "teacher-2").acquire()
    first.release()
    assert second.acquire()
    second.release()
    second.release()  # nothing to let go of


def test_a_killed_holder_lets_go(tmp_path):
    lock = Lock(tmp_path, "teacher-1")
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")

    def hold() -> None:
        there.send(lock.acquire())
        signal.pause()

    holder = context.Process(target=hold)
    holder.start()
    assert here.recv()
    assert not lock.acquire()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert lock.acquire()
    lock.release()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(_handle: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=r"teacher-1: cannot be locked \(No locks available\)"):
        Lock(tmp_path, "teacher-1").acquire()


def test_any_number_share_a_lock_and_nobody_has_it_alone_meanwhile(tmp_path):
    alone = Lock(tmp_path, IN_USE)
    with in_use(tmp_path), in_use(tmp_path):
        assert not alone.acquire()
    assert alone.acquire()
    assert not Lock(tmp_path, IN_USE).acquire(shared=True)
    alone.release()


def test_locks_that_others_hold_are_listed_with_their_holders(tmp_path):
    held, free = Lock(tmp_path, "teacher-1"), Lock(tmp_path, "distil-2")
    assert held.acquire()
    assert free.acquire()
    free.release()
    with in_use(tmp_path):
        assert held_by_others(tmp_path) == {"teacher-1": f"process {os.getpid()} on {socket.gethostname()}"}
    held.release()
    assert held_by_others(tmp_path) == {}
    assert held_by_others(tmp_path / "nowhere") == {}
