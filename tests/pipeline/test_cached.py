"""Soft targets of tokens on disk: the same student as with a running teacher, whatever is killed, split or moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import commands, tiny_lm

from distilpeft.planning.plan import Plan, make_plan
from distilpeft.recipe.yaml_file import load_recipe

QUICK = {
    "teacher__fit__epochs": 1, "distil__fit__epochs": 2, "distil__ce_only_baseline": False, "evaluate__samples": 0,
    "evaluate__teacher_full_precision": False, "teacher__gate": "warn", "distil__temperature": 2,
    "distil__fit__precision": "fp32",
}  # fmt: skip
CACHED = ("--set", "targets.mode=cached")
EVERY_ID = (
    "--set",
    "targets.format=top_k",
    "--set",
    f"targets.k={len(tiny_lm.tokenizer())}",
    "--set",
    "targets.value_bits=32",
)
SMALL_SHARDS = "import distilpeft.distillation.store as s\ns.SHARD_TOKENS = 600\n"


def workspace(folder: Path, **changes: object) -> Path:
    if not (folder / "base").exists():
        tiny_lm.save_pretrained(folder / "base")
        tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.pairs(90))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_lm.recipe_tree(folder, **{**QUICK, **changes})))
    return path


def plan_of(recipe: Path, *overrides: str) -> Plan:
    return make_plan(load_recipe(recipe, [one for one in overrides if one != "--set"]), recipe.parent / "runs")


def student_of(recipe: Path, *overrides: str) -> dict[str, torch.Tensor]:
    path = plan_of(recipe, *overrides).artifacts["distil/student"].path
    return load_file(path / "model" / "model.safetensors")


def expect_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() < tolerance, name


@pytest.fixture(scope="module")
def online(tmp_path_factory) -> Path:
    recipe = workspace(tmp_path_factory.mktemp("cached"))
    assert commands.run(recipe, "--until", "distil") == 0
    return recipe


@pytest.mark.parametrize("form", [("--set", "targets.format=full"), EVERY_ID], ids=["full", "every id"])
def test_cached_targets_train_the_student_that_a_running_teacher_trains(online, form):
    """Traps 7 to 9: two shuffled epochs, rows of unequal length, accumulation."""
    assert commands.run(online, *CACHED, *form, "--until", "distil") == 0
    expect_same(student_of(online, *CACHED, *form), student_of(online))


@pytest.mark.parametrize("micro_batch_size", [3, 100])
def test_micro_batches_do_not_matter(online, micro_batch_size):
    form = (*CACHED, "--set", "targets.format=sampled")
    assert commands.run(online, *form, "--until", "distil") == 0
    student = plan_of(online, *form).artifacts["distil/student"].path
    once = student_of(online, *form)
    shutil.rmtree(student)
    split = ("--set", f"distil.fit.micro_batch_size={micro_batch_size}")
    assert commands.run(online, *form, *split, "--until", "distil") == 0
    expect_same(student_of(online, *form), once)


@pytest.mark.thorough
def test_two_processes_write_the_same_store_and_train_the_same_student(online, tmp_path):
    form = {"mode": "cached", "format": "sampled", "precision": "fp32"}
    recipe = workspace(tmp_path, targets=form)
    assert commands.run(recipe, "--until", "distil") == 0
    once, plan = student_of(recipe), plan_of(recipe)
    store = {file.name: file.read_bytes() for file in plan.artifacts["targets"].path.iterdir()}
    for step in ("targets", "distil/student"):
        shutil.rmtree(plan.artifacts[step].path)
    done = commands.joined(recipe, 2)
    assert [one.returncode for one in done] == [0, 0], done[0].output[-2000:]
    again = {file.name: file.read_bytes() for file in plan.artifacts["targets"].path.iterdir()}
    assert {name: data for name, data in again.items() if name != "manifest.json"} == {
        name: data for name, data in store.items() if name != "manifest.json"
    }
    expect_same(student_of(recipe), once)
    report = json.loads((recipe.parent / "runs/tinylm/report.json").read_text())
    found = report["soft_targets"]
    assert found["layout"]["kind"] == "sampled"
    assert 0 < found["measured"]["captured_mass"] <= 1
    in_use, half, double, other = found["audit"]["forms"]
    assert in_use["in_use"]
    assert (half["count"], double["count"]) == (25, 100)
    assert other["kind"] == "top_k"
    for form_ in (in_use, half, double):
        assert abs(form_["bias"]) < 6 * form_["standard_error"] + 1e-2
    assert half["cosine_per_token"] < in_use["cosine_per_token"] < double["cosine_per_token"] <= 1
    assert other["bias"] <= 1e-6, "fewer classes cannot see more"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """A teacher with 50 rows of embeddings more than its student, to which its random head gives probability."""
    folder = tmp_path_factory.mktemp("narrow")
    for name, more in (("base", 50), ("small", 0)):
        tiny_lm.model(vocab_size=len(tiny_lm.tokenizer()) + more).save_pretrained(str(folder / name))
        tiny_lm.tokenizer().save_pretrained(str(folder / name))
    tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.pairs(60))
    short = {"epochs": 1, "max_steps": 2, "batch_size": 16, "precision": "fp32"}
    changes = {"teacher__fit": short, "distil__fit": short, "student": {"model": str(folder / "small")}}
    recipe = workspace(folder, **changes)
    assert commands.run(recipe, "--until", "distil") == 0
    return recipe


def test_kept_ids_of_a_teacher_with_more_ids_than_the_student_train_what_a_running_teacher_trains(narrow):
    """Trap 36: the student's own 261 ids of 311 are what the targets are over, and their tail is within these."""
    own = len(tiny_lm.tokenizer())
    assert commands.run(narrow, *CACHED, *EVERY_ID, "--until", "audit") == 0
    expect_same(student_of(narrow, *CACHED, *EVERY_ID), student_of(narrow))
    made = plan_of(narrow, *CACHED, *EVERY_ID).artifacts
    layout = made["targets"].figures()["layout"]
    assert layout["vocabulary"] == layout["count"] == own
    in_use, *_, sampled = made["audit"].figures()["forms"]
    assert abs(in_use["bias"]) < 1e-5
    assert in_use["cosine_of_sum"] == pytest.approx(1, abs=1e-5)
    assert abs(sampled["bias"]) < 6 * sampled["standard_error"] + 1e-2


