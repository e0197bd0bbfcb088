"""Sweeps: one teacher, one cache, every artifact once; a joint table whose winner the test rows did not pick."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support import commands

import distilpeft
from distilpeft.errors import InputError
from distilpeft.machine.locks import Lock
from distilpeft.planning.roles import LAST_STAGES
from distilpeft.tuning import sweep_points, sweep_table

STAGES = ("teacher", "targets", "distil", "evaluate", "export", "benchmark", "bundle")
STUDENTS = "student.from_teacher.layers=[0],[1],[0, 1]"


def sweep(recipe: Path, *arguments: str) -> int:
    return commands.run(recipe, *arguments, verb="sweep")


OVER = ("--over", STUDENTS, "--over", "distil.temperature=1,4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = commands.workspace(
        tmp_path_factory.mktemp("sweep"), teacher__fit__epochs=2, distil__fit__epochs=1, teacher__gate="warn"
    )
    assert sweep(recipe, *OVER) == 0
    return recipe


def joint_of(recipe: Path) -> dict:
    (found,) = (recipe.parent / "runs/tiny").glob("sweep-*/sweep.json")
    return json.loads(found.read_text())


def count(recipe: Path, stage: str) -> int:
    return len([path for path in (recipe.parent / "runs/tiny").glob(f"{stage}-*") if path.suffix != ".partial"])


def test_three_students_at_two_temperatures_pay_for_one_teacher_and_one_cache(finished):
    assert count(finished, "teacher") == 1
    assert count(finished, "targets") == 1
    assert count(finished, "distil") == 6 + 3, "six students, and a CE-only baseline for each of three"
    joint = joint_of(finished)
    assert len(joint["points"]) == 6
    assert (joint["teachers"], joint["caches"]) == (1, 1)
    assert joint["artifacts"]["made"] < joint["artifacts"]["without_sharing"]
    assert sorted(row["role"] for row in joint["others"]) == ["student_ce_only"] * 3 + ["teacher"]
    assert len({row["artifact"] for row in joint["points"]}) == 6
    baselines = [row["values"] for row in joint["others"] if row["role"] == "student_ce_only"]
    assert baselines == [{"student.from_teacher.layers": layers} for layers in ([0], [1], [0, 1])]
    assert [row["values"] for row in joint["others"] if row["role"] == "teacher"] == [{}]


def test_students_of_a_sweep_are_compared_by_what_they_cost(finished):
    entries = joint_of(finished)["frontier"]
    assert [(one["student"], one["form"]) for one in entries] == [
        *((f"layers {layers}, temperature={t}", "safetensors") for layers in ("0", "1", "0, 1") for t in (1, 4)),
        ("teacher", "teacher"),
    ]
    assert all(one["with_encoding"] and one["latency_ms"] > 0 and one["size_bytes"] > 0 for one in entries)
    students = entries[:-1]
    assert any(one["front_latency"] for one in students)
    cheapest = min(one["size_bytes"] for one in students)
    assert [one for one in students if one["front_size"] and one["size_bytes"] == cheapest]
    assert not entries[-1]["front_size"], "a teacher is nothing to deploy here"
    (folder,) = (finished.parent / "runs/tiny").glob("sweep-*")
    assert "## What each size gives" in (folder / "sweep.md").read_text()


@pytest.mark.thorough
def test_seeds_of_one_student_are_one_entry_with_the_mean(tmp_path):
    recipe = commands.workspace(tmp_path, teacher__gate="warn", distil__ce_only_baseline=False)
    points = ("{student.from_teacher.layers: [0]}", "{student: {static: {dim: 8}}, distil.optim.lr: 0.01}")
    given = [part for point in points for part in ("--point", point)]
    assert sweep(recipe, *given, "--over", "seed=3,4") == 0
    joint = joint_of(recipe)
    static = "a static model of the teacher's word embeddings, reduced to 8 units, lr=0.01"
    names = ["layers 0", static, "teacher"]
    assert [one["student"] for one in joint["frontier"]] == names
    for one in joint["frontier"][:-1]:
        same = [row for row in joint["points"] if one["values"].items() <= row["values"].items()]
        scores = [row["score"]["value"] for row in same]
        assert len(scores) == one["seeds"] == 2
        assert one["score"]["value"] == pytest.approx(sum(scores) / 2)
        assert (one["score"]["low"], one["score"]["high"]) == (min(scores), max(scores))
    assert joint["frontier"][-1]["seeds"] == 2


def test_the_validation_rows_pick_the_winner_whose_report_and_student_are_the_runs(finished):
    joint, run = joint_of(finished), finished.parent / "runs/tiny"
    best = joint["points"][joint["best_by_validation"]]
    assert best["validation"] == max(row["validation"] for row in joint["points"])
    report = json.loads((run / "report.json").read_text())
    assert report["artifacts"]["distil/student"] == best["artifact"]
    assert (run / "student").resolve().parent.name == report["artifacts"]["bundle/safetensors"]
    text = next(run.glob("sweep-*/sweep.md")).read_text()
    seconds = next(row["seconds"] for row in joint["others"] if row["role"] == "teacher")
    assert f"6 points made {joint['artifacts']['made']} artifacts" in text
    assert f"one teacher ({seconds:.0f} s), one cache of soft targets." in text
    assert "The test rows picked nothing." in text
    assert " | KL | " not in text, "of classes it is not shown"
    assert text.count("layers=") == 6 + 3 + 1, "points, baselines, and the sentence on the best"


@pytest.mark.thorough
def test_the_same_sweep_again_does_nothing_and_needs_no_torch(finished):
    code = (
        "import sys; from distilpeft import cli\n"
        f"sys.argv = {['distilpeft', 'sweep', str(finished), '--runs', str(finished.parent / 'runs'), *OVER]!r}\n"
        "try:\n    cli.main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing to do: all 6 points are done" in done.stdout


def test_the_points_of_a_sweep_stay_and_keep_best_leaves_the_models_of_one(finished):
    run = finished.parent / "runs/tiny"
    assert distilpeft.clean(run, dry_run=True) == []
    removed = {item.path.name for item in distilpeft.clean(run, keep="best", dry_run=True)}
    joint = joint_of(finished)
    best = joint["points"][joint["best_by_validation"]]["artifact"]
    students = {row["artifact"] for row in joint["points"]}
    assert students - {best} <= removed
    assert best not in removed
    assert {name.partition("-")[0] for name in removed} == {"distil", "export", "bundle"}


@pytest.fixture(scope="module")
def together(finished, tmp_path_factory) -> tuple[Path, list[commands.Done]]:
    """The same sweep from two terminals at once, one of them with two workers."""
    folder = tmp_path_factory.mktemp("together")
    recipe = folder / "tiny.yaml"
    recipe.write_text(finished.read_text())
    argv = commands.arguments_of(recipe, OVER, "sweep")
    return recipe, commands.apart(
        [(folder / "a.txt", argv, "", {}), (folder / "b.txt", [*argv, "--jobs", "2"], "", {})]
    )


@pytest.mark.slow
def test_processes_share_a_sweep_and_make_every_artifact_once(finished, together):
    recipe, done = together
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.output[-2000:] for one in done)
    joint = joint_of(recipe)
    assert [row["artifact"] for row in joint["points"]] == [row["artifact"] for row in joint_of(finished)["points"]]
    made = [line.rpartition(" ")[2] for one in done for line in one.output.splitlines() if " → " in line]
    assert len(made) == len(set(made)) == joint["artifacts"]["made"]
    both = "\n".join(one.output for one in done)
    assert "[1] " in both
    assert "[2] " in both


@pytest.mark.slow
def test_the_points_of_a_shared_sweep_are_those_of_a_lone_one(finished, together):
    """To rounding only: workers have fewer threads, and sums another order."""
    for one, two in zip(joint_of(finished)["points"], joint_of(together[0])["points"], strict=True):
        weights = [
            load_file(recipe.parent / "runs/tiny" / row["artifact"] / "model/model.safetensors")
            for recipe, row in ((finished, one), (together[0], two))
        ]
        for name, expected in weights[0].items():
            torch.testing.assert_close(weights[1][name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_timing_waits_for_all_training(together):
    run = together[0].parent / "runs/tiny"
    ended = {stage: [path.stat().st_mtime_ns for path in run.glob(f"{stage}-*/manifest.json")] for stage in STAGES}
    assert min(ended["benchmark"]) > max(max(times) for stage, times in ended.items() if stage not in LAST_STAGES)


def lock_of_a_training(run: Path) -> Lock:
    """Wait for a student's first checkpoint; what its worker holds."""
    for _ in range(6000):
        for folder in run.glob("distil-*.partial/checkpoints/step-*[0-9]"):
            return Lock(run, folder.parent.parent.name.removesuffix(".partial"))
        time.sleep(0.01)
    raise AssertionError("no training began")


