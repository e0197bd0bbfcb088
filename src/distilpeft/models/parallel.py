"""How a model in training is spread over processes: complete in each (DDP), or in shards over all (FSDP2).

Either way one module is wrapped, `Step`, whose forward calls a function of the model inside. So whatever weights the
function uses, the head's in the fused loss as well, are gathered before and their gradients reduced after, tied ones
once. Both strategies average gradients over processes.

FSDP2 is torch's own `fully_shard` here, on CPUs and GPUs alike: Accelerate leaves it out on CPUs without a word, and
its mapping of sharded parameters loses tied embeddings. Where an `accelerate` configuration asks for FSDP2, its
plugin's options are taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distilpeft.machine.runtime import Runtime
from distilpeft.models.weights import blocks, tuned

Kind = Literal["one process", "ddp", "fsdp2"]


class Step(nn.Module):
    """What is wrapped for several processes: any function of the model, as one forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(model, *arguments)` returns."""
        return function(self.model, *arguments)


def wrap(runtime: Runtime, model: nn.Module) -> nn.Module:
    """The model inside a `Step` that reduces gradients over all processes, if there are several.

    Optimizers have to be made after it: shards are other parameters than the whole. Quantized models are never in
    shards: their weights are no use without the scales, which `fully_shard` does not know.
    """
    step = Step(model)
    if not dist.is_initialized():
        return step
    if runtime.parallel == "fsdp2" and not getattr(model, "is_quantized", False):
        shard(runtime, step)
        return step
    wrapped: nn.Module = runtime.accelerator.prepare_model(step)
    return wrapped


def shard(runtime: Runtime, step: Step) -> None:
    """Give every process a share of every parameter, in place; each block is gathered when it is used."""
    mesh = init_device_mesh(runtime.device.type, (runtime.accelerator.num_processes,))
    options = {"mesh": mesh, **runtime.fsdp_options()}
    for block in blocks(step.model):
        fully_shard(block, **options)
    fully_shard(step, **options)


def shard_layers(runtime: Runtime, model: nn.Module) -> None:
    """Spread a frozen model's layers over all processes; what is in no layer stays whole, on the device.

    Each layer is gathered when it is used, and dropped after: all processes have to use it together.
    """
    if not dist.is_initialized():
        model.to(runtime.device)
        return
    layers = blocks(model)
    for layer in layers:
        fully_shard(layer, mesh=init_device_mesh(runtime.device.type, (runtime.accelerator.num_processes,)))
    _keep_the_rest(model, layers, runtime.device)


def offload_layers(runtime: Runtime, model: nn.Module) -> None:
    """Keep a frozen model's layers in main memory; each comes to the device when it is used, and goes back."""
    layers = blocks(model)
    for layer in layers:
        layer.to("cpu")
        layer.register_forward_pre_hook(lambda used, _: _move(used, runtime.device))
        layer.register_forward_hook(lambda used, _, __: _move(used, torch.device("cpu")))
    _keep_the_rest(model, layers, runtime.device)


def _move(layer: nn.Module, device: torch.device) -> None:
    layer.to(device)


def _keep_the_rest(model: nn.Module, layers: list[nn.Module], device: torch.device) -> None:
    """Move what is in no layer (embeddings, norms, heads) to the device."""
    inside = {id(tensor) for layer in layers for tensor in [*layer.parameters(), *layer.buffers()]}
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if id(tensor) not in inside:
                tensor.data = tensor.data.to(device)


def kind(wrapped: nn.Module) -> Kind:
    """Which strategy is really in use."""
    if isinstance(wrapped, DistributedDataParallel):
        return "ddp"
    if isinstance(wrapped, FSDPModule):
        assert any(isinstance(parameter, DTensor) for parameter in wrapped.parameters())
        return "fsdp2"
    return "one process"


@contextmanager
def no_sync(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Reduce gradients only in the `last` micro-batch. Shards are reduced in each: the whole would take memory."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """The tensor that all processes' shards make up; all have to call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, as every process has it, in the form of a parameter: its device, and its shard of it."""
    full = full.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return full
    # every process has read it all: nothing needs to be sent
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients as one vector, over all shards."""
    return whole(torch.nn.utils.get_total_norm(gradients))


def gather_weights(runtime: Runtime, model: nn.Module) -> dict[str, Tensor]:
    """What training changes, whole and on the CPU, in the main process; nothing in the others, which take part."""
    weights = {}
    for name, tensor in tuned(model).items():
        full = whole(tensor.detach())
        if runtime.is_main:
            weights[name] = full.cpu().contiguous()
    return weights


def gather_optimizer(runtime: Runtime, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by `INDEX.NAME`, whole and on the CPU, in the main process; see `gather_weights`.

    The rest of its state follows from the recipe and the step.
    """
    tensors = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                full = whole(value)
                if runtime.is_main:
                    tensors[f"{index}.{name}"] = full.cpu().contiguous()
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Load what `gather_optimizer` gave, whatever the number of processes and the strategy were then."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        fits = value.shape == parameter.shape
        state.setdefault(int(index), {})[name] = like(value, parameter) if fits else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set what training changes from whole tensors."""
    with torch.no_grad():
        for name, tensor in tuned(model).items():
            tensor.copy_(like(weights[name], tensor))


def unshard(runtime: Runtime, model: nn.Module) -> None:
    """Put the model together again in the main process, on the CPU, to be saved; the others are left without one."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a class that `fully_shard` made of this one's own
            module.__class__ = type(module).__bases__[1]
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in parameters:  # else it is tied
                full = whole(parameter.detach())
                full = full.cpu() if runtime.is_main else full.new_empty(0)
                parameters[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
            setattr(module, name, parameters[id(parameter)])