def test_a_store_over_other_ids_than_the_pair_shares_is_refused_before_anything_starts(narrow, capsys):
    form = (*CACHED, "--set", "targets.format=sampled")
    assert commands.run(narrow, *form, "--until", "targets") == 0
    store = plan_of(narrow, *form).artifacts["targets"].path
    source = (*CACHED, "--set", f"targets.source={store}")
    own, base = len(tiny_lm.tokenizer()), narrow.parent / "base"
    fewer = f"{{from_config: {{model: {base}, overrides: {{vocab_size: {own - 9}}}}}}}"
    for student, shared in ((fewer, own - 9), (f"{{model: {base}}}", own + 50)):
        capsys.readouterr()
        assert commands.run(narrow, *source, "--set", f"student={student}", verb="check") == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"targets.source: {store}: its soft targets are over {own} token ids" in said
        assert f"but teacher and student share {shared}" in said


def kill_after(shards: int) -> str:
    return f"""{SMALL_SHARDS}
import os, signal
write, count = s.Writer.write, 0
def write_then_die(self, *rest):
    global count
    write(self, *rest)
    count += 1
    if count == {shards}:
        os.kill(os.getpid(), signal.SIGKILL)
s.Writer.write = write_then_die
globals()["write_then_die"] = write_then_die
"""


def test_killed_while_caching_finished_shards_stay_and_the_store_ends_in_the_same_bytes(online, tmp_path):
    form = (*CACHED, "--set", "targets.format=sampled", "--set", "targets.draws=9", "--until", "targets")
    recipe = workspace(tmp_path)
    shutil.copytree(online.parent / "base", tmp_path / "base", dirs_exist_ok=True)
    target = plan_of(recipe, *form[:-2]).artifacts["targets"]
    assert commands.run_apart(recipe, *form, before=SMALL_SHARDS).returncode == 0
    whole = {file.name: file.read_bytes() for file in target.path.glob("[srp]*")}
    assert len(list(target.path.glob("shard-*.bin"))) > 3
    shutil.rmtree(target.path)
    assert commands.run_apart(recipe, *form, before=kill_after(2)).returncode == -9
    kept = {file.name: file.stat().st_mtime_ns for file in target.partial.glob("shard-*.bin")}
    assert len(kept) == 2
    assert commands.run_apart(recipe, *form, before=SMALL_SHARDS).returncode == 0
    assert {file.name: file.read_bytes() for file in target.path.glob("[srp]*")} == whole
    for name, written in kept.items():
        assert (target.path / name).stat().st_mtime_ns == written


