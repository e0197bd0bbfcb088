"""Checkpoints that were quantized before they were saved: as they are, dequantized, tuned, merged and saved again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support import commands, tiny, tiny_lm
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from distilpeft.data.sources import Source
from distilpeft.errors import InputError
from distilpeft.models import loading, lora, weights
from distilpeft.models.bases.quantized import quantization
from distilpeft.models.loading import Architecture
from distilpeft.recipe.training import Lora

NAMES = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
CLASSES = Architecture("AutoModelForSequenceClassification", "SEQ_CLS", {"num_labels": 2, **NAMES}, train_heads=True)
TEXT = Architecture("AutoModelForCausalLM", "CAUSAL_LM", {}, train_heads=False)
CPU, LORA = torch.device("cpu"), Lora(rank=4, alpha=8)
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def save_packed(model: transformers.PreTrainedModel, folder: Path, kind: str, **more: object) -> Path:
    """The model as bitsandbytes' users save it, below `folder`, beside the plain one."""
    model.save_pretrained(str(folder / "plain"))
    settings = transformers.BitsAndBytesConfig(**SETTINGS[kind], **more)
    packed = type(model).from_pretrained(str(folder / "plain"), quantization_config=settings, device_map={"": "cpu"})
    packed.save_pretrained(str(folder / "packed"))
    return folder / "packed"


def load(folder: Path, architecture: Architecture, quantize: str, heads: list[str] | None = None):
    torch.manual_seed(0)
    return loading.load_base(
        Source(str(folder), folder),
        architecture,
        quantize=quantize,
        dtype="fp32",
        device=CPU,
        pad_token_id=0,
        heads=heads,
    )


def answers(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 21).unsqueeze(0)).logits.float()


