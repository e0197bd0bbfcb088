"""Keep some of a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from distilpeft.errors import InputError
from distilpeft.recipe.student import FromTeacher

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def keep_layers(model: PreTrainedModel, chosen: FromTeacher) -> None:
    """Keep only some transformer layers of a model, in place, and correct its configuration.

    Raises:
        InputError: the recipe names layers that are not there, or that cannot be taken out.
    """
    if not model.config.is_encoder_decoder:
        depth = getattr(model.config, "num_hidden_layers", None)
        if depth is None:
            raise InputError(
                f"student.from_teacher: {type(model).__name__} is not a stack of layers; use student.model or "
                "student.from_config"
            )
        _keep(model, chosen.of(depth), model.config, ("num_hidden_layers",))
        return
    nested = hasattr(model.config, "encoder")  # EncoderDecoderModel keeps a configuration for each
    for side, key in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        config = getattr(model.config, side) if nested else model.config
        keys = ("num_hidden_layers",) if nested else (f"{side}_layers", key)
        names = [name for name in keys if name in config.to_dict()]
        depth = getattr(config, names[0])
        _keep(getattr(model, f"get_{side}")(), chosen.of(depth, side=side), config, names)


def _keep(model: PreTrainedModel, layers: tuple[int, ...], config: PretrainedConfig, names: Sequence[str]) -> None:
    """Keep these layers of one stack; `names` are those under which the configuration keeps their number."""
    key, settings, depth = "student.from_teacher", config.to_dict(), getattr(config, names[0])
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(stacks) != 1:
        raise InputError(f"{key}: {type(model).__name__} has {len(stacks)} stacks of {depth} layers; use student.model")
    name, stack = stacks[0]
    if layers[0] > 0 and any("relative_attention_bias" in part for part, _ in stack[0].named_parameters()):
        raise InputError(f"{key}: layer 0 of {type(model).__name__} holds the positions of all layers; keep it")
    parent, _, child = name.rpartition(".")
    kept = nn.ModuleList(stack[i] for i in layers)
    setattr(model.get_submodule(parent), child, kept)
    _number(kept)
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == depth:  # layer_types, no_rope_layers, ...: one entry per layer
            setattr(config, name, [value[i] for i in layers])
    for name in names:
        setattr(config, name, len(layers))


def _number(layers: nn.ModuleList) -> None:
    """Tell layers their new places, by which they find their part of a cache."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 (mypy knows modules as tensors only)
