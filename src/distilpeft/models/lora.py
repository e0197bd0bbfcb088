"""Add, load and merge LoRA adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import peft
from torch import nn

from distilpeft.errors import InputError
from distilpeft.models.bases.quantized import dequantize
from distilpeft.models.loading import Architecture
from distilpeft.recipe.training import Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_lora(model: nn.Module, lora: Lora, architecture: Architecture, heads: list[str], key: str) -> PreTrainedModel:
    """Freeze the model, add a LoRA adapter, and train new heads in full beside it.

    Raises:
        InputError: `key`.target_modules names nothing in the model.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    names = "|".join(re.escape(name) for name in heads)
    config = peft.LoraConfig(
        task_type=architecture.peft_task,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=rf"(.*\.)?({names})(\..*)?" if heads and architecture.train_heads else None,
        modules_to_save=heads or None if architecture.train_heads else None,
    )
    tied = getattr(model.config, "tie_word_embeddings", False) and not architecture.train_heads
    if tied and not isinstance(targets, str) and any(target.rpartition(".")[2] in heads for target in targets):
        raise InputError(f"{key}.target_modules: the head is tied to the embeddings; an adapter would tune one of them")
    try:
        tuned = peft.get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"{key}.target_modules: {' '.join(str(error).split())[:300]}") from None
    for name, parameter in tuned.named_parameters():
        if ".modules_to_save." in name:
            assert parameter.is_floating_point(), f"{name} is quantized: a head must stay in floating point"
            assert parameter.requires_grad, f"{name} is frozen: a head without pretrained weights must be trained"
    return tuned


def load_adapter(model: nn.Module, folder: Path) -> PreTrainedModel:
    """Put a saved adapter (and its heads) on its base; everything is frozen."""
    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=False)


def merge(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Merge a saved adapter into its base, dequantizing the base first.

    Merging into 4-bit weights would round the sum to 4 bits again and give another model than the one that was
    tuned; merging into the dequantized weights is exact up to floating-point rounding.
    """
    return load_adapter(dequantize(base), adapter).merge_and_unload()
