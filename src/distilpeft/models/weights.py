"""What a model's weights are: trainable ones, blocks, counts and bytes; how a new head starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from distilpeft.models.loading import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def start_head(model: PreTrainedModel, bias_C: NDArray[np.float64]) -> None:
    """Set the bias of the output layer, if it came without weights.

    Answers begin at what is usual in training instead of at 0. Without it the first steps only learn that, and where
    most answers are no they drown what tells texts apart (Lin et al. 2017, arXiv:1708.02002, section 3.3).
    """
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.bias" in model.fresh and module.out_features == len(bias_C)
    ]
    if layers:
        with torch.no_grad():
            layers[-1].bias.copy_(torch.as_tensor(bias_C))


def unfreeze(model: PreTrainedModel, architecture: Architecture) -> None:
    """Let training change all weights but those that the architecture itself keeps unchanged.

    Marian's sines and cosines of positions are parameters, for instance, and were never trained.
    """
    with torch.device("meta"):
        fresh = architecture.auto_class.from_config(model.config)
    fixed = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in fixed)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tuned(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, by name: the trainable parameters, and the running statistics of BatchNorms."""
    tensors: dict[str, Tensor] = dict(trainable(model))
    for prefix, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.track_running_stats:
            tensors |= {f"{prefix}.{name}": buffer for name, buffer in module.named_buffers(recurse=False)}
    return tensors


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the model's stacks, outermost stacks only."""
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) > 1 and stack not in inside:
            inside.update(stack.modules())
            layers += [block for block in stack if any(True for _ in block.parameters())]
    return layers


def num_parameters(model: nn.Module) -> int:
    """Number of weights; 4-bit weights are counted, not the bytes that hold them."""
    return sum(
        parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1) for parameter in model.parameters()
    )


def size_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they lie in memory, quantized ones packed, with their scales."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(t.numel() * t.element_size() for t in state.as_dict(packed=True).values())
    return total
