"""The embeddings of a model cut to some of its tokens, with the head that is tied to them, and its settings.

V  ids before    K  ids kept    H  hidden units
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distilpeft.data.cut_vocabulary.rewrite import numbers
from distilpeft.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LISTS = ("suppress_tokens", "begin_suppress_tokens")
"""Settings that list ids, besides those whose names end like `_token_id`."""


def named_ids(config: PretrainedConfig) -> set[int]:
    """The ids that a model's configuration names: special tokens, the first token of answers, and the like."""
    return {int(one) for part in _parts(config) for _, value in _ids(part.to_dict()) for one in _listed(value)}


def cut_embeddings(model: PreTrainedModel, kept_K: NDArray[np.int64]) -> None:
    """Keep the rows of these ids only, in place, and correct the configuration.

    Ids without a row, of tokens that were added to a tokenizer alone, stay without one. The model gets the attribute
    `cut_weights`, how many weights are gone.

    Args:
        model: just loaded.
        kept_K: by its new id each token's id before, ascending.

    Raises:
        InputError: it has no plain embeddings, or counts positions from a padding token whose id changes.
    """
    key, name, embeddings = "student.vocabulary", type(model).__name__, model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise InputError(f"{key}: the embeddings of {name} are not one matrix; leave it out")
    num_rows = embeddings.num_embeddings
    rows_K = torch.from_numpy(kept_K[kept_K < num_rows])
    new = {old: one for old, one in numbers(kept_K).items() if old < num_rows}
    _check_positions(model, new)
    before = sum(parameter.numel() for parameter in model.parameters())
    if embeddings.padding_idx is not None:
        embeddings.padding_idx = new.get(embeddings.padding_idx)
    done: set[int] = set()
    with torch.no_grad():
        for tensor in _by_id(model):
            if tensor.data_ptr() not in done:  # tied ones are one tensor
                done.add(tensor.data_ptr())
                tensor[: len(rows_K)] = tensor[rows_K.to(tensor.device)]
    try:
        model.resize_token_embeddings(len(rows_K), mean_resizing=False)
    except NotImplementedError:
        raise InputError(f"{key}: the embeddings of {name} cannot be cut; leave it out") from None
    for config in (*_parts(model.config), getattr(model, "generation_config", None)):
        if config is not None:
            _renumber(config, new)
    model.cut_weights = before - sum(parameter.numel() for parameter in model.parameters())


def _by_id(model: PreTrainedModel) -> Iterator[Tensor]:
    """Every tensor with a row, or a number, for each id: [V, H] or [V]."""
    yield model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    if output is not None:
        yield from output.parameters()


def _check_positions(model: PreTrainedModel, new: Mapping[int, int]) -> None:
    """RoBERTa and its kin number positions from the padding token's id on."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in path and module.padding_idx is not None:
            pad = module.padding_idx
            if new.get(pad) != pad:
                raise InputError(
                    f"student.vocabulary: {type(model).__name__} counts positions from its padding token's id, {pad}, "
                    f"which would become {new.get(pad)}; leave it out"
                )


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A configuration, and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _parts(inner)


def _ids(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings that are ids, or lists of them."""
    for name, value in settings.items():
        if value is not None and (name.endswith(("_token_id", "_token_ids")) or name in _LISTS):
            yield name, value


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _renumber(config: Any, new: Mapping[int, int]) -> None:
    """Give settings the new ids; those of tokens that are gone mean nothing any more."""
    for name, value in _ids(config.to_dict()):
        if isinstance(value, list | tuple):
            setattr(config, name, [new[one] for one in value if one in new] or None)
        else:
            setattr(config, name, new.get(value))
    pairs = config.to_dict().get("forced_decoder_ids")
    if pairs:
        config.forced_decoder_ids = [[at, new[one]] for at, one in pairs if one in new]
