"""`devices` in a recipe: processes that the command starts itself, with one voice and one fault."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from support import commands

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe


@pytest.fixture(autouse=True)
def _own_server():
    """Processes print where their server printed when it was started: it has to be in this test."""
    commands.stop_server()
    yield
    commands.stop_server()


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("RANK", raising=False)
    return commands.workspace(tmp_path)


def teacher(recipe: Path, *settings: str):
    return make_plan(load_recipe(recipe, settings), recipe.parent / "runs").artifacts["teacher"]


@pytest.mark.thorough
def test_a_run_on_two_devices_is_one_run_in_two_processes(recipe, capfd):
    assert commands.run(recipe, "--set", "devices=2", "--until", "teacher") == 0
    manifest = teacher(recipe).manifest()
    assert manifest["environment"]["num_processes"] == 2
    assert manifest["figures"]["parallel"] == "ddp"
    said = capfd.readouterr().err
    assert said.count("2 processes, each on ") == said.count("teacher → ") == 1
    assert (recipe.parent / "runs/tiny/logs/rank-1.log").read_text() == "", "nothing that should have been told"
    assert teacher(recipe).key == teacher(recipe, "devices=2", "parallel=fsdp2").key, "the result is the same"


def without_interrupted_callbacks(said: str) -> str:
    """What was said, without what Python reports of a signal that comes inside a finalizer, where it is ignored."""
    return re.sub(r"Exception ignored in.*?\nKeyboardInterrupt[^\n]*\n", "", said, flags=re.DOTALL)


@pytest.mark.thorough
def test_a_fault_of_all_processes_is_told_once(recipe, capfd):
    assert commands.run(recipe, "--set", "devices=2", "--set", "teacher.optim.lr=1e-9") == 3
    said = without_interrupted_callbacks(capfd.readouterr().err)
    assert said.count("stopped: the tuned teacher is no better than chance") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_process_that_is_killed_stops_the_run_with_a_line_and_the_run_goes_on(recipe, capfd):
    settings = ("--set", "devices=2", "--set", "teacher.fit.epochs=20", "--until", "teacher")

    def kill() -> None:
        checkpoints = recipe.parent / "runs"
        while not list(checkpoints.glob("tiny/teacher-*.partial/checkpoints/step-*[0-9]")):
            time.sleep(0.05)
        os.kill(max(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert commands.run(recipe, *settings) == 2
    killer.join()
    said = capfd.readouterr().err
    assert "error: process 2 of 2 was killed (exit code -9; " in said
    said = without_interrupted_callbacks(said)
    assert "Traceback" not in said
    assert not multiprocessing.active_children()
    assert commands.run(recipe, *settings) == 0
    assert "teacher: resuming after step " in capfd.readouterr().err


@pytest.mark.slow
def test_torchrun_starts_the_processes_and_nothing_more_is_started(recipe):
    done = commands.joined(recipe, 2, "--set", "devices=4", "--until", "teacher")
    assert [one.returncode for one in done] == [0, 0]
    assert teacher(recipe).manifest()["environment"]["num_processes"] == 2
