"""Students that are trained for the rounding of their export, from recipe to deployment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import commands, equality, tiny_lm

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

INT8 = {
    "distil__quantization": {"for": "onnx-int8", "share": 0.5}, "export__formats": ["onnx", "onnx-int8"],
    "export__portable": True,
}  # fmt: skip


def student_of(recipe: Path, *overrides: str) -> Path:
    plan = make_plan(load_recipe(recipe, overrides), recipe.parent / "runs")
    return plan.artifact("distil", "student").path


@pytest.mark.thorough
def test_a_student_trained_for_int8_is_another_one_and_its_export_holds_in_the_way_it_was_trained_for(tmp_path):
    recipe = commands.workspace(tmp_path, **INT8)
    assert commands.run(recipe) == 0
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    assert report["exports"]["onnx-int8"]["way"] == "per channel, 7 bits"
    plain = "distil.quantization=null"
    assert commands.run(recipe, "--until", "distil", "--set", plain) == 0
    folders = [student_of(recipe), student_of(recipe, plain)]
    assert folders[0] != folders[1]
    rounded, exact = (load_file(folder / "model/model.safetensors") for folder in folders)
    assert rounded.keys() == exact.keys(), "nothing of the rounding is left in the files"
    assert any(not torch.equal(rounded[name], exact[name]) for name in exact)
    logs = [[json.loads(line) for line in (f / "train_log.jsonl").read_text().splitlines()] for f in folders]
    half = len(logs[0]) // 2
    same = [a["loss"] == b["loss"] for a, b in zip(*logs, strict=True)]
    assert all(same[:half]), "the first half is trained without rounding"
    assert not any(same[half:])


@pytest.mark.thorough
def test_micro_batches_processes_and_online_targets_train_the_same_rounded_student(tmp_path):
    equality.assert_splits_are_equal(commands.workspace(tmp_path, **INT8, **equality.EXACT))


@pytest.mark.thorough
def test_a_rounded_training_that_was_stopped_ends_in_the_same_weights(tmp_path):
    whole, cut = (commands.workspace(tmp_path / name, **INT8) for name in ("whole", "cut"))
    assert commands.run(whole, "--until", "distil") == 0
    stopped = commands.run_apart(cut, "--until", "distil", before=commands.signal_at("distil", 11, "SIGKILL"))
    assert stopped.returncode != 0
    assert commands.run(cut, "--until", "distil") == 0
    weights = [load_file(student_of(recipe) / "model/model.safetensors") for recipe in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["gguf-q4_0", "onnx-int4"])
def test_a_language_model_is_trained_for_4_bits(tmp_path, form):
    tiny_lm.save_merging(tmp_path / "base")
    tiny_lm.write_jsonl(tmp_path / "rows.jsonl", tiny_lm.pairs(100))
    recipe = tmp_path / "tiny.yaml"
    tree = tiny_lm.recipe_tree(
        tmp_path, export__formats=[form], teacher__gate="warn", distil__quantization={"for": form},
        export__tolerance={form: {"metric_kept": 0.5}},
    )  # fmt: skip
    recipe.write_text(yaml.safe_dump(tree))
    assert commands.run(recipe) == 0
    assert (tmp_path / "runs/tinylm/exports" / form).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distil__quantization": {"for": "onnx-int8"}}, "onnx-int8 is not among export.formats; add it"),
        ({**INT8, "export__portable": False}, "export.portable"),
        ({**INT8, "distil__quantization": {"for": "gguf-q4_0"}}, "a gguf form is for causal_lm"),
        ({**INT8, "distil__quantization": {"for": "int3"}}, "distil.quantization.for"),
        ({**INT8, "distil__quantization": {"for": "onnx-int8", "share": 0}}, "distil.quantization.share"),
        ({**INT8, "distil__quantization": {}}, "distil.quantization.for"),
        ({**INT8, "student__lora": {"rank": 2, "alpha": 4}}, "does not go with student.lora"),
        ({**INT8, "student": {"static": {"dim": 8}}}, "does not go with student.static"),
    ],
)
def test_what_training_for_a_rounding_does_not_go_with_is_refused(tmp_path, capsys, changes, message):
    recipe = commands.workspace(tmp_path, **changes)
    assert commands.run(recipe) == 2
    assert message in " ".join(capsys.readouterr().err.split())
