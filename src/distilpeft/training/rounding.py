"""Training for an export's rounding: the forward pass computes with the numbers that the export will have.

Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877, section 3): weights stay float32, and are rounded on
their way into each product. The rounding's gradient is taken to be 1 (the straight-through estimator, Bengio et al.
2013, arXiv:1308.3432), so the weights learn to be worth the same after it.

What is rounded is what the export rounds:

- `onnx-int8` with `export.portable`, as `per channel` makes it: matrices of linear layers in 7 bits with a scale for
  each output, embeddings in 8 with one for the table, and what goes into linear layers in 8 with one for each row, as
  single rows are answered. Padding counts for nothing, so a row's loss does not depend on the rest of its batch;
- `onnx-int4`: matrices of linear layers in blocks of 32 weights with a scale in float32 each, embeddings in 8 bits. The
  output matrix of a language model, which its loss reads by itself, is left as it is;
- the blocks of GGUF: matrices inside layers, in blocks of 32 weights, each with a scale (and a minimum) in float16.

    O  outputs of a layer    I  inputs    B  rows    S  tokens    K  blocks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distilpeft.models.weights import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Found = TypeVar("Found")
Round = Callable[[Tensor], Tensor]
BLOCK = 32
"""Weights in a block of GGUF."""


def _through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The rounded numbers, with the gradient of the exact ones."""
    return exact + (rounded - exact).detach()


def by_output(weight_OI: Tensor) -> Tensor:
    """Integers from -64 to 64, with a scale for each output."""
    scale_O = weight_OI.detach().abs().amax(1, keepdim=True) / 64
    scale_O = torch.where(scale_O == 0, 1.0, scale_O)
    return _through(weight_OI, torch.round(weight_OI / scale_O) * scale_O)


