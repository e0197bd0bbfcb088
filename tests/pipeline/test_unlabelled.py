"""Whole runs on few labels and more text: every student that shows where a gain comes from, stopped or not."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import commands, tiny

from distilpeft.planning.plan import Plan, make_plan
from distilpeft.planning.roles import ARMS
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.rows import read_task_rows

LABELLED, MORE = 60, 12
CONTROLS = ["ce_only_long", "hard_labels", "labelled_rows"]
UNTIL = ("--until", "distil")


def workspace(folder: Path, **changes: object) -> Path:
    """160 training rows, of which 60 keep their labels, 12 rows of another file without any, and a view of most."""
    settings = {
        "data__labelled": LABELLED,
        "data__unlabelled": {"source": str(folder / "more.csv"), "columns": {"text": "body"}},
        "data__views": {"copies": 1, "mask": 0.3},
        "distil__controls": CONTROLS, "distil__ce_only_epochs": 3, "distil__unlabelled_weight": 0.8,
        "distil__fit__epochs": 2,
    }  # fmt: skip
    recipe = commands.workspace(folder, **{**settings, **changes})
    texts = dict.fromkeys(f"{text} fine" for text, _ in tiny.rows(MORE))
    (folder / "more.csv").write_text("body\n" + "".join(f"{text} {at}\n" for at, text in enumerate(texts)))
    return recipe


def plan_of(recipe: Path, *changes: str) -> Plan:
    return make_plan(load_recipe(recipe, list(changes)), recipe.parent / "runs")


def weights(recipe: Path, role: str = "student", *changes: str) -> dict[str, torch.Tensor]:
    return load_file(plan_of(recipe, *changes).artifact("distil", role).path / "model/model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = workspace(tmp_path_factory.mktemp("unlabelled"))
    assert commands.run(recipe) == 0
    return recipe


@pytest.fixture(scope="module")
def report(finished) -> dict:
    return json.loads((finished.parent / "runs/tiny/report.json").read_text())


def test_each_student_learns_from_its_own_rows_for_its_own_time(finished):
    plan = plan_of(finished)
    made = {role: plan.artifact("distil", role).figures() for role in ARMS}
    taught = made["student"]["train_rows"]
    views = made["student"]["view_rows"]
    assert views > (LABELLED + MORE) / 2
    assert taught > LABELLED + MORE + views
    batch, epochs = plan.recipe.distil.fit.batch_size, plan.recipe.distil.fit.epochs
    steps = epochs * -(-taught // batch)
    expected = {
        "student": (taught, steps),
        "student_hard_labels": (taught, steps),
        "student_ce_only": (LABELLED, 3 * -(-LABELLED // batch)),
        "student_ce_only_long": (LABELLED, steps),
        "student_labelled_rows": (LABELLED, steps),
    }
    assert {role: (one["train_rows"], one["steps"]) for role, one in made.items()} == expected
    assert plan.artifact("teacher").figures()["train_rows"] == LABELLED
    assert plan.artifact("targets").figures()["num_rows"] == taught
    assert made["student"]["labelled_rows"] == LABELLED


def test_the_report_compares_the_student_with_every_control(report):
    pairs = {(pair["role"], pair["against"]) for pair in report["comparisons"]}
    others = ("student_ce_only", "student_ce_only_long", "student_hard_labels", "student_labelled_rows", "teacher")
    assert {("student", other) for other in others} | {("student_ce_only_long", "teacher")} <= pairs
    assert set(ARMS) <= {model["role"] for model in report["models"]}
    rows = report["rows"]
    assert rows["train"] == LABELLED
    assert rows["unlabelled"] > MORE
    assert rows["views"] > (LABELLED + MORE) / 2
    text = "\n".join(report["verdict"]["sentences"])
    assert "labels alone" in text


def test_the_teachers_lead_is_known_before_the_student_is_trained(report, finished):
    lead = report["lead"]
    assert (lead["role"], lead["against"], lead["metric"]) == ("teacher", "student_ce_only", "accuracy")
    assert lead["num_rows"] == 40
    assert lead["low"] <= lead["difference"] <= lead["high"]
    names = [step.name for step in plan_of(finished).own]
    assert names.index("distil/student_ce_only") < names.index("lead") < names.index("distil/student")


@pytest.mark.thorough
def test_a_teacher_that_is_not_ahead_stops_the_run_if_the_recipe_says_so(tmp_path, capsys):
    recipe = workspace(tmp_path, teacher__gate="warn", teacher__optim__lr=1e-6, distil__gate="stop")
    assert commands.run(recipe, *UNTIL) == 3
    shown = " ".join(capsys.readouterr().err.split())
    assert "the teacher is not ahead, by more than chance, of the student on labels alone" in shown
    assert "Try more epochs or another lr for it (distilpeft tune-lr)" in shown
    assert "set distil.gate: warn to continue anyway" in shown
    plan = plan_of(recipe)
    assert plan.artifact("distil", "student_ce_only").done
    assert not plan.artifact("distil", "student").done
    assert commands.run(recipe, *UNTIL, "--set", "distil.gate=warn") == 0
    assert plan.artifact("distil", "student").done


def test_a_running_teacher_trains_the_same_student_as_soft_targets_on_disk(finished):
    online = ("--set", "targets.mode=online")
    assert commands.run(finished, *UNTIL, *online) == 0
    for role in ("student", "student_hard_labels", "student_labelled_rows"):
        cached, live = weights(finished, role), weights(finished, role, "targets.mode=online")
        for name, weight in cached.items():
            # AdamW makes steps of 0.005 out of small gradients, which are rounded differently by some processors.
            assert (weight - live[name]).abs().max() < 5e-4, (role, name)


def test_other_rows_without_labels_leave_the_teacher_where_it_is(finished):
    before = plan_of(finished)
    for change in ("data.unlabelled.max_rows=5", "data.views.copies=2"):
        after = plan_of(finished, change)
        for step in ("teacher", "lead", "distil/student_ce_only", "evaluate/student_ce_only"):
            assert before.artifacts[step].key == after.artifacts[step].key
        assert before.artifacts["targets"].key != after.artifacts["targets"].key


@pytest.mark.thorough
def test_killed_in_the_middle_the_same_command_ends_in_the_same_weights(finished, tmp_path):
    recipe = workspace(tmp_path)
    killed = commands.run_apart(recipe, *UNTIL, before=commands.signal_at("distil", 7, "SIGKILL"))
    assert killed.returncode == -signal.SIGKILL
    assert commands.run(recipe, *UNTIL) == 0
    for role in ("student", "student_hard_labels"):
        whole, resumed = weights(finished, role), weights(recipe, role)
        assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_an_export_of_the_student_on_labels_alone_says_so(finished):
    assert commands.run(finished, "--set", "export.of=student_ce_only") == 0
    run = finished.parent / "runs/tiny"
    card = (run / "exports/safetensors/README.md").read_text()
    assert "this student learnt from labels alone, without the teacher" in card
    exported = load_file(run / "exports/safetensors/model.safetensors")
    ours = weights(finished, "student_ce_only")
    assert all(torch.equal(weight, ours[name]) for name, weight in exported.items())


def test_all_labels_may_be_kept_so_that_no_row_is_without(tmp_path):
    recipe = commands.workspace(tmp_path, data__labelled=120)
    splits = read_task_rows(load_recipe(recipe)).splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 120, "validation": 40, "test": 40}
    assert commands.run(recipe, "--until", "distil") == 0


@pytest.mark.slow
def test_a_sweep_over_labels_tells_what_they_are_worth(tmp_path):
    recipe = workspace(tmp_path, distil__controls=["labelled_rows"], evaluate__teacher_full_precision=False)
    seeds = ("--set", "evaluate.seeds=[17, 18]")
    assert commands.run(recipe, *seeds, "--over", "data.labelled=20,60", verb="sweep") == 0
    (folder,) = (recipe.parent / "runs/tiny").glob("sweep-*")
    joint = json.loads((folder / "sweep.json").read_text())
    assert [entry["labels"] for entry in joint["budget"]] == [20, 60]
    for entry in joint["budget"]:
        assert set(entry["scores"]) == {"teacher", "student", "student_ce_only", "student_labelled_rows"}
        lead, scores = entry["lead"], entry["scores"]
        plan = plan_of(recipe, *seeds[1:], f"data.labelled={entry['labels']}")
        every = [one.artifact("evaluate", "student").figures() for one in (plan, *plan.repeats.values())]
        values = [one["scores"]["accuracy"]["value"] for one in every]
        assert scores["student"] == pytest.approx({"value": np.mean(values), "low": min(values), "high": max(values)})
        gain = scores["student"]["value"] - scores[lead["against"]]["value"]
        assert lead["value"] == pytest.approx(gain)
        assert lead["low"] <= lead["value"] <= lead["high"]
    assert "## accuracy by number of labels" in (folder / "sweep.md").read_text()
    assert {one["role"] for one in joint["others"]} == {"teacher", "student_ce_only", "student_labelled_rows"}
