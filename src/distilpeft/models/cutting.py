"""Cut a student out of a teacher: keep some layers, and the strongest feed-forward units of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distilpeft.errors import InputError
from distilpeft.models.weights import blocks
from distilpeft.recipe.student import FromTeacher

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def keep_layers(model: PreTrainedModel, chosen: FromTeacher) -> None:
    """Keep only some transformer layers of a model, in place, and correct its configuration.

    Raises:
        InputError: the recipe names layers that are not there, or that cannot be taken out.
    """
    if chosen.ffn is not None:
        narrow(model, chosen.ffn)
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


FFN = ("intermediate_size", "hidden_dim")
"""What configurations call the width of the feed-forward part."""


def narrow(model: PreTrainedModel, width: int) -> None:
    """Keep only the most important units inside each feed-forward part, in place, and correct the configuration.

    A unit's importance is the product of the lengths of its weights, those into it (and of its gate) and those out of
    it: the most that it can add, up to its activation. What is left computes exactly what the whole would with the
    other units silent.

    Raises:
        InputError: there are fewer units, or the feed-forward parts are not two or three linear layers of that width.
    """
    config, key = model.config, "student.from_teacher.ffn"
    name = next((name for name in FFN if hasattr(config, name)), "")
    old = getattr(config, name, 0)
    if width > old:
        raise InputError(f"{key}: {width} are more than there are; {type(model).__name__} has {old or 'no known'}")
    for block in blocks(model):
        layers = {path: fc for path, fc in block.named_modules() if isinstance(fc, nn.Linear)}
        into = {path: fc for path, fc in layers.items() if fc.out_features == old and fc.in_features != old}
        out = {path: fc for path, fc in layers.items() if fc.in_features == old and fc.out_features != old}
        if not (len(out) == 1 and 1 <= len(into) <= 2):
            raise InputError(f"{key}: the feed-forward part of {type(block).__name__} is not made of such layers")
        lengths = [fc.weight.norm(dim=1) for fc in into.values()] + [fc.weight.norm(dim=0) for fc in out.values()]
        kept = torch.stack(lengths).log().sum(0).topk(width).indices.sort().values
        for path, fc in into.items():
            bias = getattr(fc, "bias", None)
            block.set_submodule(path, _linear(fc.weight[kept], None if bias is None else bias[kept]))
        for path, fc in out.items():
            block.set_submodule(path, _linear(fc.weight[:, kept], fc.bias))
    setattr(config, name, width)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    copy = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        copy.weight.copy_(weight)
        if bias is not None:
            copy.bias.copy_(bias)
    return copy


def _number(layers: nn.ModuleList) -> None:
    """Tell layers their new places, by which they find their part of a cache."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 (mypy knows modules as tensors only)
