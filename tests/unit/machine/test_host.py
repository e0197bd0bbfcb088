"""What processes are given before torch is imported."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest

from distilpeft.machine import host


@pytest.fixture
def environment(monkeypatch):
    kept = dict(os.environ)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("DISTILPEFT_SET_WAIT_POLICY", raising=False)
    yield os.environ
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    os.environ.update(kept)


def test_threads_sleep_while_they_wait_but_not_where_speed_is_measured(environment):
    host.prepare_imports()
    assert environment["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in host.for_timing()
    host.prepare_imports()  # in a child process, which inherits it
    assert "OMP_WAIT_POLICY" not in host.for_timing()
    assert "DISTILPEFT_SET_WAIT_POLICY" not in host.for_timing()


@pytest.mark.parametrize("policy", ["active", "passive"])
def test_how_threads_wait_stays_as_the_user_has_set_it(environment, policy):
    environment["OMP_WAIT_POLICY"] = policy
    host.prepare_imports()
    assert environment["OMP_WAIT_POLICY"] == host.for_timing()["OMP_WAIT_POLICY"] == policy


def test_a_timed_process_is_no_part_of_a_launch(environment, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert "RANK" not in host.for_timing()


@pytest.fixture
def clock(monkeypatch):
    """What /proc/stat and the process's own time say, in seconds."""
    found = {"now": 100.0, "busy": 50.0, "own": 5.0}
    monkeypatch.setattr(host, "_start", [])
    monkeypatch.setattr(host.time, "monotonic", lambda: found["now"])
    monkeypatch.setattr(host, "busy_s", lambda: found["busy"])
    monkeypatch.setattr(host, "_own_s", lambda: found["own"])
    return found


def test_what_other_programs_take_is_what_is_not_our_own(environment, clock):
    assert host.busy_elsewhere() is None, "nothing was begun"
    host.prepare_imports()
    assert host.busy_elsewhere() is None, "too short"
    clock.update(now=110.0, busy=72.0, own=13.0)
    assert host.busy_elsewhere() == pytest.approx((22 - 8) / 10)
    host.prepare_imports()  # by the command that the command line calls: the window stays
    assert host.busy_elsewhere() == pytest.approx(1.4)
    clock.update(busy=57.0)
    assert host.busy_elsewhere() == 0.0, "rounding of ticks"
    clock.update(now=161.0)
    assert host.busy_elsewhere() is None, "long ago"
    clock.update(now=110.0, busy=None)
    assert host.busy_elsewhere() is None


def test_work_of_this_process_is_part_of_what_the_processors_do():
    before, own = host.busy_s(), host._own_s()
    begin = time.monotonic()
    while time.monotonic() - begin < 0.5:
        pass
    assert host._own_s() - own > 0.1
    assert host.busy_s() - before >= 0.9 * (host._own_s() - own) - 0.05


@pytest.mark.parametrize(
    ("busy", "label", "is_said"), [(0.9, "", True), (0.2, "", False), (None, "", False), (0.9, "[1] ", False)]
)
def test_a_run_says_once_that_the_machine_is_shared(monkeypatch, capsys, busy, label, is_said):
    from distilpeft.pipeline import chain

    monkeypatch.setattr(chain, "busy_elsewhere", lambda: busy)
    chain.runtime_of(SimpleNamespace(devices="cpu", parallel="ddp", deterministic=False), label)
    assert ("other programs keep 0.9 of" in capsys.readouterr().err) == is_said
