"""Whose classes a finished head answers: the model's own `id2label` against the recipe's `labels`.

A head answers in the order in which it was trained, and only its config.json gives that order. Equal names in another
order are matched by name; names that only count (LABEL_0, LABEL_1) say nothing beyond their number. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distilpeft.data.sources import Source, adapter_shapes, saved_modules
from distilpeft.machine.files import read_json

MOST_NAMED = 6
_COUNTED = re.compile(r"(?:label[ _-]?)?(\d+)", re.IGNORECASE)
SUFFIXES = {
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "image-classification": "ForImageClassification",
    "question-answering": "ForQuestionAnswering",
}
"""The hub's name for a task → how transformers' architectures with a head for it end."""
Verdict = Literal["none", "same", "matched", "numbered", "other"]


@dataclass(frozen=True)
class Head:
    """A model's own classes, compared with those of the recipe.

    Attributes:
        verdict: `none`: the model brings no head; `same`: the very classes in their order; `matched`: the same names in
            another order or spelling; `numbered`: as many classes, without names; `other`: no head for these classes.
        order: class of the recipe → row of the model's output layer.
        fault: of `other`: what does not fit.
        names: the model's classes, as far as its files name them.
        fits: it has as many outputs as the recipe has classes, whatever they mean.
    """

    verdict: Verdict
    order: tuple[int, ...] = ()
    fault: str = ""
    names: tuple[str, ...] = ()
    fits: bool = True

    @property
    def is_kept(self) -> bool:
        """Whether the head's weights mean the recipe's classes, maybe in another order."""
        return self.verdict not in ("none", "other")

    @property
    def moved(self) -> bool:
        """Whether rows of the output layer have to change places."""
        return self.is_kept and list(self.order) != sorted(self.order)

    @property
    def key(self) -> str:
        """What artifact keys hold of it; empty where transformers alone would do the same."""
        if self.verdict == "other" and self.fits:
            return "new"
        return ",".join(map(str, self.order)) if self.moved else ""


def head_of(source: Source, config: Mapping[str, object], suffix: str, labels: Sequence[str]) -> Head:
    """The head that a model brings.

    Args:
        source: the model.
        config: its own configuration.
        suffix: how the names of architectures with such a head end, such as `ForSequenceClassification`.
        labels: the recipe's classes; empty for a single number.
    """
    if source.adapter is not None:
        rows = _adapter_rows(source.adapter, len(labels) or 1)
        if rows is not None:
            return _adapter_head(source.adapter, config, rows, labels)
    return compare(config, labels) if brings_head(config, suffix) else Head("none")


def brings_head(config: Mapping[str, object], suffix: str) -> bool:
    """Whether a model was saved with a head of this kind; without an architecture, the names of classes decide."""
    architecture = architecture_of(config)
    return suffix in architecture if architecture else bool(config.get("id2label"))


def architecture_of(config: Mapping[str, object]) -> str:
    """The class that saved a model; empty if its configuration does not say."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def compare(config: Mapping[str, object], labels: Sequence[str]) -> Head:
    """Compare the classes that a configuration names with those of the recipe; see `Head`."""
    ids, fault = _names_by_id(config)
    names, count = tuple(ids.get(index, "") for index in range(len(ids))), len(labels) or 1
    if fault:
        return Head("other", fault=fault, names=names, fits=len(ids) == count)
    if len(ids) != count:
        has = "1 output" if len(ids) == 1 else f"{len(ids)} classes"
        needs = f"task.labels has {count}" if labels else "a regression needs 1"
        return Head("other", fault=f"its head has {has}{_listed(names)}, but {needs}", names=names, fits=False)
    if not labels:
        return Head("same", (0,), names=names)
    return _by_name(names, labels)


def _by_name(names: tuple[str, ...], labels: Sequence[str]) -> Head:
    """Match as many names by their spelling, else without regard to case and blanks; see `Head`."""
    for spelled in (str, _plain):
        ours, theirs = [spelled(label) for label in labels], [spelled(name) for name in names]
        if sorted(ours) == sorted(theirs) and len(set(ours)) == len(ours):
            order = tuple(theirs.index(label) for label in ours)
            return Head("same" if names == tuple(labels) else "matched", order, names=names)
    if all(_is_number(name, index) for index, name in enumerate(names)):
        return Head("numbered", tuple(range(len(names))), names=names)
    return Head("other", fault=f"its head has other classes{_listed(names)} than task.labels", names=names)


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _is_number(name: str, index: int) -> bool:
    match = _COUNTED.fullmatch(name.strip())
    return match is not None and int(match[1]) == index


def _names_by_id(config: Mapping[str, object]) -> tuple[dict[int, str], str]:
    """Id → name, and what is wrong with them; a configuration without names has two classes, or `num_labels`."""
    forward, backward = _mapping(config.get("id2label")), _mapping(config.get("label2id"))
    if not forward:
        count = config.get("num_labels", config.get("_num_labels"))
        if not backward:
            return {index: f"LABEL_{index}" for index in range(count if isinstance(count, int) else 2)}, ""
        forward = {str(number): name for name, number in backward.items()}
    try:
        ids = {int(number): str(name) for number, name in forward.items()}
        numbers = {name: int(number) for name, number in backward.items()}
    except (TypeError, ValueError):
        return {}, "id2label and label2id of its config.json are not names with numbers"
    if sorted(ids) != list(range(len(ids))):
        return ids, f"the id2label of its config.json does not number its classes from 0 to {len(ids) - 1}"
    counted = all(_is_number(name, index) for index, name in ids.items())
    if numbers and not all(_is_number(name, number) for name, number in numbers.items()):
        if counted and sorted(numbers.values()) == sorted(ids):
            return {number: name for name, number in numbers.items()}, ""  # only label2id was ever filled in
        odd = next((name for index, name in ids.items() if numbers.get(name, index) != index), None)
        if odd is not None:
            return ids, f"id2label and label2id of its config.json contradict each other: class {odd!r}"
    return ids, ""


def _mapping(value: object) -> dict[str, Any]:
    return {str(key): entry for key, entry in value.items()} if isinstance(value, Mapping) else {}


def _listed(names: Sequence[str]) -> str:
    if not any(names):
        return ""
    return f" ({', '.join(names[:MOST_NAMED])}{', ...' if len(names) > MOST_NAMED else ''})"


def _adapter_rows(folder: Path, count: int) -> int | None:
    """Rows of the output layer that an adapter brings, `count` if any fits; None if it brings none."""
    saved = [name for name in saved_modules(folder) if "embed" not in name]
    sizes = [
        shape[0]
        for name, shape in adapter_shapes(folder).items()
        if len(shape) == 2 and ".lora_" not in name and any(f".{module}." in f".{name}" for module in saved)
    ]
    if not sizes:
        return None
    return count if count in sizes else sizes[-1]


def _adapter_head(folder: Path, config: Mapping[str, object], rows: int, labels: Sequence[str]) -> Head:
    """A head that was tuned with an adapter: named by a config.json there, or by the base's if the names fit."""
    file = folder / "config.json"
    if file.is_file():
        return compare(read_json(file, "the adapter's classes are named in it"), labels)
    head = compare(config, labels)
    return head if head.verdict in ("same", "matched") else compare({"num_labels": rows}, labels)
