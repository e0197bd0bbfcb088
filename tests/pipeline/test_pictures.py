"""Image models from recipe to deployment, with BatchNorm over processes and views that teacher and student share."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from support import commands, equality, tiny_tasks
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

FORMS = ("safetensors", "onnx", "onnx-int8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    recipe = tiny_tasks.learnable(folder, "image_classification", export__formats=list(FORMS))
    assert commands.run(recipe, apart=True) == 0
    digits = load_digits(n_class=4)
    for number in range(4):
        at = int((digits.target == number).argmax())
        (folder / f"{number}.png").write_bytes(tiny_tasks.png(digits.images[at]))
    return folder / "runs/tiny"


def right(run: Path, files: list[str]) -> list[str]:
    """What transformers' own processor and model say."""
    folder = str(run / "exports" / "safetensors")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    settings = json.loads((run / "exports/safetensors/preprocessor_config.json").read_text())
    inputs = ViTImageProcessorPil(**settings)([Image.open(file).convert("RGB") for file in files], return_tensors="pt")
    with torch.no_grad():
        return [str(number) for number in model(**inputs).logits.argmax(-1).tolist()]


@pytest.mark.thorough
def test_all_models_learn_the_digits_and_every_export_passes_its_gate(finished):
    report = json.loads((finished / "report.json").read_text())
    scores = {model["role"]: model["scores"]["accuracy"]["value"] for model in report["models"]}
    assert min(scores[role] for role in ("teacher", "student", "student_ce_only")) > 0.9
    for form in FORMS:
        assert abs(scores[f"export:{form}"] - scores["student"]) < 0.05
    assert "were cut to" not in (finished / "report.md").read_text(), "pictures have no tokens"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.thorough
def test_a_deployed_model_sorts_files(finished, form):
    files = [str(finished.parent.parent / f"{number}.png") for number in range(4)]
    lines = "".join(json.dumps({"image": file}) + "\n" for file in files)
    folder = str(finished / "exports" / form)
    done = commands.predict(folder, lines=lines)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == right(finished, files)
    bad = commands.predict(folder, str(finished / "report.md"))
    assert bad.returncode == 2
    assert re.fullmatch(r"error: .*report.md: not a picture that can be read \(\w+\)\n", bad.stderr)


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
@pytest.mark.thorough
def test_the_cards_code_sorts_files(finished, form):
    folder = finished / "exports" / form
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    given = '["a.png", "b.png"]'
    assert given in code
    files = [str(finished.parent.parent / f"{number}.png") for number in (2, 1)]
    done = commands.python("-c", code.replace(given, repr(files)), folder=folder)
    assert done.returncode == 0, done.stderr
    if form == "onnx":
        assert done.stdout.strip() == str(right(finished, files))
    else:
        assert [rows[0] for rows in re.findall(r"\[\{'label': '(\d)'", done.stdout)] == right(finished, files)


@pytest.mark.thorough
def test_batch_norm_and_shared_views_are_equal_in_one_process_and_two(tmp_path):
    """Statistics over the micro-batches of both processes, of pictures that are moved anew in every epoch."""
    settings = {**equality.EXACT, "distil__fit": {**equality.EXACT["distil__fit"], "epochs": 3, "batch_size": 100}}
    short = {"epochs": 1, "max_steps": 4, "batch_size": 16, "precision": "fp32"}
    recipe = tiny_tasks.workspace(
        tmp_path, "image_classification", **{**settings, "targets": {"mode": "online", "precision": "fp32"}},
        teacher__fit=short, teacher__gate="warn", task__augment={"flip": True, "shift": 0.2},
    )  # fmt: skip
    ways = ((1, ["distil.fit.micro_batch_size=50"]), (2, ["distil.fit.micro_batch_size=25"]))
    equality.assert_splits_are_equal(recipe, ways, first="teacher")


def test_kept_targets_of_views_train_the_same_student_as_a_running_teacher(tmp_path):
    short = {"epochs": 2, "max_steps": 4, "batch_size": 16, "precision": "fp32"}
    recipe = tiny_tasks.workspace(
        tmp_path, "image_classification", data__views={"copies": 2}, task__augment={"flip": True, "shift": 0.2},
        teacher__fit=short, teacher__gate="warn", distil__fit=short, distil__controls=["labelled_rows"],
    )  # fmt: skip
    made = {}
    for mode in ("cached", "online"):
        change = f"targets.mode={mode}"
        assert commands.run(recipe, "--until", "distil", "--set", change) == 0
        plan = make_plan(load_recipe(recipe, [change]), tmp_path / "runs")
        for role in ("student", "student_labelled_rows"):
            made[mode, role] = load_file(plan.artifact("distil", role).path / "model/model.safetensors")
    for role in ("student", "student_labelled_rows"):
        for name, weight in made["cached", role].items():
            torch.testing.assert_close(weight, made["online", role][name], atol=2e-5, rtol=0, msg=f"{role} {name}")


def test_kept_targets_of_other_views_are_refused(tmp_path, capsys):
    recipe = tiny_tasks.workspace(tmp_path, "image_classification", task__augment={"shift": 0.1})
    assert commands.run(recipe, verb="check") == 2
    assert "task.augment: soft targets on disk are of the pictures as they are; set targets.mode: online" in (
        capsys.readouterr().err
    )


def test_a_teacher_of_other_sizes_sees_the_same_view():
    """The same random numbers: mirrored or not, and moved by the same share of its own height and width."""
    import numpy as np

    from distilpeft.data.pictures import varied

    large = np.arange(3 * 32 * 32, dtype=np.int64).reshape(3, 32, 32)
    small = large[:, ::2, ::2]
    for row in range(20):
        chances = np.random.default_rng([1, row]).random(3).tolist()
        one, two = (varied(part, chances, flip=True, shift=0.25) for part in (large, small))
        flipped = one[0, 0, 1] < one[0, 0, 0] or one[0, 0, -1] < one[0, 0, 0]
        assert flipped == (two[0, 0, 1] < two[0, 0, 0] or two[0, 0, -1] < two[0, 0, 0])
    torch.testing.assert_close(
        torch.from_numpy(varied(large, [0.9, 0.5, 1.0], flip=True, shift=0.25)[:, :, 8:]),
        torch.from_numpy(large[:, :, :-8]),
    )
