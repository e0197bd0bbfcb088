"""How a static student begins: the teacher's word embeddings, reduced by PCA, and a weight for each token.

V  vocabulary    H  units of the teacher's embeddings    D  units of the student's
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from distilpeft.errors import InputError
from distilpeft.models.static.architecture import StaticConfig, body_of
from distilpeft.recipe.student import Static

if TYPE_CHECKING:
    from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

SIF = 1e-3
"""a of the weights a / (a + p) (Arora, Liang and Ma, "A simple but tough-to-beat baseline for sentence embeddings",
ICLR 2017, section 3); p is a token's share of all."""
SPECIAL = ("pad", "unk", "cls", "sep", "bos", "eos", "mask")
"""Special tokens that stand in rows of every kind, or for what a tokenizer does not know: their vectors say nothing."""


def word_embeddings(teacher: PreTrainedModel) -> NDArray[np.float64]:
    """The word embeddings of a loaded teacher, [V, H].

    Raises:
        InputError: it has none, such as models of bytes or characters that hash them.
    """
    try:
        weight = teacher.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        weight = None
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(f"student.static: {type(teacher).__name__} has no table of word embeddings; use from_teacher")
    table_VH: NDArray[np.float64] = weight.detach().double().cpu().numpy()
    return table_VH


def reduced(table_VH: NDArray[np.float64], used: Sequence[int], dim: int | None) -> NDArray[np.float64]:
    """A table in its `dim` main directions, [V, D], by PCA over the rows of `used`; unchanged without `dim`.

    Deterministic: an axis points to where its largest entry is positive.

    Raises:
        InputError: there are fewer directions.
    """
    if dim is None:
        return table_VH
    most = min(table_VH.shape[1], len(used) - 1)
    if dim > most:
        raise InputError(f"student.static.dim: {dim} are more than the {most} directions of the teacher's embeddings")
    mean_H = table_VH[used].mean(0)
    centred_UH = table_VH[used] - mean_H
    _, axes_HH = np.linalg.eigh(centred_UH.T @ centred_UH)  # in rising order
    axes_HD = axes_HH[:, ::-1][:, :dim]
    signs_D = np.sign(axes_HD[np.abs(axes_HD).argmax(0), np.arange(dim)])
    table_VD: NDArray[np.float64] = (table_VH - mean_H) @ (axes_HD * signs_D)
    return table_VD


def scaled(table_VD: NDArray[np.float64], used: Sequence[int]) -> NDArray[np.float64]:
    """A table whose rows of `used` have a root mean square of 1 per unit.

    Adam's steps do not depend on the scale of a weight. Embeddings of BERTs have entries of about 0.05, which a few
    steps of a static student's learning rate would replace by what single rows of the training data suggest.
    """
    size = float(np.sqrt(np.square(table_VD[used]).mean()))
    return table_VD / (size or 1.0)


def sif_weights(counts_V: NDArray[np.int64], size: int, ignored: Sequence[int]) -> NDArray[np.float64]:
    """A weight for each of `size` tokens by how often it occurs, 1 for one that does not.

    Args:
        counts_V: how often each id occurs; ids behind the last one do not.
        size: of the vocabulary.
        ignored: ids that do not count.
    """
    counted_V = np.zeros(size, np.int64)
    counted_V[: len(counts_V)] = counts_V[:size]
    counted_V[list(ignored)] = 0
    weights_V: NDArray[np.float64] = SIF / (SIF + counted_V / max(int(counted_V.sum()), 1))
    return weights_V


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a tokenizer's special tokens."""
    ids = {getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL}
    return sorted(index for index in ids if index is not None)


def separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the tokenizer puts between two texts.

    Raises:
        InputError: it puts none there.
    """
    alone, pair = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a", "a")["input_ids"]
    begin = next((at for at in range(len(pair)) if alone and pair[at : at + len(alone)] == alone), None)
    after = [] if begin is None else pair[begin + len(alone) :]
    if after and after[0] in special_ids(tokenizer):
        return int(after[0])
    raise InputError(
        f"student.static: {type(tokenizer).__name__} puts no separator between two texts, so a static student could "
        "not tell them apart; use from_teacher"
    )


def new(
    auto_class: type[AutoModel], options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel, static: Static, *, pair: bool, counts_V: NDArray[np.int64] | None = None,
    kept_K: NDArray[np.int64] | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A student with the teacher's word embeddings and a random head.

    Args:
        auto_class: of transformers, for the task.
        options: configuration values of a model for the task.
        tokenizer: the teacher's, or what a cut vocabulary leaves of it.
        teacher: merged.
        static: the recipe's section.
        pair: whether it reads pairs of texts.
        counts_V: how often each id occurs in the training rows, for `sif`; None: not at all.
        kept_K: the teacher's ids of the tokens that a cut vocabulary keeps, ascending. The model then gets the
            attribute `cut_weights`, how many weights that saves.

    Raises:
        InputError: the teacher has no such embeddings, or no separator stands between two texts.
    """
    ids = sorted(set(tokenizer.get_vocab().values()))
    table_VH = word_embeddings(teacher)
    whole = len(table_VH)
    if kept_K is not None:
        table_VH = table_VH[kept_K[kept_K < whole]]
    table_VH = table_VH[: ids[-1] + 1]  # rows behind it are there for a round size
    ignored = special_ids(tokenizer)
    used = [token for token in ids if token < len(table_VH) and token not in ignored]
    table_VD = scaled(reduced(table_VH, used, static.dim), used)
    config = StaticConfig(
        vocab_size=table_VD.shape[0], hidden_size=table_VD.shape[1], head_size=static.hidden, pair=pair,
        ignored_ids=ignored, sep_token_id=separator(tokenizer) if pair else tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    for name, value in options.items():
        setattr(config, name, value)
    model = auto_class.from_config(config, dtype=torch.float32)
    body = body_of(model)
    with torch.no_grad():
        body.embeddings.weight.copy_(torch.from_numpy(table_VD))
        if static.weighting == "sif" and counts_V is not None:
            body.token_weights.copy_(torch.from_numpy(sif_weights(counts_V, len(table_VD), ignored)))
    model.fresh = sorted(name for name, _ in model.named_parameters() if name.startswith("classifier."))
    if kept_K is not None:
        model.cut_weights = (whole - len(table_VD)) * (table_VD.shape[1] + 1)
    return model
