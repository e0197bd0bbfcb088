"""Quantize a base while loading it, load one that was saved quantized, and get ordinary weights back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import nn

from distilpeft.data.model_files.quantized import Stored, packed_modules
from distilpeft.data.sources import Source, saved_modules
from distilpeft.errors import InputError

Quantize = Literal["nf4", "int8", "none"]


def quantization(
    quantize: Quantize, compute_dtype: torch.dtype = torch.float32, *, heads: list[str]
) -> transformers.BitsAndBytesConfig:
    """What transformers needs to know to quantize the linear layers of a model, but for the heads."""
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=heads,
    )


@dataclass(frozen=True)
class Packing:
    """How the weights of a base are quantized when it is loaded, or were before it was saved.

    Attributes:
        quantize: what the recipe asks for.
        stored: how the files have them, if they are quantized there.
        compute_dtype: in which 4-bit weights are multiplied.
        source: the base, maybe with an adapter.
    """

    quantize: Quantize
    stored: Stored | None
    compute_dtype: torch.dtype
    source: Source

    def __post_init__(self) -> None:
        """Refuse to quantize what is quantized already, in another way."""
        if self.stored is not None and self.quantize not in ("none", self.stored.form):
            raise InputError(
                f"teacher.quantize: {self.quantize}, but the weights of {self.source.title} were quantized with "
                f"{self.stored} before they were saved; write {self.stored.form or 'none'}"
            )

    @property
    def packs(self) -> bool:
        """Whether quantized weights are loaded."""
        return self.quantize != "none" or self.stored is not None

    def options(
        self, config: transformers.PretrainedConfig, heads: Sequence[str], device: torch.device
    ) -> dict[str, Any]:
        """What `from_pretrained` has to be given; weights that were saved quantized are described in `config` instead.

        Args:
            config: the model's own.
            heads: modules that stay in floating point; so do those that an adapter replaces.
            device: where quantized weights are made.
        """
        if not self.packs:
            return {}
        adapter = self.source.adapter
        kept = [*heads, *(saved_modules(adapter) if adapter is not None else ())]
        if self.stored is None:
            asked = quantization(self.quantize, self.compute_dtype, heads=kept)
            return {"quantization_config": asked, "device_map": {"": device}}
        holder: Any = config if getattr(config, "quantization_config", None) else config.get_text_config()
        settings: dict[str, Any] = dict(holder.quantization_config)
        holder.quantization_config = {**settings, **self._changes(settings, kept)}
        return {"device_map": {"": device}}

    def _changes(self, settings: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
        """What transformers has to know beyond the file: which modules bitsandbytes did not pack, or to unpack all."""
        assert self.stored is not None
        if self.stored.is_opened:
            return {"dequantize": True}
        if self.stored.form is None:
            return {}
        packed = packed_modules(self.source)
        new = [head for head in kept if not any(_is_within(name, head) for name in packed)]
        skipped = dict.fromkeys([*(settings.get("llm_int8_skip_modules") or ()), *new])
        dtype = str(self.compute_dtype).removeprefix("torch.")
        return {"bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": list(skipped)}

    def opened(
        self, model: transformers.PreTrainedModel, heads: Sequence[str], dtype: torch.dtype
    ) -> transformers.PreTrainedModel:
        """The loaded model, in floating point where the recipe asks for that, with heads that can be trained."""
        keep_trainable(model)
        if self.stored is None or self.stored.stays_packed:
            return model
        if self.stored.is_opened:
            unmark(model)
        elif self.quantize == "none":
            model = dequantize(model)
        else:
            _open_heads(model, heads, dtype)
            return model
        return model.to(dtype)


def _open_heads(model: nn.Module, heads: Sequence[str], dtype: torch.dtype) -> None:
    """Dequantize heads that bitsandbytes has packed; transformers by default leaves out a model's last parameter."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module.weight.is_floating_point():
            continue
        if any(name == head or name.startswith(f"{head}.") for head in heads):
            weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).to(dtype)
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(weight), module.bias
            model.set_submodule(name, plain)


def _is_within(name: str, head: str) -> bool:
    return f".{head}." in f".{name}."


def dequantize(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Turn a quantized base into an ordinary float32 model that computes with the very same weights."""
    if not getattr(model, "is_quantized", False):
        return model
    model = model.dequantize(dtype=torch.float32)
    unmark(model)
    return model


def unmark(model: transformers.PreTrainedModel) -> None:
    """Forget that the weights were once quantized; `save_pretrained` would refuse them, or look for a way back."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [one for one in conversions if not _unpacks(one)]


def _unpacks(conversion: Any) -> bool:
    """Whether a step of loading did nothing but unpack weights."""
    operations = list(getattr(conversion, "operations", None) or ())
    return bool(operations) and all(hasattr(operation, "hf_quantizer") for operation in operations)


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16 inference; they could not be trained after."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (mypy knows modules as tensors only)
