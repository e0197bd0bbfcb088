"""The CUDA paths on a tiny model; skipped without a device. Run them with: pytest -m gpu tests/gpu."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import commands
from torch import nn
from torch.nn import functional as F

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

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


def test_a_language_model_is_distilled_on_the_gpu(tmp_path):
    from pipeline import test_language

    recipe = test_language.workspace(tmp_path, **test_language.QUICK, teacher__fit__precision="auto")
    assert commands.run(recipe) == 0
    models = test_language.scores(test_language.report_of(recipe))
    assert models["student"]["against_teacher"]["kl"] < models["untrained"]["against_teacher"]["kl"]


def test_the_fused_loss_is_the_eager_one_in_bf16_and_takes_a_fraction_of_its_memory():
    from distilpeft.distillation.fused import Head, linear_distil_sum
    from distilpeft.distillation.losses import Loss

    torch.manual_seed(0)
    rows, hidden, vocabulary = 4096, 512, 64_000
    options = {"device": "cuda", "dtype": torch.bfloat16}
    head, known = (nn.Linear(hidden, vocabulary, bias=False, **options) for _ in range(2))
    states, soft = (torch.randn(rows, hidden, **options) for _ in range(2))
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    figures = {}
    for name in ("eager", "fused"):
        leaf = states.clone().requires_grad_()
        head.weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        if name == "eager":
            q = head(leaf).float()
            with torch.no_grad():
                p = known(soft).float()
            kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)
            loss = 0.5 * kl + 0.5 * F.cross_entropy(q, labels, reduction="sum")
            del q, p, kl
        else:
            loss = linear_distil_sum(leaf, Head(head), labels, (soft, Head(known.requires_grad_(False))), Loss(0.5))
        loss.backward()
        peak = torch.cuda.max_memory_allocated() - base
        figures[name] = loss.item(), leaf.grad.float(), head.weight.grad.float(), peak
    eager, fused = figures["eager"], figures["fused"]
    assert fused[0] == pytest.approx(eager[0], rel=1e-3)
    for one, two in zip(fused[1:3], eager[1:3], strict=True):
        assert (one - two).norm() / two.norm() < 2e-2
    assert fused[3] < 0.35 * eager[3]


def test_the_proof_of_split_invariance_holds_on_this_gpu():
    from rich.console import Console

    from distilpeft.training import selftest

    assert selftest.run([1], Console(quiet=True))


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_student_learns_in_other_precisions(tmp_path, precision):
    recipe = commands.workspace(tmp_path, distil__fit__precision=precision)
    assert commands.run(recipe) == 0
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    scores = {model["role"]: model["scores"]["accuracy"]["value"] for model in report["models"]}
    assert scores["student"] > 0.9
    assert report["training"]["student"]["precision"] == precision


def test_an_offloaded_teacher_gives_the_targets_of_one_on_the_gpu_and_leaves_its_memory():
    from distilpeft.machine.runtime import Runtime
    from distilpeft.models import parallel, weights

    torch.manual_seed(0)
    runtime = Runtime()
    config = transformers.Qwen2Config(
        vocab_size=1000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=2048,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval().requires_grad_(False)
    ids = torch.arange(64, device="cuda").reshape(2, 32)
    with torch.no_grad():
        expected = model.to("cuda")(ids).logits.clone()
        model.to("cpu")
        base = torch.cuda.memory_allocated()
        parallel.offload_layers(runtime, model)
        torch.cuda.reset_peak_memory_stats()
        assert torch.equal(model(ids).logits, expected)
    layer = sum(weight.nbytes for weight in weights.blocks(model)[0].parameters())
    rest = torch.cuda.memory_allocated() - base
    assert torch.cuda.max_memory_allocated() - base < rest + 2 * layer


def test_fsdp2_of_one_process_trains_as_one_process_does(tmp_path):
    """NCCL and `fully_shard` on a device: the student of DDP."""
    weights = {}
    for name, settings in {"plain": [], "fsdp2": ["parallel=fsdp2"]}.items():
        folder = tmp_path / name
        folder.mkdir()
        fits = {"distil__fit__precision": "fp32", "teacher__fit__precision": "fp32", "targets__precision": "fp32"}
        recipe = commands.workspace(folder, **fits)
        given = ["--until", "distil", *(part for one in settings for part in ("--set", one))]
        done = commands.joined(recipe, 1, *given)
        assert [one.returncode for one in done] == [0]
        made = make_plan(load_recipe(recipe, tuple(settings)), folder / "runs").artifacts["distil/student"]
        assert made.manifest()["figures"]["parallel"] == ("fsdp2" if settings else "ddp")
        weights[name] = load_file(made.path / "model" / "model.safetensors")
    assert weights["plain"].keys() == weights["fsdp2"].keys()
    for name, tensor in weights["plain"].items():
        torch.testing.assert_close(weights["fsdp2"][name], tensor, rtol=1e-4, atol=1e-5)
