"""BatchNorm in training, where the rows of a batch are spread over processes and micro-batches.

A BatchNorm makes every row's output depend on the other rows of its micro-batch, so it is the one layer whose result
depends on the split. `sync` takes statistics over the micro-batches of all processes together: N processes with
micro-batches of M rows then equal one process with N * M. torch's own SyncBatchNorm runs on GPUs only, and knows no
process that has no row.

    B  rows    C  channels    ...  positions
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from distilpeft.errors import InputError
from distilpeft.machine.runtime import Runtime

Kind = Literal["sync", "frozen", "local"]


class FrozenBatchNorm(_BatchNorm):
    """The pretrained statistics, in training as well; weight and bias may be trained."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalised [B, C, ...]."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class SyncBatchNorm(_BatchNorm):
    """Statistics over the rows of all processes; one that is `idle` gives none."""

    idle = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalised [B, C, ...]; in training all processes call it together."""
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        axes = [dim for dim in range(wide.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(wide.ndim)]
        share = 0.0 if self.idle else 1.0
        count = wide.new_tensor([wide.numel() / wide.shape[1]])
        sums: Tensor = _Sum.apply(share * torch.cat([wide.sum(axes), count]))  # type: ignore[no-untyped-call]
        num = sums[-1].detach()
        deviation = wide - (mean_C := sums[:-1] / num).view(shape)
        squares: Tensor = _Sum.apply(share * deviation.square().sum(axes))  # type: ignore[no-untyped-call]
        self._track(mean_C.detach(), squares.detach() / (num - 1).clamp(min=1))
        output = deviation * torch.rsqrt(squares / num + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    def _track(self, mean_C: Tensor, variance_C: Tensor) -> None:
        """Move the running statistics, as torch does: the variance unbiased, no momentum = the mean of all batches."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        with torch.no_grad():
            self.num_batches_tracked += 1
            weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), weight)
            self.running_var.lerp_(variance_C.to(self.running_var.dtype), weight)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, share: Tensor) -> Tensor:
        del ctx
        total = share.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def convert(runtime: Runtime, model: nn.Module, kind: Kind) -> None:
    """Make the model's BatchNorms, if there are any, behave as `fit.batch_norm` says.

    Those that are not trained keep their statistics, whatever it says: an adapter would be saved without them.

    Raises:
        InputError: `local` with shards: nothing would make the statistics of all processes one.
    """
    several = dist.is_initialized()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, _BatchNorm) or not layer.track_running_stats:
                continue
            trained = any(parameter.requires_grad for parameter in layer.parameters()) or not layer.affine
            if kind == "frozen" or not trained:
                setattr(parent, name, _as(FrozenBatchNorm, layer))
            elif kind == "sync" and several:
                setattr(parent, name, _as(SyncBatchNorm, layer))
            elif several and runtime.parallel == "fsdp2":
                raise InputError("fit.batch_norm: local is for parallel: ddp; use sync or frozen with fsdp2")


def _as(layer_type: type[_BatchNorm], layer: _BatchNorm) -> _BatchNorm:
    """The same parameters and statistics in a layer of another class."""
    new = layer_type(layer.num_features, layer.eps, layer.momentum, layer.affine, device="meta")
    new.weight, new.bias = layer.weight, layer.bias
    new.running_mean, new.running_var = layer.running_mean, layer.running_var
    new.num_batches_tracked = layer.num_batches_tracked
    return new.train(layer.training)


@contextmanager
def idle(model: nn.Module) -> Iterator[None]:
    """Leave the rows of this process out of all statistics: they stand in for none."""
    layers = [layer for layer in model.modules() if isinstance(layer, SyncBatchNorm)]
    for layer in layers:
        layer.idle = True
    try:
        yield
    finally:
        for layer in layers:
            layer.idle = False


class Statistics:
    """What BatchNorms that are in training have seen so far, to be put back after a step that does not count."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        moving = [layer for layer in layers if not isinstance(layer, FrozenBatchNorm)]
        self._copies = [(buffer, buffer.clone()) for layer in moving for buffer in layer.buffers()]

    @property
    def are_trained(self) -> bool:
        """Whether there are any."""
        return bool(self._copies)

    def restore(self) -> None:
        """Put them back."""
        with torch.no_grad():
            for buffer, before in self._copies:
                buffer.copy_(before)