@pytest.mark.parametrize("form", ["unchanged", "dequantized"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_saved_weights_are_tuned_merged_and_saved_as_plain_ones(tmp_path, kind, form):
    """transformers itself has no way back from dequantized weights to files (its #44983)."""
    packed = save_packed(tiny.classifier(), tmp_path, kind)
    quantize = "none" if form == "dequantized" else "int8" if kind == "int8" else "nf4"
    model, heads = load(packed, CLASSES, quantize)
    plain, _ = load(tmp_path / "plain", CLASSES, "none")
    assert (answers(model) - answers(plain)).abs().max() < 0.5 * answers(plain).abs().max()
    assert getattr(model, "is_quantized", False) == (form == "unchanged")
    assert weights.num_parameters(model) == weights.num_parameters(plain)
    tuned = lora.add_lora(model, LORA, CLASSES, heads, "teacher.lora")
    for name, parameter in weights.trainable(tuned).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    merged = lora.merge(load(packed, CLASSES, quantize, heads)[0], tmp_path / "adapter")
    merged.save_pretrained(str(tmp_path / "merged"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged"))
    assert torch.equal(answers(again), answers(merged))
    assert not hasattr(again.config, "quantization_config")
    assert (answers(merged) - answers(tuned)).abs().max() < (0.05 if kind == "int8" else 2e-5)


@pytest.mark.parametrize("skipped", [None, ["lm_head"]], ids=["by default", "by name"])
def test_a_packed_language_model_gets_a_head_that_can_be_trained(tmp_path, skipped):
    """Trap 29: the skip list of the file does not know the new head."""
    packed = save_packed(tiny_lm.model(), tmp_path, "nf4", llm_int8_skip_modules=skipped)
    model, heads = load(packed, CLASSES, "nf4")
    assert model.score.weight.is_floating_point()
    assert not model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    tuned = lora.add_lora(model, LORA, CLASSES, heads, "teacher.lora")
    assert any("score.modules_to_save" in name for name in weights.trainable(tuned))


def test_a_head_that_is_packed_in_the_file_is_opened(tmp_path):
    """transformers leaves out the last parameter, which is a bias here, so the matrix before it is packed."""
    model = tiny.classifier(**NAMES)
    model.config.id2label, model.config.label2id = {0: "good", 1: "bad"}, {"good": 0, "bad": 1}
    packed = save_packed(model, tmp_path, "nf4")
    assert "classifier.weight.absmax" in loading_names(packed)
    loaded, _ = load(packed, CLASSES, "nf4")
    assert loaded.classifier.weight.is_floating_point()
    straight = transformers.AutoModelForSequenceClassification.from_pretrained(str(packed), device_map={"": "cpu"})
    torch.testing.assert_close(answers(loaded), answers(straight).flip(-1), atol=1e-5, rtol=1e-4)


def loading_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_language_model_is_used_as_it_is_and_its_text_is_the_same(tmp_path):
    packed = save_packed(tiny_lm.model(), tmp_path, "nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(packed), device_map={"": "cpu"})
    assert torch.equal(answers(load(packed, TEXT, "nf4")[0]), answers(theirs))


def test_our_own_4_bit_export_is_such_a_checkpoint(tmp_path):
    model = tiny.classifier(**NAMES)
    model.save_pretrained(str(tmp_path / "plain"))
    transformers.AutoModelForSequenceClassification.from_pretrained(
        str(tmp_path / "plain"), quantization_config=quantization("nf4", heads=["classifier"]), device_map={"": "cpu"}
    ).save_pretrained(str(tmp_path / "packed"))
    loaded, _ = load(tmp_path / "packed", CLASSES, "nf4")
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_another_quantization_than_the_files_is_refused_with_both(tmp_path):
    packed = save_packed(tiny.classifier(), tmp_path, "nf4")
    message = (
        r"teacher\.quantize: int8, but the weights of .* were quantized with bitsandbytes nf4 before .*; write nf4"
    )
    with pytest.raises(InputError, match=message):
        load(packed, CLASSES, "int8")


def save_fp8(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """A model with a scale for each matrix, as fine-grained fp8 has one for each block."""
    model.save_pretrained(str(folder))
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("proj.weight"):
            scale = tensor.abs().max() / 448
            state[name], state[f"{name}_scale_inv"] = (tensor / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)
        elif name != "lm_head.weight":  # tied
            state[name] = tensor.clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_fp8_weights_are_plain_ones_once_they_are_loaded(tmp_path):
    model = tiny_lm.model()
    folder = save_fp8(model, tmp_path / "fp8")
    loaded, _ = load(folder, TEXT, "none")
    assert loaded.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    assert not loaded.is_quantized
    assert (answers(loaded) - answers(model)).abs().max() < 0.1
    loaded.save_pretrained(str(tmp_path / "plain"))
    assert torch.equal(answers(load(tmp_path / "plain", TEXT, "none")[0]), answers(loaded))


class Packed(HfQuantizer):
    """A method that keeps weights as the files have them, from a library that is installed."""

    requires_calibration = True
    trainable = True

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.trainable


def test_a_method_that_stays_packed_is_loaded_by_its_library_and_never_opened(tmp_path, monkeypatch):
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitnet", Packed)
    save_bitnet(tmp_path)
    loaded, heads = load(tmp_path, CLASSES, "none")
    assert loaded.is_quantized
    assert torch.equal(answers(loaded), answers(tiny.classifier()))
    tuned = lora.add_lora(loaded, LORA, CLASSES, heads, "teacher.lora")
    assert any("lora_A" in name for name in weights.trainable(tuned))
    with pytest.raises(InputError, match=r"teacher\.quantize: nf4, but .* were quantized with bitnet .*; write none"):
        load(tmp_path, CLASSES, "nf4")


def save_bitnet(folder: Path) -> None:
    """A classifier that says of itself that it is quantized by a method without a library of its own."""
    tiny.classifier().save_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitnet"}}))


def test_a_method_without_gradients_is_refused_before_anything_is_tuned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Packed, "trainable", False)
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitnet", Packed)
    save_bitnet(tmp_path / "packed")
    tiny.tokenizer().save_pretrained(str(tmp_path / "packed"))
    changes = {"teacher__model": str(tmp_path / "packed"), "teacher__quantize": None}
    recipe = commands.workspace(tmp_path, 40, **changes, student={"model": str(tmp_path / "base")})
    assert commands.run(recipe, "--until", "teacher") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"error: teacher.fit: the weights of {tmp_path / 'packed'} are quantized with bitnet, on which nothing can be "
        "tuned; use the teacher unchanged (fit: null)"
    )


def test_a_student_from_the_configuration_of_a_quantized_model_is_plain(tmp_path):
    save_bitnet(tmp_path)
    model = loading.from_config(Source(str(tmp_path), tmp_path), CLASSES, {}, 0)
    model.save_pretrained(str(tmp_path / "student"))
    assert "quantization_config" not in json.loads((tmp_path / "student" / "config.json").read_text())


def test_a_library_that_cannot_load_here_is_one_line(tmp_path, monkeypatch):
    def no_gpu(*_: object, **__: object) -> None:
        raise RuntimeError("GPU is required to run quantize model.")

    monkeypatch.setattr(Packed, "validate_environment", no_gpu)
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitnet", Packed)
    save_bitnet(tmp_path)
    with pytest.raises(InputError, match=r"cannot load the model: GPU is required to run quantize model"):
        load(tmp_path, CLASSES, "none")
