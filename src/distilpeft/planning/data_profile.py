"""What data show of the task that they are for, and the `task` section that follows; for `distilpeft init`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from distilpeft.data.labels import is_missing, is_one_hot, number, whole_number
from distilpeft.data.picture_folders import ENDINGS
from distilpeft.data.reading import load_parts
from distilpeft.errors import InputError
from distilpeft.planning.text_profile import language_of, num_words, text_of
from distilpeft.recipe.data import Data, Split

LOOKED_AT = 2000
"""Rows that text lengths and classes are found in."""
MOST_CLASSES, WORDS_OF_A_TEXT = 100, 2
READ = ("image", "text", "pair", "prompt", "completion", "messages", "words", "question", "context", "source", "target")
"""Keys of columns that models read."""


@dataclass(frozen=True)
class Wishes:
    """What users give on the command line; None is found out, or asked for.

    Attributes:
        data: see `data.source`.
        task: a kind of task, as recipes name it.
        columns: recipe key of the task → column, and `separator`.
        device: `cpu`, or a GPU's memory such as `24GB`; None: what this machine has.
        size_mb: of the smallest export, at most.
        language: `en` or `many`; None: what the data are in.
        max_tokens: of a row.
        packages: only models that come as Python packages, for machines without a hub.
        teacher: instead of the catalogue's.
        student: instead of the catalogue's.
        latency_ms: of a row on this machine's processors, at most.
        unlabelled: more rows, without labels; see `data.unlabelled`.
        why: what in the data shows the task; None if it was not guessed.
    """

    data: str
    task: str | None = None
    columns: Mapping[str, str] | None = None
    device: str | None = None
    size_mb: float | None = None
    language: str | None = None
    max_tokens: int | None = None
    packages: bool = False
    teacher: str | None = None
    student: str | None = None
    latency_ms: float | None = None
    unlabelled: str | None = None
    why: str | None = None

    @property
    def on(self) -> str:
        """The device that models have to fit on."""
        return self.device or "cpu"

    @property
    def speaks(self) -> str:
        """The language that models have to know."""
        return self.language or "en"

    def read(self) -> list[str]:
        """The columns that models read."""
        return list(self.read_keys().values())

    def read_keys(self) -> dict[str, str]:
        """Key of the task → column, of those that models read."""
        return {key: column for key, column in (self.columns or {}).items() if key in READ}


@dataclass(frozen=True)
class Look:
    """What the data show.

    Attributes:
        splits: name → rows.
        rows: some rows of the largest split.
        columns: of text, as far as these rows show.
        classes: column → its values, of columns with few.
        numbers: columns of numbers that are not classes.
        missing: column → rows that have nothing there.
        language: of the texts, as far as it shows; None if they are too few to tell.
        lists: columns of lists, or of anything else with parts.
        pictures: columns of pictures, or of the names of their files.
    """

    splits: Mapping[str, int]
    rows: datasets.Dataset
    columns: Sequence[str]
    classes: Mapping[str, Sequence[str]]
    numbers: Sequence[str]
    lists: Sequence[str]
    pictures: Sequence[str]
    missing: Mapping[str, int]
    language: str | None

    def filled(self) -> list[str]:
        """Columns with something in them."""
        most = max(self.splits.values())
        return [name for name in self.rows.column_names if self.missing.get(name, 0) < most]


def look(source: str) -> Look:
    """Read the data.

    Raises:
        InputError: they cannot be read.
    """
    parts = {name: part.rows for name, part in load_parts(Data(source=source, split=Split())).items()}
    rows = max(parts.values(), key=len)
    pictures = [name for name in rows.column_names if isinstance(rows.features[name], datasets.Image)]
    rows = rows.select_columns([name for name in rows.column_names if name not in pictures])
    some = rows.select(range(min(LOOKED_AT, len(rows))))
    pictures += [name for name in rows.column_names if _names_pictures(some[name])]
    columns: dict[str, list[str]] = {kind: [] for kind in ("text", "class", "number", "list")}
    classes: dict[str, Sequence[str]] = {}
    missing: dict[str, int] = {}
    for name in (name for name in rows.column_names if name not in pictures):
        kind, values, missing[name] = _kind(rows.features[name], rows[name][:], some[name])
        columns.setdefault(kind, []).append(name)
        if kind == "class":
            classes[name] = values
    classes |= (named := _long_names(columns["text"], rows))
    columns["text"] = [name for name in columns["text"] if name not in named]
    language = language_of(text_of(cell) for name in (*columns["text"], *columns["list"]) for cell in some[name])
    splits = {name: len(part) for name, part in parts.items()}
    return Look(splits, some, columns["text"], classes, columns["number"], columns["list"], pictures, missing, language)


def _kind(feature: object, cells: Sequence[object], some: Sequence[object]) -> tuple[str, Sequence[str], int]:
    """What a column holds (text, class, number, list, or nothing to learn), its classes, and cells without anything."""
    if isinstance(feature, datasets.ClassLabel):
        return "class", list(feature.names), sum(cell is None for cell in cells)
    present = [cell for cell in cells if not is_missing(cell)]
    missing = len(cells) - len(present)
    if any(isinstance(cell, list | dict) for cell in present[:LOOKED_AT]):
        return "list", (), missing
    whole = all(whole_number(cell) is not None for cell in present)
    if not whole and present and all(_is_decimal(cell) for cell in present):
        return "number", (), missing
    if not whole and all(isinstance(cell, str) for cell in present) and mean_words(some) >= WORDS_OF_A_TEXT:
        return "text", (), missing
    values = _few(present)
    if values is not None:
        return "class", values, missing
    return ("number" if whole and present else "other"), (), missing


def _is_decimal(cell: object) -> bool:
    """Whether a cell is a number on a scale; `007` is a code."""
    return number(cell) is not None and not re.match(r"-?0\d", str(cell))


def _few(cells: Sequence[object]) -> Sequence[str] | None:
    """The different values of a column, if they are few; numbers by their size."""
    counts = Counter(str(cell).lower() if isinstance(cell, bool) else str(cell) for cell in cells)
    if not 2 <= len(counts) <= min(MOST_CLASSES, len(cells) // 2):
        return None
    numbers = [whole_number(name) for name in counts]
    if None in numbers:
        return sorted(counts)
    return sorted(counts, key=lambda name: whole_number(name) or 0)


def _names_pictures(cells: Sequence[object]) -> bool:
    """Whether a column holds the names of files that end as pictures do."""
    return bool(cells) and all(isinstance(cell, str) and cell.lower().endswith(ENDINGS) for cell in cells[:20])


def mean_words(cells: Iterable[object]) -> float:
    """Words of a cell on average."""
    counts = [num_words(cell) for cell in cells if not is_missing(cell)]
    return float(np.mean(counts)) if counts else 0.0


def _long_names(texts: Sequence[str], rows: datasets.Dataset) -> dict[str, Sequence[str]]:
    """Columns of classes whose names are several words: few values next to another text with many; with the values."""
    cells = {name: [cell for cell in rows[name][:] if not is_missing(cell)] for name in texts}
    most = max((len(set(column)) for column in cells.values()), default=0)
    classes = {name: _few(column) for name, column in cells.items() if 2 * len(set(column)) <= most}
    return {name: values for name, values in classes.items() if values is not None}


def task_lines(wishes: Wishes, data: Look) -> list[str]:
    """The `task` section.

    Raises:
        InputError: the label's column does not hold what the task needs.
    """
    columns, task = dict(wishes.columns or {}), wishes.task
    lines = [f"  kind: {task}" + (f"   # guessed: {wishes.why}" if wishes.why else "")]
    order = (*READ, "tools", "label", "tags", "answers", "separator")
    lines += [f"  {key}: {plain(columns[key])}" for key in order if key in columns]
    if "prompt" in columns:
        lines.append("  chat: true                    # a user's and an assistant's turn")
    if task == "question_answering":
        empty = any(
            not cell or (isinstance(cell, dict) and not cell.get("text")) for cell in data.rows[columns["answers"]]
        )
        lines += ["  no_answer: true               # some questions have none"] if empty else []
    labels = _labels(task or "", columns, data)
    if labels is not None:
        one_hot = task == "multi_label_classification" and _num_one_hot(columns, data) is not None
        why = "the data do not name them: give each its name" if one_hot else "the position is the class id"
        lines.append(f"  labels: {json.dumps(list(labels), ensure_ascii=False)}   # {why}")
        lines += ["  label_is: one_hot             # a 0 or 1 for each class"] if one_hot else []
    return lines


def _num_one_hot(columns: Mapping[str, str], data: Look) -> int | None:
    """How many classes lists of 0 and 1 are about; None if the lists hold something else."""
    if "separator" in columns or "label" not in columns:
        return None
    cells = [cell for cell in data.rows[columns["label"]] if cell is not None]
    sizes = {len(cell) for cell in cells if isinstance(cell, list)}
    count = max(sizes, default=0)
    return count if count > 1 and is_one_hot([f"class_{i}" for i in range(count)], cells) else None


def _labels(task: str, columns: Mapping[str, str], data: Look) -> Sequence[str] | None:
    """The classes, of a task that has any."""
    column = columns.get("tags", columns.get("label", ""))
    if task in ("text_classification", "image_classification"):
        values = data.classes.get(column)
        if values is None:
            raise InputError(
                f"--label {column}: has no 2 to {MOST_CLASSES} values that come twice; init makes recipes of classes"
            )
        return values
    if task not in ("multi_label_classification", "token_classification"):
        return None
    inner = getattr(data.rows.features[column], "feature", None)
    if isinstance(inner, datasets.ClassLabel):
        return list(inner.names)
    num_one_hot = _num_one_hot(columns, data)
    if num_one_hot is not None:
        return [f"class_{index}" for index in range(num_one_hot)]
    separator = columns.get("separator")
    cells = [str(cell or "").split(separator) if separator else cell for cell in data.rows[column]]
    if not all(isinstance(cell, list) for cell in cells):
        flag = "tags" if task == "token_classification" else "label"
        raise InputError(f"--{flag} {column}: holds no lists; of texts, say what stands between the names: --separator")
    names = sorted({str(name).strip() for cell in cells for name in cell} - {""})
    if len(names) > MOST_CLASSES:
        raise InputError(f"--label {column}: has {len(names)} different classes, more than {MOST_CLASSES}")
    return [*(["O"] if "O" in names else []), *(name for name in names if name != "O")]


def plain(text: str) -> str:
    """A YAML scalar."""
    if re.fullmatch(r"[A-Za-z_~/][\w./:~-]*", text) and ": " not in text:
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
