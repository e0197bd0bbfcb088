"""One run over 1, 2 and 4 processes, whole or in shards, cached or online: the same student.

Traps 2, 5, 28, 30: the number of processes and the strategy that really was at work come from the manifest, where
the loop wrote what its wrapped module was. Accelerate ignores FSDP on CPUs without a word; `parallel: fsdp2` shards
with torch's own `fully_shard` on every device.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import commands
import pytest
import tiny_lm
import torch
import yaml
from safetensors.torch import load_file

from distilpeft.plan import make_plan
from distilpeft.recipe_file import load_recipe

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
    tree["student"] = {"from_teacher": {"layers": [0, 1]}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    assert commands.run(folder / "tiny.yaml", "--until", "targets") == 0
    return folder / "tiny.yaml"


MODES = {"cached": [], "online": ["targets={mode: online, precision: fp32}"]}


def distilled(workspace: Path, folder: Path, processes: int, *settings: str) -> dict:
    """Traces, weights and manifest of both students, distilled from the workspace's teacher by so many processes."""
    folder.mkdir()
    for name in ("base", "rows.jsonl", "tiny.yaml"):
        (folder / name).symlink_to(workspace.parent / name)
    shutil.copytree(workspace.parent / "runs", folder / "runs")
    recipe = folder / "tiny.yaml"
    given = ["--until", "distil", *(part for setting in settings for part in ("--set", setting))]
    alone = processes == 1
    done = [commands.run_apart(recipe, *given)] if alone else commands.joined(recipe, processes, *given)
    assert [one.returncode for one in done] == [0] * processes, "\n".join(one.output[-2000:] for one in done)
    made = make_plan(load_recipe(recipe, settings), folder / "runs").artifacts
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


def expect_same(found: dict, expected: dict) -> None:
    for step in STEPS:
        assert len(found[step]["trace"]) == len(expected[step]["trace"]) == 6
        for (loss, norm), (expected_loss, expected_norm) in zip(
            found[step]["trace"], expected[step]["trace"], strict=True
        ):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-5)
        assert found[step]["weights"].keys() == expected[step]["weights"].keys()
        for name, tensor in expected[step]["weights"].items():
            torch.testing.assert_close(found[step]["weights"][name], tensor, rtol=1e-5, atol=1e-6)
        for one, two in zip(found[step]["validations"], expected[step]["validations"], strict=True):
            assert one == pytest.approx(two, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_every_split_ends_in_the_student_of_one_process(workspace, alone, tmp_path, parallel, processes, mode):
    found = distilled(workspace, tmp_path / "run", processes, f"parallel={parallel}", *MODES[mode])
    for step in STEPS:
        assert (found[step]["processes"], found[step]["parallel"]) == (processes, parallel)
        assert (alone[mode][step]["processes"], alone[mode][step]["parallel"]) == (1, "one process")
    expect_same(found, alone[mode])