def start(recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    """The sweep as a process of its own, which times its models by itself."""
    code = f"import sys; sys.path.insert(0, {str(commands.TESTS)!r}); from support import commands; commands.alone()"
    argv = [sys.executable, "-c", code, *commands.arguments_of(recipe, arguments, "sweep")[1:]]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


LONG = ("--over", "distil.temperature=1,4", "--set", "distil.fit.epochs=30", "--jobs", "2")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_and_others_take_its_work(tmp_path):
    recipe = commands.workspace(tmp_path, teacher__gate="warn")
    sweeping = start(recipe, *LONG)
    victim = int(lock_of_a_training(tmp_path / "runs/tiny").holder().split()[1])
    assert victim != sweeping.pid
    os.kill(victim, signal.SIGKILL)
    said, _ = sweeping.communicate(timeout=300)
    assert sweeping.returncode == 0, said
    assert "was killed (exit code -9); others take its work" in said
    assert "resuming after step" in said
    assert len(joint_of(recipe)["points"]) == 2


@pytest.mark.slow
def test_a_signal_stops_all_workers_after_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    recipe = commands.workspace(tmp_path, teacher__gate="warn")
    sweeping = start(recipe, *LONG)
    lock_of_a_training(tmp_path / "runs/tiny")
    sweeping.terminate()
    said, _ = sweeping.communicate(timeout=60)
    assert sweeping.returncode == 75, said
    assert said.splitlines()[-1] == "stopped all workers; run the same command to resume"
    assert not list((tmp_path / "runs/tiny").glob("sweep-*/sweep.json"))
    again = start(recipe, *LONG)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "resuming after step" in said


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_sweep(tmp_path):
    recipe = commands.workspace(tmp_path, teacher__gate="warn")
    sweeping = start(recipe, *LONG)
    lock = lock_of_a_training(tmp_path / "runs/tiny")
    assert not lock.acquire()
    sweeping.kill()
    sweeping.communicate(timeout=60)  # the workers share its output, so this waits for them, too
    assert lock.acquire()
    lock.release()
    assert not [made for made in (tmp_path / "runs/tiny").glob("distil-*") if made.suffix != ".partial"]


def test_a_point_that_was_lost_is_the_only_one_made_again(finished):
    run = finished.parent / "runs/tiny"
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("distil-*")}
    lost = joint_of(finished)["points"][2]["artifact"]
    shutil.rmtree(run / lost)
    assert sweep(finished, *OVER) == 0
    after = {path.name: path.stat().st_mtime_ns for path in run.glob("distil-*")}
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [lost]


