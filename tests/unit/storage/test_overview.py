"""The list of runs: how far they are, who works on them, what they take."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
from support import reports

from distilpeft import api, cli
from distilpeft.errors import InputError
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.files import sealed
from distilpeft.machine.locks import LOCKS, Lock
from distilpeft.storage import records


def verb(runs: Path, *arguments: str) -> int:
    with mock.patch.object(sys, "argv", ["distilpeft", "runs", "--runs", str(runs), *arguments]):
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0


def made(run: Path, number: int, *, done: bool = True) -> Artifact:
    folder = run / f"distil-{number:012x}"
    folder.mkdir(parents=True)
    if done:
        (folder / "manifest.json").write_text("{}")
    return Artifact("distil", folder, {}, {})


@pytest.fixture
def runs(tmp_path) -> Path:
    """A finished run, one that was interrupted after one of two steps, and folders that are no runs."""
    finished = tmp_path / "finished"
    report = reports.two_runs()[0].as_json()
    artifacts = {"distil/student": made(finished, 1).path.name}
    (finished / "report.json").write_text(json.dumps(sealed({**report, "artifacts": artifacts})))
    begun = tmp_path / "begun"
    records.save(begun / "plan.json", [made(begun, 1), made(begun, 2, done=False)])
    (tmp_path / "notes").mkdir()
    (tmp_path / "linked").symlink_to(finished)
    return tmp_path


def test_a_finished_run_has_its_score_and_the_export_to_deploy(runs):
    _, finished = api.runs(runs)
    assert (finished.name, finished.state) == ("finished", "finished")
    assert (finished.metric, finished.score, finished.deploy) == ("accuracy", 0.8133, "onnx-int8")
    assert finished.bytes == sum(file.stat().st_size for file in (runs / "finished").rglob("*.json"))


def test_an_interrupted_run_says_how_far_it_is(runs):
    begun, _ = api.runs(runs)
    assert (begun.state, begun.score, begun.deploy) == ("1 of 2 steps", None, None)


def test_the_points_of_an_unfinished_sweep_count(runs):
    finished = runs / "finished"
    point = [made(finished, 7), made(finished, 8, done=False)]
    records.save(finished / "sweep-0123456789ab/plans/0.json", point, {"seed": 1})
    assert api.runs(runs)[1].state == "2 of 3 steps"


def test_who_works_on_a_run_is_named_and_looking_leaves_no_trace(runs):
    lock = Lock(runs / "begun", "distil-000000000002")
    assert lock.acquire()
    begun, finished = api.runs(runs)
    assert begun.state == f"1 of 2 steps, process {os.getpid()} on {os.uname().nodename} is working on it"
    assert finished.working == ()
    assert not (runs / "finished" / LOCKS).exists()
    lock.release()
    assert lock.holder()
    assert api.runs(runs)[0].working == ()


def test_a_run_whose_plan_nobody_wrote_down_counts_what_is_there(tmp_path):
    made(tmp_path / "old", 1)
    (old,) = api.runs(tmp_path)
    assert (old.state, old.steps) == ("1 step done", None)


def test_the_command_prints_a_table_with_totals_or_json(runs, capsys):
    assert verb(runs) == 0
    said = capsys.readouterr().out
    assert "accuracy 0.8133" in said
    assert "2 runs, " in said
    assert verb(runs, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["runs"]] == ["begun", "finished"]
    assert found["bytes"] == sum(one["bytes"] for one in found["runs"])
    assert found["free_bytes"] > 0


def test_a_folder_without_runs_says_so_and_a_missing_one_is_refused(tmp_path, capsys):
    assert verb(tmp_path) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}: no runs"
    with pytest.raises(InputError, match="no such folder"):
        api.runs(tmp_path / "nowhere")
