"""The whole chain for a tiny language model: results, kinds of rows and students, and pairs that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import commands, tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

ROWS = {"rows.jsonl": tiny_lm.pairs, "chats.jsonl": tiny_lm.chats}


def workspace(folder: Path, count: int = 120, **changes: object) -> Path:
    """A base model, rows in both forms and a recipe in `folder`; returns the recipe's path."""
    if not (folder / "base").exists():
        tiny_lm.save_pretrained(folder / "base")
        for name, make in ROWS.items():
            tiny_lm.write_jsonl(folder / name, make(count))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_lm.recipe_tree(folder, **changes)))
    return path


QUICK = {
    "teacher__fit__epochs": 1, "distil__fit__epochs": 1, "distil__ce_only_baseline": False, "evaluate__samples": 0,
    "evaluate__teacher_full_precision": False, "teacher__gate": "warn",
}  # fmt: skip


def report_of(recipe: Path) -> dict:
    return json.loads((recipe.parent / "runs/tinylm/report.json").read_text())


def scores(report: dict) -> dict[str, dict]:
    return {model["role"]: model for model in report["models"]}


def weights(recipe: Path, *overrides: str) -> dict[str, torch.Tensor]:
    plan = make_plan(load_recipe(recipe, overrides), recipe.parent / "runs")
    return load_file(plan.artifacts["distil/student"].path / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = workspace(tmp_path_factory.mktemp("language"), count=200)
    assert commands.run(recipe) == 0
    return recipe


def test_the_report_judges_every_model_by_nats_and_its_distance_from_the_teacher(finished):
    report = report_of(finished)
    models = scores(report)
    assert set(models) == {
        "majority", "untrained", "student_ce_only", "student", "teacher", "teacher_full_precision",
        "teacher_merged", "export:safetensors",
    }  # fmt: skip
    nats = {role: model["scores"]["nats_per_token"]["value"] for role, model in models.items()}
    assert nats["teacher"] < nats["student"] < nats["untrained"]
    assert nats["teacher"] < nats["majority"]
    assert models["teacher"]["against_teacher"] is None
    assert models["majority"]["against_teacher"] is None
    assert models["student"]["against_teacher"]["kl"] < models["untrained"]["against_teacher"]["kl"] / 2
    assert report["student_vs_teacher"] == pytest.approx(np.exp(nats["teacher"] - nats["student"]))
    for model in models.values():
        for score in model["scores"].values():
            assert score["low"] <= score["value"] <= score["high"]
    (sample,) = report["samples"]
    assert set(sample) == {"prompt", "teacher", "student"}
    text = (finished.parent / "runs/tinylm/report.md").read_text()
    assert "nats per token untrained" in text
    assert "- student: `" in text


def test_the_figures_are_those_of_transformers_alone_over_the_exported_model(finished):
    """Trap 25: document by document, unpadded, with plain log-softmax."""
    from distilpeft.tasks.rows import read_task_rows

    folder = str(finished.parent / "runs/tinylm/student")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    nats = tokens = right = size = 0
    for row in read_task_rows(load_recipe(finished)).splits["test"]:
        if not row["completion"]:
            continue
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]])[:, :96]
        with torch.no_grad():
            log_q = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        for j in range(len(prompt), ids.shape[1]):
            nats, tokens = nats - log_q[j - 1, ids[0, j]].item(), tokens + 1
            right += int(log_q[j - 1].argmax()) == int(ids[0, j])
            size += int(ids[0, j]) != tokenizer.eos_token_id  # one byte is one token here
    found = scores(report_of(finished))["student"]["scores"]
    assert found["nats_per_token"]["value"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["nats_per_token"]["num_rows"] == tokens
    assert found["accuracy"]["value"] == pytest.approx(right / tokens)
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)


