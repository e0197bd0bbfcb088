"""One run over 1, 2 and 4 processes, whole or in shards, cached or online: the same student.

Traps 2, 5, 28, 30: the number of processes and the strategy that really was at work come from the manifest, where
the loop wrote what its wrapped module was. Accelerate ignores FSDP on CPUs without a word; `parallel: fsdp2` shards
with torch's own `fully_shard` on every device.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import commands, tiny_lm

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

STEPS = ("distil/student", "distil/student_ce_only")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A language-model recipe with its teacher tuned and its soft targets kept; 40 rows in batches of 16: ragged."""
    folder = tmp_path_factory.mktemp("parallel")
    tiny_lm.save_pretrained(folder / "base")
    tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.pairs(60))
    optim = {"lr": 0.05, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": None, "kind": "sgd"}
    changes = {"targets": {"precision": "fp32", "format": "full"}, "distil__optim": optim, "distil__fit__keep": "last"}
    tree = tiny_lm.recipe_tree(folder, distil__fit__micro_batch_size=3, **changes)
    tree["student"] = {"from_teacher": {"layers": [1]}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    assert commands.run(folder / "tiny.yaml", "--until", "targets") == 0
    return folder / "tiny.yaml"


MODES = {"cached": [], "online": ["targets={mode: online, precision: fp32}"]}


def copied(workspace: Path, folder: Path) -> Path:
    """The recipe in a folder of its own, with all that the workspace's runs have made."""
    folder.mkdir()
    for name in ("base", "rows.jsonl", "tiny.yaml"):
        (folder / name).symlink_to(workspace.parent / name)
    shutil.copytree(workspace.parent / "runs", folder / "runs")
    return folder / "tiny.yaml"


def run(recipe: Path, processes: int, *settings: str, before: str = "", until: str = "distil") -> list[commands.Done]:
    given = ["--until", until, *(part for setting in settings for part in ("--set", setting))]
    if processes == 1:
        return [commands.run_apart(recipe, *given, before=before)]
    return commands.joined(recipe, processes, *given, before=before)


def run_well(recipe: Path, processes: int, *settings: str, **options: str) -> None:
    done = run(recipe, processes, *settings, **options)
    assert [one.returncode for one in done] == [0] * processes, "\n".join(one.output[-2000:] for one in done)


def distilled(workspace: Path, folder: Path, processes: int, *settings: str) -> dict:
    """Traces, weights and manifest of both students, distilled from the workspace's teacher by so many processes."""
    recipe = copied(workspace, folder)
    run_well(recipe, processes, *settings)
    return students(recipe, *settings)


def students(recipe: Path, *settings: str) -> dict:
    made = make_plan(load_recipe(recipe, settings), recipe.parent / "runs").artifacts
    return {step: read(made[step]) for step in STEPS}


def read(made) -> dict:
    lines = [json.loads(line) for line in (made.path / "train_log.jsonl").read_text().splitlines()]
    manifest = made.manifest()
    return {
        "trace": [(line["loss"], line["grad_norm"]) for line in lines],
        "weights": load_file(made.path / "model" / "model.safetensors"),
        "processes": manifest["environment"]["num_processes"],
        "parallel": manifest["figures"]["parallel"],
        "validations": manifest["figures"]["validations"],
    }


@pytest.fixture(scope="module")
def alone(workspace, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("alone")
    return {mode: distilled(workspace, folder / mode, 1, *settings) for mode, settings in MODES.items()}


def expect_same(found: dict, expected: dict, rel: float = 1e-5) -> None:
    for step in STEPS:
        assert len(found[step]["trace"]) == len(expected[step]["trace"]) == 6
        for (loss, norm), (expected_loss, expected_norm) in zip(
            found[step]["trace"], expected[step]["trace"], strict=True
        ):
            assert loss == pytest.approx(expected_loss, rel=rel)
            assert norm == pytest.approx(expected_norm, rel=rel)
        assert found[step]["weights"].keys() == expected[step]["weights"].keys()
        for name, tensor in expected[step]["weights"].items():
            torch.testing.assert_close(found[step]["weights"][name], tensor, rtol=rel, atol=rel / 10)
        for one, two in zip(found[step]["validations"], expected[step]["validations"], strict=True):
            assert one == pytest.approx(two, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_every_split_ends_in_the_student_of_one_process(workspace, alone, tmp_path, parallel, processes, mode):
    found = distilled(workspace, tmp_path / "run", processes, f"parallel={parallel}", *MODES[mode])
    for step in STEPS:
        assert (found[step]["processes"], found[step]["parallel"]) == (processes, parallel)
        assert (alone[mode][step]["processes"], alone[mode][step]["parallel"]) == (1, "one process")
    expect_same(found, alone[mode])


ADAMW = ["distil.optim={lr: 0.005}", "distil.fit.save_every=1"]


@pytest.fixture(scope="module")
def whole(workspace, tmp_path_factory) -> dict:
    """Without a stop, by one process and with AdamW."""
    return distilled(workspace, tmp_path_factory.mktemp("whole") / "run", 1, *ADAMW)


@pytest.mark.parametrize(
    "ways",
    [
        [("fsdp2", 2), ("ddp", 4)],
        [("ddp", 2), ("fsdp2", 4)],
        [("fsdp2", 4), ("ddp", 1)],
        [("ddp", 1), ("fsdp2", 2)],
    ],
    ids=str,
)
@pytest.mark.thorough
def test_another_number_of_processes_and_another_strategy_go_on_from_a_checkpoint(workspace, whole, tmp_path, ways):
    """With AdamW, whose state has to come along."""
    recipe = copied(workspace, tmp_path / "run")
    (first, before), (second, after) = ways
    stopped = run(recipe, before, *ADAMW, f"parallel={first}", before=commands.signal_at("distil", 3, "SIGTERM"))
    assert {one.returncode for one in stopped} == {75}
    run_well(recipe, after, *ADAMW, f"parallel={second}")
    found = students(recipe, *ADAMW)
    expect_same(found, whole, rel=1e-4)
    strategy = "one process" if after == 1 else second
    assert found["distil/student"]["parallel"] == strategy


@pytest.mark.parametrize(
    ("settings", "teacher", "student"),
    [
        (["teacher.quantize=none"], "fsdp2", "fsdp2"),
        (["teacher.quantize=none", "teacher.lora=null", "teacher.optim.lr=0.001"], "fsdp2", "fsdp2"),
        (["student.lora={rank: 4, alpha: 8}"], "ddp", "fsdp2"),
        (["student.gradient_checkpointing=true"], "ddp", "fsdp2"),
    ],
    ids=str,
)
@pytest.mark.thorough
def test_adapters_and_teachers_are_tuned_in_shards_and_quantized_ones_whole(
    workspace, tmp_path, settings, teacher, student
):
    """Shards of 4-bit weights would be no use without their scales."""
    online = [*MODES["online"], *settings]
    recipe, alone = copied(workspace, tmp_path / "run"), copied(workspace, tmp_path / "alone")
    for folder in (recipe, alone):  # the workspace's teacher was tuned by one process
        shutil.rmtree(folder.parent / "runs")
    run_well(alone, 1, *online)
    run_well(recipe, 2, *online, "parallel=fsdp2")
    expect_same(students(recipe, *online), students(alone, *online), rel=1e-4)
    made = make_plan(load_recipe(recipe, online), recipe.parent / "runs").artifacts
    assert made["teacher"].figures()["parallel"] == teacher
    assert made["distil/student"].figures()["parallel"] == student


PLACES = {
    "sharded": ["teacher.quantize=none", "teacher.place=sharded"],
    "offloaded": ["teacher.place=offloaded"],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.thorough
def test_a_teacher_in_shards_or_in_main_memory_teaches_and_is_judged_the_same(workspace, tmp_path, place, mode):
    """To the end of evaluation, with its samples and comparisons; soft targets in unequal numbers of batches."""
    settings = [*PLACES[place], *MODES[mode], "targets.micro_batch_size=4", "evaluate.micro_batch_size=3"]
    moved = tmp_path / "moved.txt"
    watch = f"""
import distilpeft.models.parallel as places
for name in ("shard_layers", "offload_layers"):
    def told(runtime, model, act=getattr(places, name), name=name):
        act(runtime, model)
        print(name, file=open({str(moved)!r}, "a"))
    setattr(places, name, told)
    import distilpeft.models.teacher
    setattr(distilpeft.models.teacher, name, told)
"""
    recipe, alone = copied(workspace, tmp_path / "run"), copied(workspace, tmp_path / "alone")
    plain = [*settings, "teacher.place=replicated"]
    run_well(alone, 1, *plain, until="evaluate")
    run_well(recipe, 2, *settings, before=watch, until="evaluate")
    expect_same(students(recipe, *settings), students(alone, *plain), rel=1e-4)
    assert {"sharded": "shard_layers", "offloaded": "offload_layers"}[place] in moved.read_text()
    ours, theirs = (
        make_plan(load_recipe(path, settings), path.parent / "runs").artifacts["evaluate/student"].figures()
        for path in (recipe, alone)
    )
    assert ours["against_teacher"] == pytest.approx(theirs["against_teacher"], rel=1e-3)
    assert ours["samples"] == theirs["samples"]
