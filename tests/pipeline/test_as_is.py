"""A teacher that is used as it is: `teacher.fit: null`, quantized or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import commands

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A classifier from somewhere else, head and all, and the data of `commands.workspace`."""
    folder = tmp_path_factory.mktemp("as_is")
    recipe = commands.workspace(folder, student={"from_teacher": {"layers": [0, 1]}})
    assert commands.run(recipe, "--until", "evaluate") == 0
    plan = make_plan(load_recipe(recipe), folder / "runs")
    shutil.copytree(plan.artifacts["distil/student"].path / "model", folder / "classifier")
    (folder / "score.json").write_text(json.dumps(plan.artifacts["evaluate/student"].figures()["scores"]))
    return folder


def as_is(trained: Path, folder: Path, model: str = "classifier", **changes: object) -> Path:
    shutil.copytree(trained / "base", folder / "base")
    shutil.copy(trained / "rows.csv", folder / "rows.csv")
    settings = {
        "teacher": {"model": str(trained / model), "quantize": "none", "fit": None},
        "data__source": str(folder / "rows.csv"),
    }  # fmt: skip
    return commands.workspace(folder, **{**settings, **changes})


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_nothing_is_tuned_and_all_else_follows(trained, tmp_path, quantize):
    recipe = as_is(trained, tmp_path, teacher__quantize=quantize)
    assert commands.run(recipe) == 0
    plan = make_plan(load_recipe(recipe), tmp_path / "runs")
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    scores = {model["role"]: model["scores"] for model in report["models"]}
    score = json.loads((trained / "score.json").read_text())
    role = "teacher" if quantize == "none" else "teacher_full_precision"
    assert scores[role]["accuracy"]["value"] == score["accuracy"]["value"]
    assert scores[role]["log_loss"]["value"] == pytest.approx(score["log_loss"]["value"], rel=1e-5)
    assert ("teacher_full_precision" in scores) == (quantize == "nf4")
    assert not list(plan.artifacts["teacher"].path.glob("**/*.safetensors")), "there is nothing to keep"
    assert "quantized: " + quantize + ", as it is." in (tmp_path / "runs/tiny/student/README.md").read_text()
    assert scores["student"]["accuracy"]["value"] > 0.8


def test_a_model_without_a_head_is_refused(trained, tmp_path, capsys):
    recipe = as_is(trained, tmp_path, teacher__model=str(tmp_path / "base"))
    assert commands.run(recipe, verb="check") == 2
    assert "unchanged, but it is a BertModel, without a head for text_classification" in capsys.readouterr().err
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": None}))
    assert commands.run(recipe) == 2
    assert "teacher.fit: null uses" in (told := capsys.readouterr().err)
    assert "but it came without classifier.bias and 1 more; tune it" in told


def turn_around(recipe: Path) -> None:
    """Write the classes' names instead of their numbers into the rows, for task.labels in the other order."""
    file = recipe.parent / "rows.csv"
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *(row[:-1] + ("good" if row.endswith("1") else "bad") for row in rows)]) + "\n")


def test_a_teacher_whose_classes_are_in_another_order_is_put_right(trained, tmp_path):
    recipe = as_is(trained, tmp_path, task__labels=["good", "bad"])
    turn_around(recipe)
    assert commands.run(recipe, "--until", "evaluate") == 0
    plan = make_plan(load_recipe(recipe), tmp_path / "runs")
    score = json.loads((trained / "score.json").read_text())
    found = plan.artifacts["evaluate/teacher"].figures()["scores"]
    assert found["accuracy"]["value"] == score["accuracy"]["value"]
    assert found["log_loss"]["value"] == pytest.approx(score["log_loss"]["value"], rel=1e-5)
    assert plan.artifacts["evaluate/student"].figures()["scores"]["accuracy"]["value"] > 0.8
    config = json.loads((plan.artifacts["distil/student"].path / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "good", "1": "bad"}


def test_a_teacher_whose_classes_are_turned_around_and_have_no_names_is_stopped(trained, tmp_path, capsys):
    shutil.copytree(trained / "classifier", tmp_path / "numbered")
    config = json.loads((tmp_path / "numbered" / "config.json").read_text())
    names = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (tmp_path / "numbered" / "config.json").write_text(json.dumps({**config, **names}))
    recipe = as_is(trained, tmp_path, teacher__model=str(tmp_path / "numbered"), task__labels=["good", "bad"])
    turn_around(recipe)
    assert commands.run(recipe) == 3
    output = capsys.readouterr()
    assert "task.labels gives their order (0 = good, 1 = bad)" in output.out
    assert "the teacher is no better than chance" in output.err
    assert "are the classes in its own order?" in output.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__optim": {"lr": 0.1}}, "fit: null uses the teacher without tuning; optim would do nothing"),
        ({"teacher__lora": {"rank": 4}}, "fit: null uses the teacher without tuning; lora would do nothing"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(trained, tmp_path, capsys, changes, message):
    assert commands.run(as_is(trained, tmp_path, **changes), verb="check") == 2
    assert message in capsys.readouterr().err


def test_a_teacher_that_is_tuned_needs_a_rate(tmp_path, capsys):
    assert commands.run(commands.workspace(tmp_path, teacher__optim=None), verb="check") == 2
    assert "teacher: give optim, or fit: null" in capsys.readouterr().err
