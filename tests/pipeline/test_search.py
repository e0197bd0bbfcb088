"""Searches: shared teacher and cache, resumable at any instant, shared by processes and machines, honest about what
picked the winner."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from unittest import mock

import pytest
from support import commands

import distilpeft
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tuning import search_space
from distilpeft.tuning.optuna_study import Outcome, Study, Trial

SPACE = ("--search", "distil.optim.lr=1e-4..1e-2:log", "--search", "distil.alpha=0.1..0.9")
OVER = ("--over", "distil.temperature=1,2")
FAST = ("--set", "distil.fit.monitor=log_loss", "--set", "distil.fit.epochs=2")
FIVE = (*SPACE, *OVER, *FAST, "--trials", "5")


def workspace(folder: Path, **changes: object) -> Path:
    return commands.workspace(folder, noise=0.2, teacher__gate="warn", **changes)


def search(recipe: Path, *arguments: str) -> int:
    return commands.run(recipe, *arguments, verb="sweep")


def joint_of(recipe: Path, runs: str = "runs") -> dict:
    (found,) = (recipe.parent / runs / "tiny").glob("search-*/search.json")
    return json.loads(found.read_text())


def trials_of(recipe: Path) -> list[tuple]:
    """What was asked and found, without times."""
    return [(row["values"], row["validation"], row["state"], row["validations"]) for row in joint_of(recipe)["trials"]]


def made_by(*done: commands.Done) -> list[str]:
    return [line.rpartition(" ")[2] for one in done for line in one.output.splitlines() if " → " in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = workspace(tmp_path_factory.mktemp("search"))
    done = commands.run_apart(recipe, *FIVE, verb="sweep")
    assert done.returncode == 0, done.output
    return recipe


@pytest.mark.thorough
def test_trials_share_one_teacher_and_one_cache_and_only_the_best_is_done_in_full(finished):
    run, joint = finished.parent / "runs/tiny", joint_of(finished)
    assert [row["state"] for row in joint["trials"]] == ["done"] * 5
    assert (len([*run.glob("teacher-*")]), len([*run.glob("targets-*")])) == (1, 1)
    assert len([*run.glob("distil-*")]) == 5 + 1, "five students, and the best one's CE-only baseline"
    assert len([*run.glob("export-*")]) == 1
    best = joint["trials"][joint["best"]]
    assert best["validation"] == min(row["validation"] for row in joint["trials"])
    report = json.loads((run / "report.json").read_text())
    assert report["artifacts"]["distil/student"] == best["artifact"]
    assert (run / "student").resolve().parent.name == report["artifacts"]["bundle/safetensors"]


@pytest.mark.thorough
def test_the_trials_of_a_search_stay_and_keep_best_leaves_the_student_of_one(finished):
    run, joint = finished.parent / "runs/tiny", joint_of(finished)
    assert distilpeft.clean(run, dry_run=True) == []
    removed = {item.path.name for item in distilpeft.clean(run, keep="best", dry_run=True)}
    assert removed == {row["artifact"] for row in joint["trials"]} - {joint["trials"][joint["best"]]["artifact"]}


@pytest.mark.thorough
def test_the_recipes_own_settings_are_the_first_trial(finished):
    first, *others = joint_of(finished)["trials"]
    assert first["values"] == {"distil.optim.lr": 0.005, "distil.alpha": 0.5, "distil.temperature": 2}
    assert first["own"]
    assert not any(row["own"] for row in others)
    assert len({row["artifact"] for row in [first, *others]}) == 5


@pytest.mark.thorough
def test_the_best_trial_is_what_a_run_with_its_settings_is(finished):
    joint = joint_of(finished)
    text = next((finished.parent / "runs/tiny").glob("search-*/search.md")).read_text()
    settings = text.partition("as a run with ")[2].splitlines()[0].replace("'", "").split("--set ")
    plan = make_plan(
        load_recipe(finished, ["distil.fit.monitor=log_loss", "distil.fit.epochs=2", *map(str.strip, settings[1:])]),
        finished.parent / "runs",
    )
    assert not plan.missing()
    assert plan.artifacts["distil/student"].path.name == joint["trials"][joint["best"]]["artifact"]


@pytest.mark.thorough
def test_a_finished_search_asks_nothing_and_needs_no_torch(finished, capsys):
    before = trials_of(finished)
    with mock.patch.dict("sys.modules", {"distilpeft.pipeline.chain": None}):  # what computes cannot even be imported
        assert search(finished, *FIVE) == 0
    said = capsys.readouterr().out
    assert "nothing to do: all 5 trials are done" in said
    assert "The test rows picked nothing." in said
    assert all(len(line) <= 80 for line in said.splitlines() if "lr=" in line and "--set" not in line)
    assert trials_of(finished) == before


@pytest.mark.parametrize(("step", "trial"), [(8, 1), pytest.param(11, 3, marks=pytest.mark.slow)])
@pytest.mark.thorough
def test_killed_in_the_middle_of_a_trial_the_same_command_ends_in_the_same_trials(tmp_path, finished, step, trial):
    recipe = workspace(tmp_path)
    kill = f"""
