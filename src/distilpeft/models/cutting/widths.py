"""Make a model narrower: keep the most important hidden units, attention heads and feed-forward units."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from distilpeft.data.model_files.widths import INNER, Axes, Axis, Widths, axes, narrowed
from distilpeft.errors import InputError
from distilpeft.models.cutting.importance import Importance, place_of
from distilpeft.models.weights import blocks
from distilpeft.recipe.student import FromTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def narrow(
    model: PreTrainedModel, chosen: FromTeacher, measured: Callable[[dict[str, Axes]], Importance]
) -> PreTrainedModel:
    """A copy of a model with fewer units: those that add most, in their order.

    Where it has all of its layers, what is left computes exactly what the whole would with the other units of heads
    and feed-forward parts silent. Hidden units are gone from the norms as well, so those that stay are normalized
    among themselves.

    Args:
        model: with all its layers.
        chosen: the recipe's section.
        measured: gives the importance of the units, given the axes of the weights.

    Raises:
        InputError: it has fewer units, or weights of which nobody knows what they are.
    """
    settings = model.config.to_dict()
    old, new = Widths.of(settings), narrowed(chosen, settings)
    cut = {axis for axis in ("hidden", "heads", "ffn") if getattr(old, axis) != getattr(new, axis)}
    if not cut:
        return model
    known = axes_of(model, old, cut)
    importance = measured(known)
    weights = {}
    for name, whole in model.state_dict().items():
        tensor = whole
        for at, axis in enumerate(known.get(name, ())):
            if axis is not None and old.size(axis) != new.size(axis):
                kept = _kept(importance[place_of(name, axis)], axis, old, new)
                tensor = tensor.index_select(at, torch.from_numpy(kept).to(tensor.device))
        weights[name] = tensor
    config = copy.deepcopy(model.config)
    for name, value in new.settings(settings).items():
        setattr(config, name, value)
    narrower = type(model)(config).to(dtype=model.dtype)
    narrower.load_state_dict(weights)
    narrower.tie_weights()
    if model.can_generate():
        narrower.generation_config = copy.deepcopy(model.generation_config)
    return cast("PreTrainedModel", narrower.to(model.device).train(model.training))


def axes_of(model: PreTrainedModel, widths: Widths, cut: set[str]) -> dict[str, Axes]:
    """The axes of all weights that have some of these widths.

    Raises:
        InputError: a weight has an axis that nobody knows, or a feed-forward part is not two or three plain layers.
    """
    key, kind = "student.from_teacher", type(model).__name__
    tensors = model.state_dict()
    has_inner = any(INNER.search(name) for name in tensors)
    found: dict[str, Axes] = {}
    for name, tensor in tensors.items():
        kinds = axes(name, tuple(tensor.shape), widths, has_inner=has_inner)
        if kinds is None and cut != {"ffn"}:
            raise InputError(f"{key}.hidden: {kind} has weights that cannot be narrowed ({name}); use fewer layers")
        found[name] = kinds or ()
    if "ffn" in cut:
        layers = {id(module): name for name, module in model.named_modules()}
        for block in blocks(model):
            inside = [kinds for name, kinds in found.items() if name.startswith(f"{layers[id(block)]}.")]
            if inside.count(("hidden", "ffn")) != 1 or not 1 <= inside.count(("ffn", "hidden")) <= 2:
                raise InputError(
                    f"{key}.ffn: the feed-forward part of {type(block).__name__} is not made of such layers"
                )
    return found


def _kept(importance_W: NDArray[np.float64], axis: Axis, old: Widths, new: Widths) -> NDArray[np.int64]:
    """Which places of an axis are kept, ascending; of heads that share their keys all or none."""
    if axis not in ("heads", "keys"):
        return _strongest(importance_W, new.size(axis))
    shared = old.heads // old.keys
    groups = _strongest(importance_W.reshape(-1, shared).sum(1), new.keys)
    width = old.head * (shared if axis == "heads" else 1)
    return (groups[:, None] * width + np.arange(width)).reshape(-1)


def _strongest(importance_W: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return np.sort(np.argsort(-importance_W, kind="stable")[:count])
