"""How wide a stack of layers is, and which axes of its weights those widths are. Torch-free.

Only the names and shapes of weights in transformers are used, so the same rule estimates a student's size before any
weight is read, and cuts its weights later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from distilpeft.errors import InputError
from distilpeft.recipe.student import FromTeacher

Axis = Literal["hidden", "heads", "keys", "ffn", "inner"]
"""hidden units; units of the attention heads, and of those of keys and values; feed-forward units; units between the
last hidden state and the output, as in a pooler."""
Axes = tuple[Axis | None, ...]
"""The axes of a weight, None where its size does not depend on a width."""

HIDDEN = ("hidden_size", "dim")
HEADS = ("num_attention_heads", "n_heads")
FFN = ("intermediate_size", "hidden_dim")
"""What configurations call them."""

KEY = "student.from_teacher"
NARROWED = (
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "vit", "deit", "llama", "mistral", "qwen2", "qwen3",
)  # fmt: skip
"""Kinds of models that can lose hidden units and heads."""

INNER = re.compile(r"(^|\.)(pooler\.dense|classifier\.dense|pre_classifier)\.")
HEAD = re.compile(r"(^|\.)(classifier|classifier\.out_proj|score|qa_outputs|lm_head)\.weight$")
NAMED: tuple[tuple[re.Pattern[str], Axes], ...] = (
    (re.compile(r"\.(query|q_proj|q_lin)\."), ("heads", "hidden")),
    (re.compile(r"\.(key|value|k_proj|v_proj|k_lin|v_lin)\."), ("keys", "hidden")),
    (re.compile(r"\.(attention\.output\.dense|o_proj|out_lin)\.weight$"), ("hidden", "heads")),
    (re.compile(r"\.[qk]_norm\."), (None,)),  # norms of single heads
    (INNER, ("inner", "hidden")),
)
INTO: Axes = ("ffn", "hidden")
OUT_OF: Axes = ("hidden", "ffn")
"""Of the matrices of a feed-forward part, which are known by their shapes, whatever they are called."""
BLOCK = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Widths:
    """The widths of a stack.

    Attributes:
        hidden: units of a hidden state.
        heads: attention heads.
        keys: heads of keys and values, which are fewer where several heads share them.
        head: units of a head.
        ffn: units inside a feed-forward part.
        is_bound: whether a head always has hidden / heads units.
    """

    hidden: int
    heads: int
    keys: int
    head: int
    ffn: int
    is_bound: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Widths:
        """Those that a configuration names, 0 where it has none."""
        hidden, heads, ffn = (
            next((config[name] for name in names if isinstance(config.get(name), int)), 0)
            for names in (HIDDEN, HEADS, FFN)
        )
        keys = config.get("num_key_value_heads")
        head = config.get("head_dim") or hidden // max(heads, 1)
        return cls(hidden, heads, keys or heads, head, ffn, keys is None and config.get("head_dim") is None)

    def size(self, axis: Axis) -> int:
        """How long an axis is."""
        sizes = {"heads": self.heads * self.head, "keys": self.keys * self.head, "ffn": self.ffn}
        return sizes.get(axis, self.hidden)

    def settings(self, config: Mapping[str, Any]) -> dict[str, int]:
        """What a configuration with the names of this one has to say."""
        pairs = ((HIDDEN, self.hidden), (HEADS, self.heads), (FFN, self.ffn))
        settings = {name: value for names, value in pairs for name in names if isinstance(config.get(name), int)}
        if not self.is_bound:
            settings |= {"num_key_value_heads": self.keys, "head_dim": self.head}
        return settings


def narrowed(chosen: FromTeacher, config: Mapping[str, Any]) -> Widths:
    """The widths that a student cut from such a teacher has.

    Raises:
        InputError: there are fewer units, this kind of model cannot lose them, or a head would get another width.
    """
    old, kind = Widths.of(config), config.get("model_type")
    for name, wanted, most, units in (
        ("ffn", chosen.ffn, old.ffn, "feed-forward units"),
        ("hidden", chosen.hidden, old.hidden, "hidden units"),
        ("heads", chosen.heads, old.heads, "heads"),
    ):
        if wanted is not None and wanted > most:
            has = f"has {most} {units}" if most else f"names no {units}"
            raise InputError(f"{KEY}.{name}: {wanted} are more than there are; the teacher ({kind}) {has}")
    if chosen.ffn is not None and old.ffn == old.hidden:
        raise InputError(
            f"{KEY}.ffn: the teacher ({kind}) has as many hidden units, and the two cannot be distinguished"
        )
    new = replace(old, ffn=chosen.ffn or old.ffn)
    if chosen.hidden is None and chosen.heads is None:
        return new
    if kind not in NARROWED:
        first = "hidden" if chosen.hidden is not None else "heads"
        raise InputError(
            f"{KEY}.{first}: a teacher of the kind {kind} keeps all of them; those of {', '.join(NARROWED)} can be "
            "narrowed. Use ffn, or fewer layers"
        )
    if old.is_bound:
        return _bound(new, chosen)
    shared = old.heads // old.keys
    new = replace(new, hidden=chosen.hidden or old.hidden, heads=chosen.heads or old.heads)
    if new.heads % shared:
        raise InputError(
            f"{KEY}.heads: {new.heads} is no multiple of {shared}, the number of heads that share their keys"
        )
    return replace(new, keys=new.heads // shared)


def _bound(old: Widths, chosen: FromTeacher) -> Widths:
    """Fewer hidden units and heads, where each of the heads has its share of the units."""
    hidden = chosen.hidden or (chosen.heads or 0) * old.head
    heads = chosen.heads or hidden // old.head
    if hidden != heads * old.head:
        fit = max(hidden // old.head, 1)
        raise InputError(
            f"{KEY}.hidden: {hidden} hidden units are not {heads or 1} heads of {old.head}, which this kind of teacher "
            f"needs; write hidden: {fit * old.head}, heads: {fit}"
        )
    return replace(old, hidden=hidden, heads=heads, keys=heads)


def block_of(name: str) -> str:
    """The layer that a weight is in, such as `encoder.layer.3`; empty if in none."""
    match = BLOCK.match(name)
    return match[1] if match else ""


def axes(name: str, shape: Sequence[int], widths: Widths, *, has_inner: bool) -> Axes | None:
    """Which axes of a weight are widths; None if it has some that nobody knows.

    Args:
        name: as transformers has it.
        shape: of the weight.
        widths: of the model.
        has_inner: whether a layer such as a pooler is between hidden states and output.
    """
    hidden, ffn = widths.hidden, widths.ffn
    if block_of(name) and ffn in shape and ffn != hidden:
        return {(ffn, hidden): INTO, (hidden, ffn): OUT_OF, (ffn,): ("ffn",)}.get(tuple(shape))
    for pattern, known in NAMED:
        if pattern.search(name):
            return known[: len(shape)]
    if HEAD.search(name):
        return (None, "inner" if has_inner else "hidden")
    return _shared(name, shape, hidden)


def _shared(name: str, shape: Sequence[int], hidden: int) -> Axes | None:
    """Of what is left: vectors, embeddings, and what has nothing to do with widths."""
    places = [at for at, size in enumerate(shape) if size == hidden]
    if len(shape) == 2:  # a table may have as many rows
        places = [at for at in places if at == 1]
    if not places:
        return None if hidden in shape else (None,) * len(shape)
    if len(places) > 1 or not (len(shape) == 1 or "embed" in name):
        return None
    return tuple("hidden" if at == places[0] else None for at in range(len(shape)))
