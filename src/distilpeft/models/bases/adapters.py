"""PEFT adapters that others have tuned: merged into a base, put on it, or taken over into a new one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import peft
from peft.utils import load_peft_weights, set_peft_model_state_dict

from distilpeft.data.model_files.tokens import embedding_rows
from distilpeft.data.sources import Source, adapter_shapes
from distilpeft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def brought(folder: Path, parameter: str) -> bool:
    """Whether an adapter brings the weights of this parameter of the base."""
    return any(name.removeprefix("base_model.model.") == parameter for name in adapter_shapes(folder))


def join(
    model: PreTrainedModel, source: Source, peft_task: str | None, *, merged: bool, partly: bool = False
) -> PreTrainedModel:
    """Put the adapter of a source on its base, frozen, or merge it.

    Args:
        model: the base; its embeddings get as many rows as the adapter's, if it brings any.
        source: where the adapter is.
        peft_task: PEFT's name of the recipe's task.
        merged: add it to the weights, which have to be in floating point.
        partly: leave out weights of other shapes than the base's.

    Raises:
        InputError: it does not fit.
    """
    folder = source.adapter
    assert folder is not None
    config = peft.PeftConfig.from_pretrained(str(folder))
    if config.task_type != peft_task:
        config.task_type = None  # only its weights are used
    rows = embedding_rows(source)
    if rows is not None and rows != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is left out, and of the base's name
            joined = peft.PeftModel.from_pretrained(
                model, str(folder), config=config, is_trainable=False, ignore_mismatched_sizes=partly
            )
    except (ValueError, RuntimeError, KeyError) as error:
        raise _unfit(source, error) from None
    return joined.merge_and_unload() if merged else joined


def take_over(model: PreTrainedModel, source: Source, *, partly: bool) -> None:
    """Set a new adapter's weights from one that was tuned before; `partly` as in `join`.

    Raises:
        InputError: it sits on other modules, or is of another size.
    """
    assert source.adapter is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = load_peft_weights(str(source.adapter), device="cpu")
            result = set_peft_model_state_dict(model, weights, ignore_mismatched_sizes=partly)
    except (RuntimeError, KeyError) as error:
        raise _unfit(source, error) from None
    strange = list(result.unexpected_keys) + [name for name in result.missing_keys if ".lora_" in name]
    if strange:
        raise InputError(
            f"teacher.lora: the PEFT adapter {source.adapter} is not on the same modules ({strange[0]}); leave "
            "teacher.lora out to continue it, or set teacher.quantize: none, which merges it first"
        )


def _unfit(source: Source, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(f"the PEFT adapter {source.adapter} does not fit its base {source.name}: {reason}")
