"""Stopped anyhow, the same command ends in the same weights; a bad teacher ends the run with its figures."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
from support import commands

from distilpeft.errors import GateError
from distilpeft.machine.artifact import Published
from distilpeft.machine.locks import POLL_S, Lock
from distilpeft.machine.runtime import Runtime
from distilpeft.pipeline.jobs import Finished, Waiting, jobs_of, look
from distilpeft.pipeline.stages.teacher import _gate
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

SHORT = ("--until", "distil")
UNTIL_TEACHER = ("--until", "teacher")


def weights(recipe: Path) -> dict[str, str]:
    """SHA-256 of the tuned adapter and of both students."""
    plan = make_plan(load_recipe(recipe), recipe.parent / "runs")
    files = {
        "teacher": "adapter/adapter_model.safetensors",
        "distil/student_ce_only": "model/model.safetensors",
        "distil/student": "model/model.safetensors",
    }
    return {
        step: hashlib.sha256((plan.artifacts[step].path / file).read_bytes()).hexdigest()
        for step, file in files.items()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    recipe = commands.workspace(tmp_path_factory.mktemp("undisturbed"), teacher__lora__dropout=0.1)
    assert commands.run_apart(recipe, *SHORT).returncode == 0
    return weights(recipe)


@pytest.mark.parametrize(("label", "step"), [pytest.param("teacher", 8, marks=pytest.mark.thorough), ("distil", 11)])
def test_killed_in_the_middle_the_same_command_ends_in_the_same_weights(tmp_path, undisturbed, label, step):
    """kill -9 after a checkpoint and some more steps; LoRA dropout is on, so random numbers matter too."""
    recipe = commands.workspace(tmp_path, teacher__lora__dropout=0.1)
    killed = commands.run_apart(recipe, *SHORT, before=commands.signal_at(label, step, "SIGKILL"))
    assert killed.returncode == -signal.SIGKILL
    assert not make_plan(load_recipe(recipe), recipe.parent / "runs").artifacts["distil/student"].done
    resumed = commands.run_apart(recipe, *SHORT)
    assert resumed.returncode == 0, resumed.output
    assert f"{label}: resuming after step {step // 3 * 3 if label == 'teacher' else 9}" in resumed.output
    assert weights(recipe) == undisturbed


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), pytest.param("SIGINT", 130, marks=pytest.mark.thorough)])
def test_a_signal_leaves_a_checkpoint_of_that_very_step(tmp_path, undisturbed, name, code):
    recipe = commands.workspace(tmp_path, teacher__lora__dropout=0.1)
    stopped = commands.run_apart(recipe, *SHORT, before=commands.signal_at("teacher", 5, name))
    assert stopped.returncode == code
    assert "Traceback" not in stopped.output
    assert "stopped teacher at step 6 of 16; run the same command to resume" in stopped.output
    resumed = commands.run_apart(recipe, *SHORT)
    assert resumed.returncode == 0, resumed.output
    assert "teacher: resuming after step 6" in resumed.output
    assert weights(recipe) == undisturbed


@pytest.mark.thorough
def test_a_signal_to_one_process_in_a_validation_stops_all_before_it_and_the_end_is_the_same(tmp_path):
    """Whichever gets it: they agree before a batch of the validation, save the step and leave."""
    short = {"teacher__lora__dropout": 0.0}
    undisturbed, recipe = (commands.workspace(tmp_path / name, **short) for name in ("whole", "cut"))
    assert [one.returncode for one in commands.joined(undisturbed, 2, *UNTIL_TEACHER)] == [0, 0]
    before = """
import os, signal
from distilpeft.machine.runtime import Runtime
leave_if_asked, turns = Runtime.leave_if_asked, []
def signalled(self, turn):
    turns.append(self._interruptible)
    if sum(turns) == 2 and self._interruptible and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    leave_if_asked(self, turn)
Runtime.leave_if_asked = signalled
"""
    stopped = commands.joined(recipe, 2, *UNTIL_TEACHER, before=before)
    assert {one.returncode for one in stopped} <= {75, 130}, stopped[0].output
    assert "stopped teacher at step 8 of 16" in stopped[0].output
    resumed = commands.joined(recipe, 2, *UNTIL_TEACHER)
    assert [one.returncode for one in resumed] == [0, 0], resumed[0].output
    assert "teacher: resuming after step 8" in resumed[0].output
    files = [
        make_plan(load_recipe(one), one.parent / "runs").artifacts["teacher"].file("adapter/adapter_model.safetensors")
        for one in (undisturbed, recipe)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_where_nothing_is_to_be_saved_ends_the_command_at_once(tmp_path, name, code):
    recipe = commands.workspace(tmp_path)
    before = f"""
