"""What processes are given before torch is imported."""

from __future__ import annotations

import os

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