def test_the_distance_from_the_teacher_is_that_of_whole_logits(finished):
    from distilpeft.machine.runtime import Runtime
    from distilpeft.models.pair import Pair
    from distilpeft.models.teacher import load_teacher
    from distilpeft.tasks.rows import read_task_rows

    plan = make_plan(load_recipe(finished), finished.parent / "runs")
    teacher = load_teacher(Runtime(), Pair(plan.recipe), plan.artifacts["teacher"].path, "fp32")
    student = AutoModelForCausalLM.from_pretrained(str(finished.parent / "runs/tinylm/student")).eval()
    words, kl, tokens = teacher.tokenizer, 0.0, 0
    for row in read_task_rows(plan.recipe).splits["test"]:
        prompt, completion = words(row["prompt"])["input_ids"], words(row["completion"])["input_ids"]
        if completion:
            ids = torch.tensor([[*prompt, *completion, words.eos_token_id]])[:, :96]
            with torch.no_grad():
                p, q = (torch.softmax(m(input_ids=ids).logits[0].double(), -1) for m in (teacher.model, student))
            kl += (p * (p / q).log()).sum(-1)[len(prompt) - 1 : -1].sum().item()
            tokens += ids.shape[1] - len(prompt)
    assert scores(report_of(finished))["student"]["against_teacher"]["kl"] == pytest.approx(kl / tokens, rel=1e-4)


def test_the_export_writes_on_through_a_plain_pipeline(finished):
    write = pipeline("text-generation", model=str(finished.parent / "runs/tinylm/student"))
    (found,) = write("the film :", max_new_tokens=5, do_sample=False)
    assert found["generated_text"].startswith("the film :")


def test_a_second_run_does_nothing(finished, capsys):
    assert commands.run(finished) == 0
    assert "nothing to do, all 16 steps are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"task": {"kind": "causal_lm", "messages": "messages", "pack": True}, "data__source": "chats.jsonl"},
        {"task": {"kind": "causal_lm", "text": "prompt", "pack": True}, "data__max_tokens": 48},
        {"task": {"kind": "causal_lm", "prompt": "prompt", "completion": "completion", "chat": True, "loss_on": "all"}},
        {"student": {"from_config": {"model": "base", "overrides": {"num_hidden_layers": 1}}},
         "student__lora": {"rank": 2}},
        {"student": {"model": "base"}, "teacher__quantize": "int8", "distil__divergence": {"kind": "jsd", "beta": 0.3}},
        {"teacher__quantize": "none", "teacher__lora": {"rank": 2, "target_modules": ["q_proj", "down_proj"]},
         "distil__divergence": {"kind": "skew_reverse_kl"}, "distil__fit__monitor": "kl"},
        {"teacher__quantize": "none", "teacher__lora": None, "teacher__optim__lr": 1e-4, "distil__alpha": 1.0,
         "distil__label_smoothing": 0.1, "distil__divergence": {"kind": "total_variation"}},
        {"distil__alpha": 0.0, "distil__ce_only_baseline": False, "student__gradient_checkpointing": True},
        {"teacher__fit__precision": "bf16", "distil__fit__precision": "bf16", "targets__precision": "bf16",
         "evaluate__precision": "bf16", "distil__divergence": {"kind": "reverse_kl"}},
    ],
    ids=["chats", "text", "pairs", "random lora student", "int8 and jsd", "skewed", "full tuning", "no teacher",
         "bf16"],
)  # fmt: skip
@pytest.mark.thorough
def test_the_chain_holds_for(tmp_path, changes):
    for name in ("base", "chats.jsonl"):
        changes = json.loads(json.dumps(changes).replace(f'"{name}"', json.dumps(str(tmp_path / name))))
    recipe = workspace(tmp_path, **{**QUICK, **changes})
    assert commands.run(recipe) == 0
    models = scores(report_of(recipe))
    before, after = (models[role]["scores"]["nats_per_token"]["value"] for role in ("untrained", "student"))
    assert np.isfinite(after)
    if "from_teacher" in load_recipe(recipe).student.model_fields_set:
        assert after < before


@pytest.mark.slow
def test_two_processes_make_the_same_student_as_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = workspace(tmp_path / "one", **QUICK, evaluate__metrics=["accuracy"])
    two = workspace(tmp_path / "two", **QUICK, evaluate__metrics=["accuracy"])
    assert commands.run(one) == 0
    done = commands.joined(two, 2)
    assert [process.returncode for process in done] == [0, 0], done[0].output[-2000:]
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-3, atol=1e-4)
    first, second = (scores(report_of(recipe))["student"] for recipe in (one, two))
    assert first["scores"]["nats_per_token"]["value"] == pytest.approx(
        second["scores"]["nats_per_token"]["value"], rel=1e-3
    )