import os, signal
import distilpeft.training.train as loop
log, seen = loop._log, []
def log_then_die(runtime, work, line):
    log(runtime, work, line)
    if work.label == "distil" and line["step"] == {step}:
        seen.append(1)
        if len(seen) == {trial}:
            os.kill(os.getpid(), signal.SIGKILL)
loop._log = log_then_die
"""
    killed = commands.run_apart(recipe, *FIVE, verb="sweep", before=kill)
    assert killed.returncode == -signal.SIGKILL
    resumed = commands.run_apart(recipe, *FIVE, verb="sweep")
    assert resumed.returncode == 0, resumed.output
    assert "distil: resuming after step" in resumed.output
    assert sorted(map(str, trials_of(recipe))) == sorted(map(str, trials_of(finished)))
    digests = [
        hashlib.sha256((one.parent / "runs/tiny/student/model.safetensors").read_bytes()).hexdigest()
        for one in (recipe, finished)
    ]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_processes_share_a_search_and_make_as_many_trials_as_were_asked_for(tmp_path):
    recipe = workspace(tmp_path)
    seven = (*SPACE, *FAST, "--trials", "7")
    argv = commands.arguments_of(recipe, seven, "sweep")
    done = commands.apart([(tmp_path / "a.txt", argv, "", {}), (tmp_path / "b.txt", [*argv, "--jobs", "2"], "", {})])
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.output[-2000:] for one in done)
    joint = joint_of(recipe)
    assert len(joint["trials"]) == 7
    assert {row["state"] for row in joint["trials"]} <= {"done", "given up"}
    made = made_by(*done)
    assert len(made) == len(set(made)), "nothing is made twice"
    assert sum("→" in line and "distil/student →" in line for one in done for line in one.output.splitlines()) == 7
    assert search(recipe, *SPACE, *FAST, "--trials", "8") == 0, "more trials go on with the same search"
    assert len(joint_of(recipe)["trials"]) == 8


@pytest.mark.slow
def test_processes_joined_by_torchrun_make_every_trial_together(tmp_path):
    recipe = workspace(tmp_path)
    done = commands.joined(recipe, 2, *SPACE, *FAST, "--trials", "2", verb="sweep")
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.output[-2000:] for one in done)
    assert [row["state"] for row in joint_of(recipe)["trials"]] == ["done"] * 2
    assert "trial" not in done[1].output
    again = commands.joined(recipe, 2, *SPACE, *FAST, "--trials", "2", verb="sweep")
    assert [one.returncode for one in again] == [0, 0], "nobody waits for the other"
    assert not made_by(*again)


@pytest.mark.slow
def test_machines_with_folders_of_their_own_share_a_search_through_a_database(tmp_path):
    recipe = workspace(tmp_path)
    shared = (*SPACE, *FAST, "--storage", f"sqlite:///{tmp_path}/search.db")
    commands_ = [commands.arguments_of(recipe, (*shared, "--trials", count), "sweep") for count in ("2", "3")]
    for argv, runs in zip(commands_, ("here", "there"), strict=True):
        argv[argv.index("--runs") + 1] = str(tmp_path / runs)
        (done,) = commands.apart([(tmp_path / "out.txt", argv, "", {})])
        assert done.returncode == 0, done.output
    here, there = joint_of(recipe, "here"), joint_of(recipe, "there")
    assert (len(here["trials"]), len(there["trials"])) == (2, 3)
    assert [row["values"] for row in there["trials"]][:2] == [row["values"] for row in here["trials"]]
    best = there["trials"][there["best"]]["artifact"]
    report = json.loads((tmp_path / "there/tiny/report.json").read_text())
    assert report["artifacts"]["distil/student"] == best, "the winner is made here, too"
    assert "database" not in json.dumps(there)
    assert "sqlite" not in json.dumps(there), "an address may hold a password"


@pytest.mark.thorough
def test_a_hopeless_trial_is_given_up_and_leaves_nothing(tmp_path, capsys):
    recipe = workspace(tmp_path)
    with mock.patch.object(Trial, "is_hopeless", lambda self, share, value: self.number == 1 and share >= 0.5):
        assert search(recipe, *SPACE, *FAST, "--trials", "2") == 0
    one, two = joint_of(recipe)["trials"]
    assert (one["state"], two["state"]) == ("done", "given up")
    run = recipe.parent / "runs/tiny"
    assert not [*run.glob("*.partial")]
    assert not (run / two["artifact"]).exists()
    assert "given up: worse than most at this point" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_trial_that_its_figures_stop_counts_as_given_up_and_the_search_goes_on(tmp_path):
    recipe = workspace(tmp_path, distil__optim={"lr": 0.005, "max_grad_norm": None, "warmup_ratio": 0})
    wild = ("--search", "distil.alpha=0.1..0.9", "--over", "distil.optim.lr=0.005,1e30", *FAST, "--trials", "4")
    assert search(recipe, *wild) == 0
    states = {(row["values"]["distil.optim.lr"], row["state"]) for row in joint_of(recipe)["trials"]}
    assert states == {(0.005, "done"), (1e30, "stopped")}


@pytest.mark.thorough
def test_a_teacher_of_one_trial_may_fail_and_that_of_all_trials_may_not(tmp_path, capsys):
    recipe = commands.workspace(tmp_path, noise=0.2, teacher__optim={"lr": 0.02, "max_grad_norm": None})
    (tmp_path / "runs").mkdir()
    teachers = ("--search", "distil.alpha=0.1..0.9", "--over", "teacher.optim.lr=0.02,1e30", *FAST, "--trials", "4")
    assert search(recipe, *teachers, "--set", "teacher.optim.warmup_ratio=0") == 0
    states = {(row["values"]["teacher.optim.lr"], row["state"]) for row in joint_of(recipe)["trials"]}
    assert states == {(0.02, "done"), (1e30, "stopped")}
    capsys.readouterr()
    hopeless = ("--set", "teacher.optim.lr=1e30", "--set", "teacher.optim.warmup_ratio=0")
    assert search(recipe, "--search", "distil.alpha=0.1..0.9", *FAST, *hopeless) == 3
    assert "stopped: teacher: step 2: loss nan" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_table_is_kept_if_a_gate_stops_the_best_one(tmp_path, capsys):
    recipe = workspace(tmp_path, export__dtype="bf16", export__tolerance={"safetensors": {"max_abs_diff": 1e-30}})
    assert search(recipe, "--search", "distil.alpha=0.1..0.9", *FAST, "--trials", "2") == 3
    assert "max_abs_diff" in capsys.readouterr().err
    assert [row["state"] for row in joint_of(recipe)["trials"]] == ["done"] * 2


def test_a_search_without_a_result_says_so_and_ends_with_the_gates_exit_code(tmp_path, capsys):
    recipe = workspace(tmp_path, distil__optim={"lr": 0.005, "max_grad_norm": None, "warmup_ratio": 0})
    assert search(recipe, "--search", "distil.optim.lr=1e29..1e30", *FAST, "--trials", "2") == 3
    joint = joint_of(recipe)
    assert [row["state"] for row in joint["trials"]] == ["stopped"] * 2
    assert joint["best"] is None
    assert "not finite" in joint["trials"][0]["stopped"]
    assert "None came to its end." in capsys.readouterr().out


def study_of(recipe: Path) -> Study:
    return Study(
        search_space.make(recipe, ["distil.alpha=0.1..0.9"], [], ["distil.fit.monitor=log_loss"], recipe.parent, 9)
    )


def test_a_trial_is_hopeless_if_it_is_worse_than_the_median_at_its_point(tmp_path):
    study = study_of(workspace(tmp_path))
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        trial = study.next()
        assert not trial.is_hopeless(0.5, value)
        study.tell(trial, Outcome(value))
        trial.lock.release()
    good, bad = study.next(), study.next()
    assert not good.is_hopeless(0.5, 2.9)
    assert bad.is_hopeless(0.5, 3.1)
    assert study.best().value == 1.0


def test_a_trial_whose_process_died_is_begun_again_and_one_that_lives_is_not(tmp_path):
    study = study_of(workspace(tmp_path))
    living, dead = study.next(), study.next()
    dead.lock.release()  # as the kernel does
    again = study.next()
    assert again.values == dead.values
    assert again.number not in (living.number, dead.number)
    assert [one.number for one in study.counted()] == [living.number, again.number]
    assert study.next().values not in (living.values, dead.values)


def test_the_questions_depend_on_the_recipe_and_the_answers_only(tmp_path):
    asked = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        study = study_of(workspace(tmp_path / name))
        for index in range(9):  # a new object each time, as after a resumption
            trial = study.next()
            study.tell(trial, Outcome((trial.values["distil.alpha"] - 0.3) ** 2))
            trial.lock.release()
            study = study_of(tmp_path / name / "tiny.yaml") if index % 2 else study
        assert study.next() == "finished"
        asked.append([study.values(one) for one in study.counted()])
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "3"], "--trials and --storage belong to a search"),
        (["--search", "distil.alpha=0.1..0.9", "--trials", "0"], "--trials"),
        (["--search", "distil.alpha=0.1..0.9", "--storage", "nodb://user:secret@host/x"], "--storage nodb: cannot be"),
        (["--search", "distil.alpha=0.1..0.9", "--jobs", "0"], "--jobs"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, arguments, message):
    recipe = workspace(tmp_path)
    capsys.readouterr()
    assert search(recipe, *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert "secret" not in said


def test_jobs_and_torchrun_exclude_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert search(workspace(tmp_path), *OVER, "--jobs", "2") == 2
    assert "--jobs: torchrun spreads every training over its processes already" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(tmp_path, capsys):
    recipe = workspace(tmp_path)
    with mock.patch.dict("sys.modules", {"optuna": None}):
        assert search(recipe, *SPACE) == 2
    assert "pip install 'distilpeft[search]'" in capsys.readouterr().err