def test_one_flipped_byte_stops_the_run_before_the_student_trains(online, capsys):
    form = (*CACHED, "--set", "targets.format=top_k", "--set", "targets.k=3")
    assert commands.run(online, *form, "--until", "targets") == 0
    shard = next(plan_of(online, *form).artifacts["targets"].path.glob("shard-*.bin"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(bytes(data))
    capsys.readouterr()
    assert commands.run(online, *form, "--until", "distil") == 2
    assert f"{shard}: missing or altered" in capsys.readouterr().err


def test_a_store_made_elsewhere_serves_a_recipe_with_the_same_rows_and_no_other(online, tmp_path, capsys):
    form = (*CACHED, "--set", "targets.format=full")
    assert commands.run(online, *form, "--until", "distil") == 0
    moved = tmp_path / "store"
    shutil.copytree(plan_of(online, *form).artifacts["targets"].path, moved)
    source = (*CACHED, "--set", f"targets.source={moved}")
    assert "targets" not in plan_of(online, *source).artifacts
    assert commands.run(online, *source, "--until", "distil") == 0
    for name, weight in student_of(online, *source).items():
        np.testing.assert_array_equal(weight, student_of(online, *form)[name])
    for change, message in (
        ("data.split.seed=8", "another order"),
        ("data.max_tokens=40", "has other tokens"),
    ):
        capsys.readouterr()
        assert commands.run(online, *source, "--set", change, "--until", "distil") == 2
        said = capsys.readouterr().err
        assert str(moved) in said
        assert message in said or "rows in the store" in said or "other tokens" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("targets.format=sampled", "distil.divergence={kind: jsd}"), "targets.format: sampled targets estimate"),
        (("targets.format=top_k", "distil.divergence={kind: logit_mse}"), "targets.format: logit_mse compares"),
        (("targets.temperatures=[1, 4]",), "targets.temperatures: distil.temperature is 2, but only 1, 4"),
        (("targets.format=full", "targets.k=3"), "k is not for format full"),
        (("targets.mode=online", "targets.k=3"), "k is for targets on disk"),
        (("targets.k=70000",), "targets.k"),
        (("targets.source=/no/such/store",), "targets.source: /no/such/store: no soft targets here"),
        (("distil.fit.monitor=kl",), "kl is measured where targets.mode is online"),
    ],
)
def test_targets_that_the_loss_cannot_use_are_refused_before_anything_starts(online, capsys, overrides, message):
    arguments = [part for one in ("targets.mode=cached", *overrides) for part in ("--set", one)]
    assert commands.run(online, *arguments) == 2
    assert message in capsys.readouterr().err


def test_targets_are_made_again_for_what_they_depend_on_and_for_nothing_else(online):
    def key(*changes: str) -> str:
        return plan_of(online, "targets.mode=cached", *changes).artifacts["targets"].key

    warm, half = "distil.temperature=4", "distil.alpha=0.5"
    assert key("targets.format=full") == key("targets.format=full", warm) == key("targets.format=full", half)
    for form in ("top_k", "sampled", "auto"):
        chosen = f"targets.format={form}"
        assert key(chosen) == key(chosen, half)
        assert key(chosen) != key(chosen, warm), "the log-sum-exp is that of one temperature"
        listed = "targets.temperatures=[2, 4]"
        assert key(chosen, listed) == key(chosen, listed, warm)
        assert key(chosen) != key(chosen, "targets.value_bits=8")
    assert key("targets.format=top_k") != key("targets.format=top_k", "targets.k=3")
    assert key("targets.format=sampled") != key("targets.format=sampled", "targets.draws=3")


def test_every_row_and_every_seed_has_random_numbers_of_its_own():
    from distilpeft.pipeline.stages.targets import uniforms

    np.testing.assert_array_equal(uniforms(1, 5, 2, 3), uniforms(1, 5, 2, 3))
    for other in (uniforms(1, 6, 2, 3), uniforms(2, 5, 2, 3)):
        assert not np.isin(other, uniforms(1, 5, 2, 3)).any()