def test_a_point_that_its_figures_stop_is_told_and_the_others_go_on(finished, capsys):
    tolerance = "export.tolerance.safetensors.max_abs_diff"
    before = set((finished.parent / "runs/tiny").glob("sweep-*"))
    stopped = ("--over", f"{tolerance}=1,1e-30", "--set", "export.dtype=bf16", "--set", "export.gate_rows=8")
    assert sweep(finished, *stopped, "--set", "student.from_teacher.layers=[0]") == 3
    said = capsys.readouterr().out
    assert f"stopped: {tolerance}=1e-30" in said
    (new,) = set((finished.parent / "runs/tiny").glob("sweep-*")) - before
    (point,) = json.loads((new / "sweep.json").read_text())["points"]
    assert point["values"] == {tolerance: 1}
    shutil.rmtree(new)  # joint_of finds one


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["distil.temperature"], "--over distil.temperature: write it as key=value,value"),
        (["distil.temperature="], "write it as key=value,value"),
        (["name=a,b"], "share one folder"),
        (["distil.temperature=1,1"], "a value is given twice"),
        (["distil.temperature=1,2", "distil.temperature=3"], "a key is given twice"),
        (["distil.temprature=1,2"], "did you mean distil.temperature"),
        (["distil.temperature=1,-2"], "--over, at distil.temperature=-2"),
        (["distil.temperature=1,,2"], "distil.temperature"),
        (["student=[a"], "error: --over student=[a: the value is not valid YAML"),
        (["seed=2024-01-01,3"], "--over seed=2024-01-01,3: no recipe holds such a value"),
        (["distil.optim.lr=1e-3,2e-3", "distil.optim={lr: 1e-2}"], "one key hides another"),
        (
            ["distil.fit.monitor=accuracy,log_loss"],
            "distil.fit.monitor is accuracy or log_loss, and such",
        ),
        (
            ["evaluate.split=validation,test"],
            "evaluate.split is test or validation, and such points",
        ),
        (["student=no/such/../model,b"], "student.model"),
        ([], "give at least one key"),
    ],
)
def test_options_that_cannot_be_swept_are_refused_in_one_line_before_anything_runs(finished, capsys, over, message):
    before = sorted((finished.parent / "runs/tiny").iterdir())
    assert sweep(finished, *[part for one in over for part in ("--over", one)]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert sorted((finished.parent / "runs/tiny").iterdir()) == before


def test_the_table_on_the_terminal_shows_every_point_within_80_characters(finished):
    console = Console(file=io.StringIO(), width=80)
    sweep_table.show(joint_of(finished), console)
    said = console.file.getvalue()
    assert all(len(line) <= 80 for line in said.splitlines())
    assert said.count("temperature") >= 6
    assert "teacher" in said


@pytest.mark.parametrize(
    ("targets", "caches"),
    [({"format": "sampled"}, 1), ({"format": "full"}, 1), ({"format": "top_k", "temperatures": [1, 2, 4]}, 1)],
)
def test_temperatures_of_a_language_model_share_one_cache(tmp_path, targets, caches):
    points = sweep_points.points(
        commands.language_workspace(tmp_path, mode="cached", **targets),
        ["distil.temperature=4,1"],
        [],
        tmp_path / "runs",
    )
    keys = {point.plan.artifacts["targets"].key for point in points}
    assert len(keys) == caches
    if targets["format"] == "sampled":
        assert points[0].plan.recipe.targets.temperatures == (1.0, 4.0)


def test_a_temperature_that_the_recipes_targets_do_not_list_is_refused(tmp_path):
    recipe = commands.language_workspace(tmp_path, mode="cached", format="top_k", temperatures=[1, 2])
    with pytest.raises(InputError, match=r"at distil.temperature=8: .* only 1, 2 are listed"):
        sweep_points.points(recipe, ["distil.temperature=1,8"], [], tmp_path / "runs")


def test_a_student_by_its_name_alone_is_a_pretrained_model(tmp_path):
    recipe = commands.language_workspace(tmp_path, mode="cached", format="full")
    base = tmp_path / "base"
    points = sweep_points.points(recipe, [f"student={base},{{from_teacher: {{layers: [1]}}}}"], [], tmp_path / "runs")
    assert points[0].plan.recipe.student.model == str(base)
    assert points[1].plan.recipe.student.from_teacher.layers == (1,)
