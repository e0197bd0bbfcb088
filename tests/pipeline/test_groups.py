"""`evaluate.groups`: scores and gaps of each group of rows, recomputed here from the models' own answers."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from support import commands, reports, tiny

from distilpeft.data.reading import read_splits
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.report import verdict
from distilpeft.report.schema import Report


def workspace(folder: Path, **changes: object) -> Path:
    recipe = commands.workspace(folder, **{"evaluate__groups": "place", **changes})
    rng = random.Random(0)
    rows = [(text, label, rng.choice(["north", "north", "south", ""])) for text, label in tiny.rows(240, noise=0.1)]
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label", "place"), *rows])
    return recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = workspace(tmp_path_factory.mktemp("groups"))
    assert commands.run(recipe) == 0
    return recipe


def test_every_groups_scores_and_gaps_are_those_of_its_rows(finished):
    plan = make_plan(load_recipe(finished), finished.parent / "runs")
    rows = read_splits(plan.recipe.data, lambda rows, *_: rows)[0]["test"]
    places = np.array([place or "(none)" for place in rows["place"]])
    labels = np.array(rows["label"], dtype=int)
    right = {
        role: np.load(plan.artifacts[f"evaluate/{role}"].path / "values.npy").argmax(-1) == labels
        for role in ("teacher", "student", "student_ce_only")
    }
    report = json.loads((plan.folder / "report.json").read_text())
    found = report["groups"]
    assert (found["column"], found["margin"]) == ("place", 0.02)
    assert set(found["scores"]["student"]) == {"north", "south", "(none)"}
    for role, answers in right.items():
        for place in ("north", "south", "(none)"):
            score = found["scores"][role][place]["accuracy"]
            assert score["value"] == pytest.approx(answers[places == place].mean())
            assert score["num_rows"] == (places == place).sum()
    gaps = {(gap["role"], gap["group"]): gap for gap in found["gaps"]}
    assert {role for role, _ in gaps} == {"student", "student_ce_only", "export:safetensors"}
    lost = right["student"].astype(float) - right["teacher"]
    for place in ("north", "south", "(none)"):
        gap = gaps["student", place]
        assert gap["difference"] == pytest.approx(lost[places == place].mean())
        assert gap["beyond"] == pytest.approx(lost[places == place].mean() - lost.mean())
        assert gap["low"] <= gap["difference"] <= gap["high"]


def test_the_report_the_page_and_the_card_tell_of_the_groups(finished):
    run = finished.parent / "runs/tiny"
    assert "## accuracy by place" in (run / "report.md").read_text()
    assert "accuracy by place" in (run / "report.html").read_text()
    card = (run / "exports/safetensors/README.md").read_text()
    assert "accuracy by place:" in card
    assert "| south |" in card
    assert "Distilling cost" in card


def gap(group: str, beyond: float, role: str = "student") -> dict:
    figures = {"difference": beyond - 0.01, "low": beyond - 0.03, "high": beyond + 0.01, "num_rows": 80}
    return {"group": group, "role": role, "beyond": beyond, **figures}


def report(*gaps: dict) -> Report:
    groups = {"column": "place", "margin": 0.02, "scores": {}, "gaps": list(gaps)}
    return reports.changed(reports.classifier(), groups=groups)


def test_a_group_that_loses_more_than_the_margin_is_warned_of_and_others_are_not():
    assert verdict.losing(report(gap("north", 0.01), gap("south", -0.05), gap("south", -0.3, "student_ce_only"))) == [
        "Warning: place south loses more than the rest: student less teacher -6.00 points, 95 % -8.00 to "
        "-4.00, on its 80 rows; -1.00 points on all."
    ]
    (line,) = verdict.losing(report(gap("south", -0.03, "export:onnx")))
    assert "export:onnx less teacher" in line
    (line,) = verdict.losing(report(gap("south", -0.05), gap("south", -0.05, "export:onnx")))
    assert "student, export:onnx less teacher -6.00 points" in line
    assert verdict.losing(report(gap("south", -0.019))) == [
        "No place loses more than 2 points beyond what all rows lose."
    ]
    assert verdict.losing(reports.classifier()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate__groups": "region"}, "evaluate.groups: {rows} has no column 'region'; its columns are text,"),
        ({"evaluate__groups": "text"}, "evaluate.groups: column 'text' has"),
    ],
)  # fmt: skip
def test_a_column_that_makes_no_groups_is_refused_before_anything_is_trained(tmp_path, capsys, changes, message):
    recipe = workspace(tmp_path, **changes)
    assert commands.run(recipe) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert message.format(rows=tmp_path / "rows.csv").replace(" ", "") in told.replace(" ", "")
    assert not list((tmp_path / "runs").glob("*/teacher-*"))


def test_rows_of_language_models_have_no_groups(tmp_path, capsys):
    import yaml

    recipe = commands.language_workspace(tmp_path)
    tree = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**tree, "evaluate": {**tree.get("evaluate", {}), "groups": "prompt"}}))
    assert commands.run(recipe, verb="check") == 2
    assert "evaluate.groups: is not for causal_lm" in " ".join(capsys.readouterr().err.split())


def test_another_margin_makes_nothing_again(finished):
    plain, grouped = (
        make_plan(load_recipe(finished, (setting,)), finished.parent / "runs").artifacts
        for setting in ("seed=3", "evaluate.group_margin=0.1")
    )
    assert {step: made.key for step, made in plain.items()} == {step: made.key for step, made in grouped.items()}
