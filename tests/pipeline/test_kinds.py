"""Every kind of teacher, student and schedule that a recipe can name, through the real command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import commands, tiny
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

FIT = {"epochs": 2, "batch_size": 16, "micro_batch_size": 16, "precision": "fp32"}


def plan_of(recipe: Path):
    return make_plan(load_recipe(recipe), recipe.parent / "runs")


def figures(recipe: Path, step: str) -> dict:
    return plan_of(recipe).artifacts[step].figures()


def accuracy(recipe: Path, role: str) -> float:
    return figures(recipe, f"evaluate/{role}")["scores"]["accuracy"]["value"]


def turned_vocabulary(folder: Path) -> Path:
    """A body whose tokenizer gives every word another id than the teacher's."""
    body = copy.deepcopy(tiny.pretrained().bert)
    core = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    words = list(core["model"]["vocab"])
    turned = words[:5] + words[:4:-1]
    embeddings = body.embeddings.word_embeddings.weight.data
    embeddings.copy_(embeddings[[words.index(word) for word in turned]])
    body.save_pretrained(str(folder))
    core["model"]["vocab"] = {word: index for index, word in enumerate(turned)}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), **special).save_pretrained(
        str(folder)
    )
    return folder


@pytest.mark.thorough
def test_a_pretrained_student_with_another_tokenizer_reads_its_own_ids(tmp_path):
    """Soft targets belong to rows, so ids may differ; online must tokenise for the teacher again."""
    turned_vocabulary(tmp_path / "other")
    changes = {"student": {"model": str(tmp_path / "other")}, "distil__fit": {**FIT, "epochs": 4}}
    recipe = commands.workspace(tmp_path, **changes)
    assert commands.run(recipe) == 0
    assert accuracy(recipe, "student") > 0.9
    cached = load_file(plan_of(recipe).artifacts["distil/student"].path / "model/model.safetensors")
    recipe = commands.workspace(tmp_path, **changes, targets__mode="online")
    assert commands.run(recipe, "--until", "distil") == 0
    online = load_file(plan_of(recipe).artifacts["distil/student"].path / "model/model.safetensors")
    for name, tensor in cached.items():
        torch.testing.assert_close(online[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "floor"),
    [
        ({"student": {"from_config": {"model": "base", "overrides": {"num_hidden_layers": 1}}}}, 0.0),
        ({"student": {"from_teacher": {"layers": [0, 1]}, "lora": {"rank": 2}}}, 0.9),
        ({"teacher__quantize": "int8"}, 0.9),
        ({"teacher__quantize": "none", "teacher__lora": "full", "teacher__optim": {"lr": 0.001}}, 0.9),
        ({"teacher__gradient_checkpointing": True, "student__gradient_checkpointing": True}, 0.9),
        ({"teacher__fit__precision": "bf16", "distil__fit__precision": "bf16", "targets__precision": "bf16"}, 0.9),
        ({"distil__alpha": 1.0, "distil__ce_only_baseline": False, "evaluate__teacher_full_precision": False}, 0.9),
        ({"distil__alpha": 0.0}, 0.9),
        ({"teacher__optim__schedule": "cosine", "distil__optim__schedule": "constant"}, 0.9),
    ],
    ids=[
        "random",
        "lora student",
        "int8",
        "full tuning",
        "gradient checkpointing",
        "bf16",
        "alpha 1",
        "alpha 0",
        "schedules",
    ],
)
@pytest.mark.thorough
def test_the_chain_holds_for(tmp_path, changes, floor):
    recipe = commands.workspace(tmp_path, **changes)
    tree = (
        recipe.read_text().replace("lora: full", "lora: null").replace("model: base\n", f"model: {tmp_path / 'base'}\n")
    )
    recipe.write_text(tree)
    assert commands.run(recipe) == 0
    assert accuracy(recipe, "student") >= floor
    assert accuracy(recipe, "teacher") > 0.9
    assert accuracy(recipe, "export:safetensors") == accuracy(recipe, "student")


@pytest.mark.thorough
def test_three_classes_by_name_in_jsonl_files_of_their_own(tmp_path):
    tiny.save_pretrained(tmp_path / "base")
    for split, seed in (("train", 1), ("dev", 2), ("test", 3)):
        texts = tiny.rows(90, seed=seed)
        lines = [{"text": text, "label": ("low", "high")[label]} for text, label in texts]
        lines += [
            {"text": "the film of the story", "label": "none"},
            {"text": "a scene and music", "label": "none"},
        ] * 15
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    source = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "dev", "test")}
    recipe = commands.workspace(
        tmp_path,
        task__labels=["none", "low", "high"],
        data={"source": source, "train": "train", "validation": "dev", "test": "test", "max_tokens": 12},
        teacher__fit={**FIT, "epochs": 4},
    )
    assert commands.run(recipe) == 0
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    assert report["rows"]["truncated"] > 0
    assert report["rows"]["duplicates"]["train/test"] >= 30, "the two plain sentences stand in every split"
    assert accuracy(recipe, "teacher") > 0.6


def test_early_stopping_ends_a_fit_and_keeps_its_best_weights(tmp_path):
    recipe = commands.workspace(
        tmp_path,
        teacher__fit={**FIT, "epochs": 30, "validate_every": 2, "early_stopping_patience": 2, "monitor": "log_loss"},
        teacher__optim={"lr": 0.2, "schedule": "reduce_on_plateau", "plateau_patience": 0},
        teacher__gate="warn",
    )
    assert commands.run(recipe, "--until", "teacher") == 0
    found = figures(recipe, "teacher")
    assert found["steps"] < 240
    values = {entry["step"]: entry["log_loss"] for entry in found["validations"] if entry["step"]}
    assert found["best_value"] == min(values.values())
    assert found["kept_step"] == min(values, key=values.get)
    assert found["tuned"]["log_loss"] == pytest.approx(found["best_value"], abs=1e-6)
    log = (plan_of(recipe).artifacts["teacher"].path / "train_log.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in log]
    assert rates[-1] < max(rates), "the plateau must have cut the learning rate"


@pytest.mark.thorough
def test_two_processes_make_the_same_chain_as_one(tmp_path):
    recipe = commands.workspace(tmp_path)
    assert commands.run_apart(recipe, "--until", "evaluate").returncode == 0
    one = load_file(plan_of(recipe).artifacts["distil/student"].path / "model/model.safetensors")
    scores = figures(recipe, "evaluate/student")["scores"]
    (tmp_path / "runs").rename(tmp_path / "runs1")
    done = commands.joined(recipe, 2)
    assert [one.returncode for one in done] == [0, 0], done[0].output + done[1].output
    two = load_file(plan_of(recipe).artifacts["distil/student"].path / "model/model.safetensors")
    assert plan_of(recipe).artifacts["distil/student"].manifest()["environment"]["num_processes"] == 2
    apart = sum((two[name] - tensor).square().sum() for name, tensor in one.items()).sqrt()
    size = sum(tensor.square().sum() for tensor in one.values()).sqrt()
    assert apart / size < 1e-3, "AdamW turns rounding into small steps, never into other weights"
    assert figures(recipe, "evaluate/student")["scores"]["accuracy"] == scores["accuracy"]
    assert "Traceback" not in done[1].output
    assert "[1/" not in done[1].output, "one process speaks"