@pytest.mark.slow
def test_killed_in_the_middle_of_distilling_it_ends_in_the_same_weights(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (workspace(tmp_path / name, **QUICK) for name in ("whole", "killed"))
    assert commands.run_apart(whole).returncode == 0
    assert commands.run_apart(killed, before=commands.signal_at("distil", 4, "SIGKILL")).returncode == -9
    done = commands.run_apart(killed)
    assert done.returncode == 0, done.output
    assert "resuming after step 3" in done.output
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(killed)[name], tensor)


def student_with(folder: Path, change) -> Path:
    """The base model with another tokenizer."""
    tiny_lm.pretrained().save_pretrained(str(folder))
    tokenizer_folder = folder
    tiny_lm.tokenizer().save_pretrained(str(tokenizer_folder))
    change(folder)
    return folder


def swap(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (folder / "tokenizer.json").write_text(json.dumps(data))


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(tiny_lm.TEMPLATE.replace("<|end|>", "<|end|> "))


def test_a_student_that_reads_ids_otherwise_is_refused_before_anything_slow(tmp_path, capfd):
    """Trap 12."""
    student_with(tmp_path / "swapped", swap)
    recipe = workspace(tmp_path, **QUICK, student={"model": str(tmp_path / "swapped")})
    capfd.readouterr()
    assert commands.run(recipe) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "reads token 38 as 'B', the teacher" in error or "reads token" in error
    assert not list((tmp_path / "runs").rglob("manifest.json"))


def test_another_chat_template_is_refused_for_chats_unless_the_teachers_is_taken(tmp_path, capfd):
    student_with(tmp_path / "other", other_template)
    task = {"kind": "causal_lm", "messages": "messages"}
    changes = {**QUICK, "task": task, "data__source": str(tmp_path / "chats.jsonl")}
    recipe = workspace(tmp_path, **changes, student={"model": str(tmp_path / "other")})
    capfd.readouterr()
    assert commands.run(recipe) == 2
    assert "its chat template differs from the teacher's" in capfd.readouterr().err
    taken = {"model": str(tmp_path / "other"), "tokenizer": "teacher"}
    recipe = workspace(tmp_path, **changes, student=taken)
    assert commands.run(recipe, "--until", "distil") == 0
    saved = next((tmp_path / "runs").glob("tinylm/distil-*/model/chat_template.jinja"))
    assert saved.read_text() == tiny_lm.TEMPLATE


@pytest.mark.thorough
def test_a_student_with_more_embedding_rows_learns_over_the_same_tokens(tmp_path):
    """Trap 11: the padded rows of either side are not part of the divergence."""
    wide = tiny_lm.model(1, seed=5, vocab_size=len(tiny_lm.tokenizer()) + 19)
    wide.save_pretrained(str(tmp_path / "wide"))
    tiny_lm.tokenizer().save_pretrained(str(tmp_path / "wide"))
    recipe = workspace(tmp_path, **QUICK, student={"model": str(tmp_path / "wide")})
    assert commands.run(recipe) == 0
    models = scores(report_of(recipe))
    assert models["student"]["against_teacher"]["kl"] < models["untrained"]["against_teacher"]["kl"]


def test_a_teacher_that_learns_nothing_is_stopped_with_its_figures(tmp_path, capfd):
    """Trap 20."""
    recipe = workspace(tmp_path, **{**QUICK, "teacher__gate": "stop"}, teacher__optim__lr=1e-9)
    tiny_lm.model(seed=9).save_pretrained(str(tmp_path / "base"))
    assert commands.run(recipe) == 3
    error = capfd.readouterr().err
    assert "the tuned teacher is no better than chance: its validation nats_per_token is" in error
    assert "the class-frequency baseline" in error


def test_check_tells_what_it_can(finished, capsys, monkeypatch):
    import sys

    from distilpeft import cli

    arguments = ["check", str(finished), "--runs", str(finished.parent / "runs"), "--full"]
    monkeypatch.setattr(sys, "argv", ["distilpeft", *arguments])
    cli.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "16 of 16 steps are done" in printed
    assert "kind: causal_lm" in printed
