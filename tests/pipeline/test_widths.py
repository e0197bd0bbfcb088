"""Narrower students from recipe to deployment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from support import commands, equality, tiny_lm

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

WIDTHS = {"hidden": 32, "heads": 2, "ffn": 40}


def workspace(folder: Path, **changes: object) -> Path:
    student = {"from_teacher": {"layers": [0, 1], **WIDTHS}}
    fit = {"epochs": 12, "batch_size": 16, "micro_batch_size": 16, "precision": "fp32"}
    return commands.workspace(folder, **{"student": student, "distil__fit": fit, **changes})


def student_of(recipe: Path, role: str = "student") -> Path:
    plan = make_plan(load_recipe(recipe), recipe.parent / "runs")
    return plan.artifact("distil", role).path


@pytest.mark.thorough
def test_a_narrower_student_is_trained_exported_and_answers(tmp_path, capsys):
    recipe = workspace(tmp_path, export__formats=["safetensors", "onnx", "onnx-int8"])
    assert commands.run(recipe) == 0
    folder = student_of(recipe)
    config = json.loads((folder / "model/config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]) == (32, 2, 40)
    origin = json.loads((folder / "manifest.json").read_text())["figures"]["start"]["from"]
    assert origin == "layers 0, 1 with 32 hidden units, 2 heads, 40 feed-forward units of the teacher"
    assert len(list((tmp_path / "runs/tiny/cache").glob("importance-*"))) == 1, "measured once for all students"
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    scores = {model["role"]: model["scores"]["accuracy"]["value"] for model in report["models"]}
    assert scores["student"] > 0.8
    assert {name for name in scores if name.startswith("export:")} == {
        "export:safetensors", "export:onnx", "export:onnx-int8",
    }  # fmt: skip
    found = commands.predict(str(tmp_path / "runs/tiny/student"), "a superb script of the film")
    assert "good" in found.stdout
    capsys.readouterr()


@pytest.mark.slow
def test_micro_batches_processes_and_online_targets_train_the_same_narrower_student(tmp_path):
    equality.assert_splits_are_equal(workspace(tmp_path, **equality.EXACT))


@pytest.mark.slow
def test_a_narrower_language_model_is_trained_and_exported(tmp_path):
    recipe = commands.language_workspace(tmp_path)
    tree = yaml.safe_load(recipe.read_text())
    tree["teacher"]["gate"] = "warn"
    tree["student"] = {"from_teacher": {"first": 1, "hidden": 48, "heads": 2, "ffn": 64}}
    tree["export"] = {"formats": ["safetensors", "onnx"]}
    recipe.write_text(yaml.safe_dump(tree))
    assert commands.run(recipe) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(student_of(recipe) / "model")
    config = model.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (48, 2, 1)
    assert config.head_dim == 16
    with torch.no_grad():
        ids = tiny_lm.tokenizer()("ab", return_tensors="pt").input_ids
        assert model(input_ids=ids).logits.isfinite().all()
    assert (tmp_path / "runs" / tree["name"] / "exports").is_dir()


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"ffn": 129}, "student.from_teacher.ffn: 129 are more than there are; the teacher (bert) has 128"),
        ({"hidden": 40}, "student.from_teacher.hidden: 40 hidden units are not 2 heads of 16"),
        ({"heads": 5}, "student.from_teacher.heads: 5 are more than there are"),
    ],
)
def test_widths_that_do_not_fit_are_refused_before_anything_is_trained(tmp_path, capsys, widths, message):
    recipe = workspace(tmp_path, student={"from_teacher": {"layers": [1], **widths}})
    assert commands.run(recipe) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("runs/tiny/teacher-*"))