import os, signal, time
from distilpeft.pipeline.stages import teacher
def run(*_):
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
teacher.run = run
"""
    stopped = commands.run_apart(recipe, *UNTIL_TEACHER, before=before)
    assert stopped.returncode == code
    assert "stopped; run the same command to resume at the last checkpoint\n" in stopped.output
    assert "Traceback" not in stopped.output


def test_a_resumed_log_holds_every_step_once(tmp_path):
    recipe = commands.workspace(tmp_path)
    commands.run_apart(recipe, *UNTIL_TEACHER, before=commands.signal_at("teacher", 8, "SIGKILL"))
    assert commands.run_apart(recipe, *UNTIL_TEACHER).returncode == 0
    plan = make_plan(load_recipe(recipe), recipe.parent / "runs")
    lines = (plan.artifacts["teacher"].path / "train_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 17))


def test_a_teacher_no_better_than_chance_stops_the_run_with_the_figures(tmp_path, capfd):
    """Trap 20: with labels by coin toss no teacher can be right."""
    recipe = commands.workspace(tmp_path, noise=0.5, teacher__optim__lr=1e-9)
    assert commands.run(recipe) == 3
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("stopped: the tuned teacher is no better than chance: its validation accuracy is 0.")
    assert "the majority class 0." in error
    assert not list((tmp_path / "runs/tiny").glob("targets-*"))
    assert commands.run(recipe) == 3, "the same command, without training again, says the same"


def test_the_gate_can_be_lowered_to_a_warning(tmp_path, capfd):
    recipe = commands.workspace(tmp_path, noise=0.5, teacher__optim__lr=1e-9, teacher__gate="warn")
    assert commands.run(recipe, "--until", "teacher") == 0
    assert "warning: the tuned teacher is no better than chance" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_stops_at_its_step_and_names_rows(tmp_path, capfd):
    recipe = commands.workspace(tmp_path, teacher__optim={"lr": 1e30, "max_grad_norm": None, "warmup_ratio": 0})
    assert commands.run(recipe) == 3
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "teacher: step 2: loss nan" in error
    assert "not finite, because of every row of" in error


def test_two_runs_at_once_on_one_folder_share_the_work(tmp_path):
    recipe = commands.workspace(tmp_path)
    done = commands.side_by_side(recipe, verb="run")
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.output[-2000:] for one in done)
    made = [line.rpartition(" ")[2] for one in done for line in one.output.splitlines() if " → " in line]
    assert len(made) == len(set(made)) == len(make_plan(load_recipe(recipe), tmp_path / "runs").artifacts)


def test_a_run_waits_for_what_another_one_is_at_and_says_so_once(tmp_path):
    recipe = commands.workspace(tmp_path)
    plan = make_plan(load_recipe(recipe), tmp_path / "runs")
    lock = Lock(plan.folder, plan.artifacts["teacher"].path.name)
    assert lock.acquire()
    output = tmp_path / "output.txt"
    with ThreadPoolExecutor() as threads:
        running = threads.submit(commands.run_apart, recipe, *UNTIL_TEACHER)
        while not (output.is_file() and "waiting" in output.read_text()):
            assert not running.done(), output.read_text()
            time.sleep(0.05)
        time.sleep(2 * POLL_S)
        assert not plan.artifacts["teacher"].partial.exists(), "nothing is touched before the lock is free"
        lock.release()
    assert running.result().returncode == 0
    told = [line for line in output.read_text().splitlines() if "waiting" in line]
    assert len(told) == 1
    assert f"process {os.getpid()} on {socket.gethostname()} is working on it" in told[0]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capfd, monkeypatch):
    recipe = commands.workspace(tmp_path)
    capfd.readouterr()  # what saving the base model printed
    make = Path.mkdir

    def refuse(folder: Path, *arguments: object, **options: object) -> None:
        if "runs" in folder.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        make(folder, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert commands.run(recipe) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "runs/tiny/.locks: Permission denied" in error[0]


@pytest.mark.parametrize(
    ("tuned", "untuned", "majority", "finite", "stops"),
    [
        (0.8, 0.7, 0.6, 1.0, False),
        (0.8, 0.7, 0.8, 1.0, True),
        (0.8, 0.8, 0.6, 1.0, True),
        (1.0, 1.0, 0.6, 1.0, False),
        (0.8, 0.7, 0.6, 0.0, True),
    ],
    ids=["better", "as the majority", "as the untuned base", "as a base without a fault", "not finite"],
)
def test_the_gate_asks_for_more_than_the_majority_and_more_than_the_untuned_base(
    tmp_path, tuned, untuned, majority, finite, stops
):
    recipe = load_recipe(commands.workspace(tmp_path))
    figures = {
        "tuned": {"accuracy": tuned, "finite": finite},
        "untuned": {"accuracy": untuned},
        "majority": {"accuracy": majority},
    }
    with pytest.raises(GateError, match="is no better than chance") if stops else nullcontext():
        _gate(Runtime(), recipe, figures)


def test_what_another_run_finished_while_this_one_took_its_lock_is_not_made_again(tmp_path):
    plan = make_plan(load_recipe(commands.workspace(tmp_path)), tmp_path / "runs")
    jobs, published, acquire = jobs_of(plan, "teacher"), Published(), Lock.acquire

    def acquire_late(lock: Lock) -> bool:
        plan.artifacts["teacher"].path.mkdir(parents=True)
        (plan.artifacts["teacher"].path / "manifest.json").write_text("{}")
        return acquire(lock)

    with mock.patch.object(Lock, "acquire", acquire_late):
        assert look(jobs, published) == Waiting()
    assert look(jobs, published) == Finished()
    assert Lock(plan.folder, plan.artifacts["teacher"].path.name).acquire(), "the lock was let go"