def _affine(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of bytes for numbers between these, and 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, torch.round(-low / scale).clamp(0, 255)


def _by(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return _through(values, (torch.round(values / scale) + zero).clamp(0, 255).sub(zero) * scale)


def of_rows(inputs: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Bytes, with a scale for each row; [B, I] or [B, S, I], padding does not count."""
    counted = inputs.detach()
    if mask_BS is not None and inputs.shape[:-1] == mask_BS.shape:
        counted = counted * mask_BS.unsqueeze(-1).to(counted.dtype)
    flat = counted.flatten(1)
    shape = (-1, *[1] * (inputs.ndim - 1))
    scale, zero = _affine(flat.amin(1), flat.amax(1))
    return _by(inputs, scale.view(shape), zero.view(shape))


def _half(scales: Tensor) -> Tensor:
    return scales.to(torch.float16).float()


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1.0 / scales)


def signed_blocks(weight_OI: Tensor, bits: int) -> Tensor:
    """q4_0, q5_0: a block's largest weight, with its sign, becomes -2^(bits - 1)."""
    half = 2 ** (bits - 1)
    weight_K = weight_OI.detach().reshape(-1, BLOCK)
    largest_K = weight_K.gather(1, weight_K.abs().argmax(1, keepdim=True))
    scale_K = largest_K / -half
    levels = torch.trunc(weight_K * _inverse(scale_K) + half + 0.5).clamp(0, 2 * half - 1)
    return _through(weight_OI, ((levels - half) * _half(scale_K)).view_as(weight_OI))


def shifted_blocks(weight_OI: Tensor, bits: int) -> Tensor:
    """q4_1, q5_1: levels from a block's smallest weight to its largest."""
    most = 2**bits - 1
    weight_K = weight_OI.detach().reshape(-1, BLOCK)
    low_K, high_K = weight_K.amin(1, keepdim=True), weight_K.amax(1, keepdim=True)
    scale_K = (high_K - low_K) / most
    levels = torch.trunc((weight_K - low_K) * _inverse(scale_K) + 0.5).clamp(0, most)
    return _through(weight_OI, (levels * _half(scale_K) + _half(low_K)).view_as(weight_OI))


def byte_blocks(weight_OI: Tensor) -> Tensor:
    """q8_0: a block's largest weight becomes 127 or -127."""
    weight_K = weight_OI.detach().reshape(-1, BLOCK)
    scale_K = weight_K.abs().amax(1, keepdim=True) / 127
    scaled = weight_K * _inverse(scale_K)
    levels = torch.trunc(scaled + 0.5 * scaled.sign())  # half away from zero
    return _through(weight_OI, (levels * _half(scale_K)).view_as(weight_OI))


def four_bits(weight_OI: Tensor) -> Tensor:
    """MatMulNBits: as q4_0, with a scale in float32, to the nearest; the last block of a row may be shorter."""
    short = -weight_OI.shape[1] % BLOCK
    padded_OI = F.pad(weight_OI.detach(), (0, short))
    weight_OK = padded_OI.view(len(padded_OI), -1, BLOCK)
    largest_OK = weight_OK.gather(2, weight_OK.abs().argmax(2, keepdim=True))
    scale_OK = largest_OK / -8
    levels = (torch.round(weight_OK * _inverse(scale_OK)) + 8).clamp(0, 15)
    rounded_OI = ((levels - 8) * scale_OK).flatten(1)[:, : weight_OI.shape[1]]
    return _through(weight_OI, rounded_OI)


GGUF: dict[str, Round] = {
    "gguf-q8_0": byte_blocks,
    "gguf-q5_1": lambda weight: shifted_blocks(weight, 5),
    "gguf-q5_0": lambda weight: signed_blocks(weight, 5),
    "gguf-q4_1": lambda weight: shifted_blocks(weight, 4),
    "gguf-q4_0": lambda weight: signed_blocks(weight, 4),
}


@dataclass
class Rounding:
    """Whether the layers of a model round at the moment.

    Attributes:
        is_on: whether they do.
        mask_BS: which tokens of the current batch are no padding; None if all are.
        layers: those that can.
        hooks: on the model, which note the mask.
    """

    is_on: bool = False
    mask_BS: Tensor | None = None
    layers: list[nn.Module] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    def during(self, work: Callable[[nn.Module], Found]) -> Callable[[nn.Module], Found]:
        """The same work with all rounding on, so that what it finds is what the export will give."""

        def rounded(model: nn.Module) -> Found:
            before, self.is_on = self.is_on, True
            try:
                return work(model)
            finally:
                self.is_on = before

        return rounded

    def remove(self) -> None:
        """Make the layers plain ones again; their weights stay float32."""
        for layer in self.layers:
            layer.__class__ = type(layer).__mro__[1]
            for name in ("rounding", "round_weight", "round_input"):
                layer.__dict__.pop(name, None)
        for hook in self.hooks:
            hook.remove()


class RoundedLinear(nn.Linear):
    """A linear layer that rounds its weight and, where the export does, its input."""

    rounding: Rounding
    round_weight: Round
    round_input: bool

    def forward(self, inputs: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if not self.rounding.is_on:
            return super().forward(inputs)
        if self.round_input:
            inputs = of_rows(inputs, self.rounding.mask_BS)
        return F.linear(inputs, self.round_weight(self.weight), self.bias)


class RoundedEmbedding(nn.Embedding):
    """A table whose vectors are rounded by the range of all."""

    rounding: Rounding

    def forward(self, inputs: Tensor) -> Tensor:
        """As `nn.Embedding`."""
        found = super().forward(inputs)
        if not self.rounding.is_on:
            return found
        table = self.weight.detach()
        scale, zero = _affine(table.amin(), table.amax())
        return _by(found, scale, zero)


def attach(model: PreTrainedModel, form: str) -> Rounding:
    """Let a model's layers round as an export in this form will; off at first.

    Args:
        model: with all weights in float32, without an adapter.
        form: `onnx-int8`, `onnx-int4`, or a GGUF form of blocks.
    """
    rounding = Rounding()
    if form in GGUF:
        inside = [module for block in blocks(model) for module in block.modules()]
        for module in inside:
            if type(module) is nn.Linear and module.in_features % BLOCK == 0:
                _as_linear(module, rounding, GGUF[form], round_input=False)
        return rounding
    is_int8, head = form == "onnx-int8", model.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            _as_linear(module, rounding, by_output if is_int8 else four_bits, round_input=is_int8)
        elif type(module) is nn.Embedding:
            module.__class__ = RoundedEmbedding
            cast("RoundedEmbedding", module).rounding = rounding
            rounding.layers.append(module)

    def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        rounding.mask_BS = named.get("attention_mask")

    rounding.hooks += [module.register_forward_pre_hook(note, with_kwargs=True) for module in {model, model.base_model}]
    return rounding


def _as_linear(module: nn.Linear, rounding: Rounding, round_weight: Round, *, round_input: bool) -> None:
    module.__class__ = RoundedLinear
    rounded = cast("RoundedLinear", module)
    rounded.rounding, rounded.round_weight, rounded.round_input = rounding, round_weight, round_input
    rounding.layers.append(module)
