"""A tokenizer's tokenizer.json with some of its tokens only, renumbered from 0 in their order. Torch-free."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from distilpeft.data.cut_vocabulary.kept import joined, merges_of
from distilpeft.errors import InputError
from distilpeft.machine.files import JsonObject


def numbers(kept_K: NDArray[np.int64]) -> dict[int, int]:
    """Old id → new id."""
    return {int(old): new for new, old in enumerate(kept_K)}


def cut(spec: JsonObject, kept_K: NDArray[np.int64], name: str) -> JsonObject:
    """The tokenizer with these tokens only.

    Args:
        spec: its tokenizer.json.
        kept_K: the ids to keep, ascending.
        name: of the model, for the message.

    Raises:
        InputError: the library gives other ids to the tokens that are left.
    """
    new, result = numbers(kept_K), copy.deepcopy(spec)
    result["model"] = _model(result["model"], new)
    result["added_tokens"] = [{**token, "id": new[token["id"]]} for token in result["added_tokens"]]
    result["post_processor"] = _framing(result["post_processor"], new)
    expected = {
        token: new[index]
        for token, index in Tokenizer.from_str(json.dumps(spec)).get_vocab(with_added_tokens=True).items()
        if index in new
    }
    try:
        ids = Tokenizer.from_str(json.dumps(result)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises nothing narrower
        ids, reason = None, " ".join(str(error).split())[:200]
    else:
        reason = "its ids would have gaps"
    if ids != expected:
        raise InputError(f"student.vocabulary: the tokenizer of {name} cannot be cut: {reason}")
    return result


def _model(model: JsonObject, new: Mapping[int, int]) -> JsonObject:
    if model["type"] == "Unigram":
        scored = [entry for index, entry in enumerate(model["vocab"]) if index in new]
        unknown = model.get("unk_id")
        return {**model, "vocab": scored, "unk_id": None if unknown is None else new[unknown]}
    vocabulary = {piece: new[index] for piece, index in model["vocab"].items() if index in new}
    if model["type"] != "BPE":
        return {**model, "vocab": vocabulary}
    prefix = model.get("continuing_subword_prefix") or ""
    merges = [list(merge) for merge in merges_of(model) if {*merge, joined(merge, prefix)} <= vocabulary.keys()]
    return {**model, "vocab": vocabulary, "merges": merges}


def _framing(part: Any, new: Mapping[int, int]) -> Any:
    """What puts special tokens around texts, by their new ids."""
    if not isinstance(part, dict):
        return part
    kind = part["type"]
    if kind == "Sequence":
        return {**part, "processors": [_framing(inner, new) for inner in part["processors"]]}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**part, **{name: [part[name][0], new[part[name][1]]] for name in ("sep", "cls")}}
    if kind == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [new[index] for index in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
        return {**part, "special_tokens": tokens}
    return part


def framing_ids(part: Any) -> set[int]:
    """The ids of the tokens that are put around texts."""
    if not isinstance(part, dict):
        return set()
    kind = part["type"]
    if kind == "Sequence":
        return {index for inner in part["processors"] for index in framing_ids(inner)}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {part["sep"][1], part["cls"][1]}
    if kind == "TemplateProcessing":
        return {index for token in part["special_tokens"].values() for index in token["ids"]}
    return set()
