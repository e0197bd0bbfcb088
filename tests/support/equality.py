"""One student however it is trained: micro-batches, processes, and where soft targets come from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe
from support import commands

STEPS = 6
EXACT = {
    "targets": {"precision": "fp32"},
    "distil__fit": {
        "epochs": 1, "max_steps": STEPS, "batch_size": 14, "micro_batch_size": 14, "precision": "fp32", "keep": "last"
    },
    "distil__optim": {"kind": "sgd", "lr": 0.05},
}  # fmt: skip
"""Changes of a recipe for such a comparison: SGD, since AdamW would hide a loss that is scaled wrongly."""


WAYS = (
    (1, []), (1, ["distil.fit.micro_batch_size=3"]), (2, ["distil.fit.micro_batch_size=3"]),
    (1, ["targets={mode: online, precision: fp32}"]),
)  # fmt: skip
"""Whole batches, micro-batches, two processes, and online: the number of processes, and settings of the recipe."""


def assert_splits_are_equal(recipe: Path, ways=WAYS, first: str = "targets") -> None:
    """Train from the same teacher in several ways; loss, norm, weights and running statistics agree."""
    assert commands.run(recipe, "--until", first, own_process=True) == 0
    traces, weights = [], []
    for processes, settings in ways:
        runs = recipe.parent / f"runs{len(traces)}"
        subprocess.run(["cp", "-r", str(recipe.parent / "runs"), str(runs)], check=True)
        given = ["--until", "distil", "--runs", str(runs), *(part for one in settings for part in ("--set", one))]
        for done in (
            commands.joined(recipe, processes, *given) if processes > 1 else [commands.run_apart(recipe, *given)]
        ):
            assert done.returncode == 0, done.output[-2000:]
        made = make_plan(load_recipe(recipe, tuple(settings)), runs).artifacts["distil/student"]
        assert made.manifest()["environment"]["num_processes"] == processes
        lines = [json.loads(line) for line in (made.path / "train_log.jsonl").read_text().splitlines()]
        traces.append([(line["loss"], line["grad_norm"]) for line in lines])
        weights.append(load_file(made.path / "model" / "model.safetensors"))
    for trace, model in zip(traces[1:], weights[1:], strict=True):
        assert len(trace) == STEPS
        np.testing.assert_allclose(trace, traces[0], rtol=1e-5, atol=1e-6)
        for name, tensor in weights[0].items():
            torch.testing.assert_close(model[name], tensor, rtol=1e-5, atol=1e-6)
