"""Which job comes next: what a look costs, what it takes for done, and whom it waits for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from distilpeft.machine.artifact import Artifact, Published, artifact
from distilpeft.machine.locks import Lock
from distilpeft.pipeline.jobs import Finished, Job, Ready, Waiting, look
from distilpeft.planning.plan import Plan, Step

CALLS = ("stat", "lstat", "listdir", "scandir")


def plan_of(folder: Path, count: int) -> Plan:
    """So many steps that all need the ones before."""
    steps = [Step(artifact(folder, f"stage{number}", 1, {}, {})) for number in range(count)]
    return Plan(None, folder, "rows", tuple(steps))


def jobs_of(plan: Plan) -> list[Job]:
    return [Job(plan, step) for step in plan.own]


def publish(one: Artifact) -> None:
    one.partial.mkdir(parents=True)
    one.publish({}, {})


@pytest.fixture
def calls(monkeypatch):
    """File-system calls that were made so far, by name."""
    made = dict.fromkeys(CALLS, 0)

    def counted(name, function):
        def call(*arguments, **options):
            made[name] += 1
            return function(*arguments, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return made


@pytest.mark.parametrize("count", [3, 30])
@pytest.mark.parametrize("num_plans", [1, 12])
def test_a_look_lists_the_folder_once_however_many_jobs_and_artifacts_there_are(tmp_path, calls, count, num_plans):
    plans = [plan_of(tmp_path, count) for _ in range(num_plans)]
    jobs, published = [job for plan in plans for job in jobs_of(plan)], Published()
    for one in list(plans[0].artifacts.values())[:-1]:
        publish(one)
    first = look(jobs, published)
    assert isinstance(first, Ready)
    assert (first.job.step.name, first.num_done, first.num_all) == (f"stage{count - 1}", count - 1, count)
    first.release()
    calls.update(dict.fromkeys(CALLS, 0))
    again = look(jobs, published)
    assert isinstance(again, Ready)
    again.release()
    assert calls == {"stat": 1, "lstat": 0, "listdir": 2, "scandir": 0}, "a listing before the lock, one after; .locks"


def test_a_manifest_is_looked_for_once_for_each_new_folder(tmp_path, calls):
    plan, published = plan_of(tmp_path, 20), Published()
    for one in plan.artifacts.values():
        publish(one)
    calls.update(dict.fromkeys(CALLS, 0))
    for _ in range(3):
        assert look(jobs_of(plan), published) == Finished()
    assert calls == {"stat": 20, "lstat": 0, "listdir": 3, "scandir": 0}


def test_what_others_publish_or_delete_is_seen_at_the_next_look(tmp_path):
    plan, published = plan_of(tmp_path, 2), Published()
    first, second = plan.artifacts.values()
    assert first not in published
    publish(first)
    assert first not in published, "nobody has looked since"
    published.look(tmp_path)
    assert first in published
    assert second not in published
    shutil.rmtree(first.path)
    published.look(tmp_path)
    assert first not in published


def test_a_folder_is_done_only_with_its_manifest(tmp_path):
    plan, published = plan_of(tmp_path, 1), Published()
    (one,) = plan.artifacts.values()
    one.path.mkdir()
    published.look(tmp_path)
    assert one not in published
    (one.path / "manifest.json").write_text("{}")
    published.look(tmp_path)
    assert one in published


def test_a_job_that_somebody_else_has_is_waited_for_and_the_next_free_one_is_taken(tmp_path):
    plan, other = plan_of(tmp_path, 1), plan_of(tmp_path, 2)
    publish(other.artifacts["stage0"])
    jobs = [*jobs_of(plan_of(tmp_path / "a", 1)), *jobs_of(other)]
    held = Lock(jobs[0].plan.folder, jobs[0].artifact.path.name)
    assert held.acquire()
    taken = look(jobs, Published())
    assert isinstance(taken, Ready)
    assert taken.job is jobs[2]
    found = look(jobs, Published())
    assert isinstance(found, Waiting)
    assert [job for job, _ in found.busy] == [jobs[0], jobs[2]]
    taken.release()
    assert isinstance(look(jobs, Published()), Ready)
    assert look(jobs_of(plan), Published()) == Finished()
