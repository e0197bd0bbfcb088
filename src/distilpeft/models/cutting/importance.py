"""What each unit of a model adds over rows of training data, by which a narrower student keeps the strongest.

As in Minitron (Muralidharan et al. 2024, arXiv:2407.14679, section 2.2), importance is measured on activations, in
forward passes alone. A hidden unit's is the sum of its squares behind all norms. A feed-forward unit's, and a head's,
is the sum of the squares of all that it adds to the hidden state, its weights out included (as in Wanda, Sun et al.
2023, arXiv:2306.11695): Minitron leaves these out, which takes units for strong that the next product makes small.

N  tokens    W  units of an axis    A  heads    D  units of a head    H  hidden units
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from distilpeft.data.model_files.widths import Axes, Widths, block_of
from distilpeft.distillation.store import row_hashes
from distilpeft.machine.files import digest_json
from distilpeft.models.context import Context
from distilpeft.tasks.rows import TAUGHT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distilpeft.tasks.task import Batch, Task

Importance = dict[str, NDArray[np.float64]]
"""`block.axis`, or the axis alone where all blocks share it, → a number for each unit, or for each head."""
Sum = Callable[[Tensor], Tensor]
"""Activations of tokens, [N, W], → sums for each unit, or for each head."""


ROWS = 512
"""How many training rows are read at most; Minitron's calibration set has 1024 (section 4)."""
BATCH = 16
FILE = "importance.safetensors"


def importance_of(context: Context, name: str, teacher: PreTrainedModel, axes: dict[str, Axes]) -> Importance:
    """The importance of a teacher's units over the rows that its student learns from; measured once, then on disk.

    Args:
        context: the run.
        name: of the teacher's artifact.
        teacher: merged, with all its layers.
        axes: of its weights that have widths.
    """
    rows = context.data.tokens(TAUGHT, context.pair.teacher_reader)
    count = len(rows.lengths_N)
    chosen = np.unique(np.linspace(0, count - 1, min(ROWS, count)).astype(np.int64))

    def batches() -> Iterator[Batch]:
        with context.runtime.bar("importance of units", len(chosen)) as bar:
            for begin in range(0, len(chosen), BATCH):
                ids = chosen[begin : begin + BATCH]
                yield rows.load_batch(ids)
                bar.advance(len(ids))

    def write(folder: Path) -> None:
        found = measure(teacher, Widths.of(teacher.config.to_dict()), axes, context.task, batches())
        save_file(found, folder / FILE)

    read = row_hashes(rows.dataset.select(chosen))
    ending = digest_json([name, sorted(axes), hashlib.sha256(read.tobytes()).hexdigest()])[:12]
    found: Importance = load_file(context.data.folder(f"importance-{ending}", write) / FILE)
    return found


def place_of(name: str, axis: str) -> str:
    """Under which name the importance of an axis of a weight stands: hidden units are the same in all blocks."""
    if axis in ("hidden", "inner"):
        return axis
    return f"{block_of(name)}.{'heads' if axis == 'keys' else axis}"


def measure(
    model: PreTrainedModel, widths: Widths, axes: dict[str, Axes], task: Task, batches: Iterable[Batch]
) -> Importance:
    """Run a model over batches of rows, and add up what each of its units adds.

    Args:
        model: with all its layers.
        widths: of the model.
        axes: of its weights that have widths.
        task: calls the model.
        batches: collated rows, on the CPU.

    Returns:
        Sums over all tokens but padding.
    """
    found: dict[str, Tensor] = {}
    batch: Batch

    def add(place: str, activation: Tensor, sum_of: Sum) -> None:
        mask_BS = batch["inputs"].get("attention_mask")
        flat = activation.flatten(0, -2)
        if mask_BS is not None and activation.shape[:-1] == mask_BS.shape:  # a pooler's units are those of rows
            flat = flat[mask_BS.flatten().bool()]
        total = sum_of(flat).double().cpu()
        found[place] = found.get(place, torch.zeros_like(total)) + total

    was_training = model.training
    model.eval()
    with ExitStack() as hooks, torch.no_grad():
        for name, kinds in axes.items():
            if not name.endswith(".weight"):
                continue
            module = model.get_submodule(name.removesuffix(".weight"))
            watch = _watched(module, kinds, widths)
            if watch is not None:
                axis, at_input, sum_of = watch
                hook = _hook(partial(add, place_of(name, axis), sum_of=sum_of), at_input=at_input)
                hooks.callback(module.register_forward_hook(hook).remove)
        for cpu_batch in batches:
            batch = send_to_device(cpu_batch, model.device)
            model(**task.inputs(model, batch))
    model.train(was_training)
    return {place: total.numpy() for place, total in found.items()}


def _watched(module: nn.Module, kinds: Axes, widths: Widths) -> tuple[str, bool, Sum] | None:
    """What is to be counted at a module: the axis, whether at its input, and how; None: nothing."""
    weight = module.weight
    if isinstance(module, nn.Embedding) or not isinstance(weight, Tensor):
        return None
    if kinds == ("hidden",):  # norms
        return "hidden", False, _squares
    if kinds == ("inner", "hidden"):
        return "inner", False, _squares
    if kinds == ("hidden", "ffn"):
        lengths_W = weight.square().sum(0)
        return "ffn", True, lambda flat: _squares(flat) * lengths_W
    if kinds == ("hidden", "heads"):
        weight_HAD = weight.view(-1, widths.heads, widths.head)
        products_ADD = torch.einsum("had,hae->ade", weight_HAD, weight_HAD)
        return "heads", True, lambda flat: _of_heads(flat, products_ADD)
    return None


def _squares(flat_NW: Tensor) -> Tensor:
    return flat_NW.square().sum(0)


def _of_heads(flat_NW: Tensor, products_ADD: Tensor) -> Tensor:
    """Sum over tokens of |weights out · output of the head|², for each head, by the outputs' second moments."""
    outputs_NAD = flat_NW.view(-1, *products_ADD.shape[:2])
    return torch.einsum("nad,nae,ade->a", outputs_NAD, outputs_NAD, products_ADD)


def _hook(add: Callable[[Tensor], None], *, at_input: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        add(inputs[0] if at_input else output)

    return hook
