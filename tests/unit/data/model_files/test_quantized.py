"""Quantized checkpoints by their files alone: what they need, and how many weights are behind the packed ones."""

from __future__ import annotations

import importlib.util
import json
import struct

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from distilpeft.data.model_files.quantized import (
    PACKAGES,
    Stored,
    form_of,
    logical_shapes,
    packed_bytes,
    packed_modules,
    stored_form,
)
from distilpeft.data.sources import Source
from distilpeft.errors import InputError

BITS = {"F32": 4, "F16": 2, "U8": 1, "I8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1}


def quantized(**settings: object) -> dict[str, object]:
    return {"model_type": "llama", "quantization_config": settings}


@pytest.fixture
def checkpoint(tmp_path):
    """Function: a folder with a configuration and tensors: name → (type, shape) or bytes."""

    def make(config, tensors):
        header, content = {}, b""
        for name, (dtype, shape, *given) in tensors.items():
            size = BITS[dtype]
            for edge in shape:
                size *= edge
            blob = given[0] if given else bytes(size)
            offsets = [len(content), len(content) + len(blob)]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
            content += blob
        text = json.dumps(header).encode()
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)
        return Source(str(tmp_path), tmp_path)

    return make


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
        (quantized(quant_method="gptq", bits=4), Stored("gptq", 4)),
        (quantized(quant_method="awq", bits=4, version="gemm"), Stored("awq", 4)),
        (quantized(quant_method="awq", w_bit=4), Stored("awq", 4)),
        (quantized(quant_method="intel/auto-round", bits=4), Stored("auto-round", 4)),
        (quantized(quant_method="compressed-tensors"), Stored("compressed-tensors")),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, Stored("compressed-tensors")),
        ({"text_config": quantized(quant_method="fp8")}, Stored("fp8")),
        (
            quantized(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            Stored("bitsandbytes", 4, "nf4", "nf4"),
        ),
        (quantized(_load_in_4bit=True), Stored("bitsandbytes", 4, "nf4", "fp4")),
        (quantized(quant_method="bitsandbytes", load_in_8bit=True), Stored("bitsandbytes", 8, "int8", "int8")),
        (quantized(bits=3), Stored("an unknown method", 3)),
    ],
    ids=["none", "null", "empty", "gptq", "awq", "old awq", "auto-round", "compressed", "old compressed", "nested",
         "nf4", "fp4 by its default", "int8", "no method"],
)  # fmt: skip
def test_the_method_is_read_from_the_configuration(config, expected):
    assert form_of(config) == expected


@pytest.mark.parametrize("method", PACKAGES)
def test_a_missing_package_is_named_as_pip_knows_it(method, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    fault = Stored(method).fault()
    assert fault is None or fault.endswith("pip install " + " ".join(pip for _, pip in PACKAGES[method]))
    assert (fault is None) == (not PACKAGES[method])


@pytest.mark.parametrize("method", PACKAGES)
def test_with_its_packages_a_method_can_be_loaded(method, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert Stored(method).fault() is None


def test_a_package_inside_one_that_is_missing_is_missing():
    assert "pip install optimum-quanto" in Stored("quanto").fault()


def test_a_method_that_transformers_does_not_know_is_refused():
    """It would load such weights as if they were plain, with a warning."""
    assert Stored("exl2").fault() == "its weights are quantized with exl2, which transformers does not load"
    assert Stored("nvfp4").fault() is not None, "transformers does not load saved ones yet"


def test_every_method_of_transformers_is_known_here():
    """A new version of transformers may bring others; what is left out it does not load from files."""
    theirs = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    assert theirs - set(PACKAGES) <= {"gguf", "nvfp4"}


STATE = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [16, 8]}).encode()
PACKED = {
    "nf4": (
        quantized(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        {
            "q_proj.weight": ("U8", (64, 1)), "q_proj.weight.absmax": ("F32", (2,)),
            "q_proj.weight.quant_map": ("F32", (16,)),
            "q_proj.weight.quant_state.bitsandbytes__nf4": ("U8", (len(STATE),), STATE),
        },
    ),
    "int8": (
        quantized(quant_method="bitsandbytes", load_in_8bit=True),
        {"q_proj.weight": ("I8", (16, 8)), "q_proj.SCB": ("F32", (16,)), "q_proj.weight_format": ("U8", ())},
    ),
    "gptq": (
        quantized(quant_method="gptq", bits=4),
        {
            "q_proj.qweight": ("I32", (1, 16)), "q_proj.qzeros": ("I32", (1, 2)), "q_proj.scales": ("F16", (1, 16)),
            "q_proj.g_idx": ("I32", (8,)),
        },
    ),
    "gptq in 8 bits": (
        quantized(quant_method="gptq", bits=8),
        {"q_proj.qweight": ("I32", (2, 16)), "q_proj.qzeros": ("I32", (1, 4)), "q_proj.scales": ("F16", (1, 16))},
    ),
    "awq": (
        quantized(quant_method="awq", bits=4),
        {"q_proj.qweight": ("I32", (8, 2)), "q_proj.qzeros": ("I32", (1, 2)), "q_proj.scales": ("F16", (1, 16))},
    ),
    "compressed": (
        quantized(quant_method="compressed-tensors"),
        {
            "q_proj.weight_packed": ("I32", (16, 1)), "q_proj.weight_scale": ("F16", (16, 1)),
            "q_proj.weight_shape": ("I64", (2,), struct.pack("<qq", 16, 8)),
        },
    ),
    "fp8": (
        quantized(quant_method="fp8"),
        {"q_proj.weight": ("F8_E4M3", (16, 8)), "q_proj.weight_scale_inv": ("F32", (1, 1))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_counted_one_by_one(checkpoint, kind):
    config, tensors = PACKED[kind]
    plain = {"embed_tokens.weight": ("F32", (20, 8)), "norm.weight": ("F32", (8,)), "q_proj.bias": ("F32", (16,))}
    source = checkpoint(config, {**tensors, **plain})
    assert logical_shapes(source) == {
        "q_proj.weight": (16, 8), "embed_tokens.weight": (20, 8), "norm.weight": (8,), "q_proj.bias": (16,)
    }  # fmt: skip


def test_bytes_of_packed_weights_are_those_of_the_file_where_they_stay_packed(checkpoint):
    config, tensors = PACKED["awq"]
    source = checkpoint(config, {**tensors, "norm.weight": ("F32", (8,))})
    assert packed_bytes(source) == (8 * 2 * 4 + 2 * 4 + 16 * 2) / (16 * 8)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8", "compressed"])
def test_other_forms_are_counted_by_the_recipe(checkpoint, kind):
    assert packed_bytes(checkpoint(*PACKED[kind])) is None


def test_a_plain_checkpoint_is_what_its_header_says(checkpoint):
    source = checkpoint({"model_type": "llama"}, {"a.scales": ("F32", (3, 4))})
    assert stored_form(source) is None
    assert logical_shapes(source) == {"a.scales": (3, 4)}


def test_modules_that_bitsandbytes_has_packed_are_named(checkpoint):
    assert packed_modules(checkpoint(*PACKED["nf4"])) == {"q_proj"}
    assert packed_modules(checkpoint(*PACKED["int8"])) == {"q_proj"}


def test_damaged_4_bit_weights_are_named(checkpoint):
    config, tensors = PACKED["nf4"]
    state = "q_proj.weight.quant_state.bitsandbytes__nf4"
    source = checkpoint(config, {**tensors, state: ("U8", (3,), b"abc")})
    with pytest.raises(InputError, match=r"model\.safetensors: not readable 4-bit weights; fetch the model again"):
        logical_shapes(source)
