"""A finished head, put into the order of the recipe's classes: rows of its output layer change places, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from distilpeft.data.model_files.heads import Head
from distilpeft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADVICE = "list task.labels in the order of its own classes"


def settle(model: PreTrainedModel, heads: list[str], head: Head, fresh: set[str], name: str) -> set[str]:
    """Give the output layer the order of the recipe's classes, or new weights if it answers other classes.

    Args:
        model: the loaded model, or one with an adapter.
        heads: its head modules.
        head: its own classes, compared with the recipe's.
        fresh: parameters that came without weights.
        name: of the model, for messages.

    Returns:
        Parameters that came without weights, or have new ones now.

    Raises:
        InputError: rows have to change places, and no one layer gives the answers.
    """
    if not (head.moved or head.verdict == "other"):
        return fresh
    own = getattr(model, "get_base_model", lambda: model)()
    path, layer = _output_layer(own, heads, len(head.order or head.names))
    if layer is None and head.moved:
        raise InputError(f"{name}: the classes of its head are in another order, which cannot be changed; {ADVICE}")
    if layer is None or f"{path}.weight" in fresh:
        return fresh
    if head.moved:
        _reorder(layer, head.order)
        return fresh
    new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    own._init_weights(new)
    own.set_submodule(path, new.to(layer.weight.device, layer.weight.dtype))
    return fresh | {f"{path}.{part}" for part, _ in new.named_parameters()}


def _reorder(layer: nn.Linear, order: tuple[int, ...]) -> None:
    rows = torch.tensor(order, device=layer.weight.device)
    with torch.no_grad():
        layer.weight.copy_(layer.weight[rows])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[rows])


def _output_layer(model: nn.Module, heads: list[str], count: int) -> tuple[str, nn.Linear | None]:
    """The path of the linear layer that gives the answers, and the layer; None if that is not plain."""
    candidates = []
    for head in dict.fromkeys(heads):  # PEFT adds to this list, also names that the model does not have
        layers = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == count and f"{path}.".startswith(f"{head}.")
        ]
        # The layer that answers comes after a dense one of the same width, an adapter's copy after the base's.
        candidates += layers[-1:]
    if len(candidates) != 1:
        return "", None
    path, layer = candidates[0]
    return (path, layer) if layer.weight.is_floating_point() and "lora_" not in path else ("", None)
