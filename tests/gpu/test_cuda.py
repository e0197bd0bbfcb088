"""The CUDA paths on a tiny model; skipped without a device. Run them with: pytest -m gpu tests/gpu."""

from __future__ import annotations

import json

import commands
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_the_whole_chain_runs_on_the_gpu_in_bf16(tmp_path, quantize):
    fits = {"teacher__fit__precision": "auto", "distil__fit__precision": "auto", "targets__precision": "auto"}
    recipe = commands.workspace(tmp_path, teacher__quantize=quantize, **fits)
    assert commands.run(recipe) == 0
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    scores = {model["role"]: model["scores"]["accuracy"]["value"] for model in report["models"]}
    assert scores["teacher"] > 0.9
    assert scores["student"] > 0.9
    assert report["training"]["teacher"]["precision"] == "bf16"
    assert report["environment"]["device"] == torch.cuda.get_device_name()
