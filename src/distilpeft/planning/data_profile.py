"""What data show of the task that they are for, and the `task` section that follows; for `distilpeft init`."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import datasets
import numpy as np
import typer

from distilpeft.data.labels import is_missing, is_one_hot, number, whole_number
from distilpeft.data.reading import load_parts
from distilpeft.errors import InputError
from distilpeft.planning.text_profile import TOKENS_PER_WORD, estimate, language_of, text_of
from distilpeft.recipe.data import Data, Split
from distilpeft.recipe.task import KINDS

LOOKED_AT = 2000
"""Rows that text lengths and classes are found in."""
MOST_CLASSES, WORDS_OF_A_TEXT = 100, 2
LABEL_NAMES = ("label", "labels", "class", "category", "intent", "topic", "topics", "target", "sentiment", "score")
FORMS: dict[str, Sequence[Mapping[str, Sequence[str]]]] = {
    "token_classification": [{"words": ("words", "tokens"), "tags": ("tags", "ner_tags", "pos_tags", "labels")}],
    "question_answering": [{"question": ("question",), "context": ("context",), "answers": ("answers", "answer")}],
    "causal_lm": [
        {"messages": ("messages",)},
        {"prompt": ("prompt",), "completion": ("completion",)},
        {"prompt": ("instruction",), "completion": ("output", "response", "completion")},
    ],
    "seq2seq": [
        {"source": ("source", "document", "article", "dialogue", "input"), "target": ("target", "summary", "output")},
        {"source": ("source",), "target": ("target", "translation")},
    ],
}
"""Tasks by the usual names of their columns: recipe key → names."""
READ = ("image", "text", "pair", "prompt", "completion", "messages", "words", "question", "context", "source", "target")
"""Keys of columns that models read."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Ask = Callable[[str, str, Sequence[str]], str]
"""(flag, question, choices or none) → the answer."""


@dataclass(frozen=True)
class Wishes:
    """What users give on the command line; None is asked for or found out.

    Attributes:
        data: see `data.source`.
        task: a name of `KINDS`.
        columns: recipe key of the task → column, and `separator`.
        device: `cpu`, or a GPU's memory in GB.
        size_mb: of the smallest export, at most.
        language: `en` or `many`; None: what the data are in.
        max_tokens: of a row.
        packages: only models that come as Python packages, for machines without a hub.
        teacher: instead of the catalogue's.
        student: likewise.
        latency_ms: of a row on this machine's processors, at most.
        unlabelled: more rows, without labels; see `data.unlabelled`.
    """

    data: str
    task: str | None = None
    columns: Mapping[str, str] | None = None
    device: str = "cpu"
    size_mb: float | None = None
    language: str | None = None
    max_tokens: int | None = None
    packages: bool = False
    teacher: str | None = None
    student: str | None = None
    latency_ms: float | None = None
    unlabelled: str | None = None

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
        numbers: columns of numbers that are no classes.
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
    found: dict[str, list[str]] = {kind: [] for kind in ("text", "class", "number", "list")}
    classes: dict[str, Sequence[str]] = {}
    missing: dict[str, int] = {}
    for name in (one for one in rows.column_names if one not in pictures):
        kind, values, missing[name] = _kind(rows.features[name], rows[name][:], some[name])
        found.setdefault(kind, []).append(name)
        if kind == "class":
            classes[name] = values
    language = language_of(text_of(cell) for name in (*found["text"], *found["list"]) for cell in some[name])
    splits = {name: len(part) for name, part in parts.items()}
    return Look(splits, some, found["text"], classes, found["number"], found["list"], pictures, missing, language)


def _kind(feature: object, cells: Sequence[object], some: Sequence[object]) -> tuple[str, Sequence[str], int]:
    """What a column holds (text, class, number, list, or nothing to learn), its classes, and cells without anything."""
    if isinstance(feature, datasets.ClassLabel):
        return "class", list(feature.names), sum(cell is None for cell in cells)
    there = [cell for cell in cells if not is_missing(cell)]
    missing = len(cells) - len(there)
    if any(isinstance(cell, list | dict) for cell in there[:LOOKED_AT]):
        return "list", (), missing
    whole = all(whole_number(cell) is not None for cell in there)
    if not whole and there and all(_is_decimal(cell) for cell in there):
        return "number", (), missing
    if not whole and all(isinstance(cell, str) for cell in there) and _mean_words(some) >= WORDS_OF_A_TEXT:
        return "text", (), missing
    values = _few(there)
    if values is not None:
        return "class", values, missing
    return ("number" if whole and there else "other"), (), missing


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
    return bool(cells) and all(isinstance(cell, str) and cell.lower().endswith(PICTURES) for cell in cells[:20])


def _mean_words(cells: Iterable[object]) -> float:
    counts = [estimate(cell) / TOKENS_PER_WORD for cell in cells if not is_missing(cell)]
    return float(np.mean(counts)) if counts else 0.0


def ask_at_terminal(flag: str, question: str, choices: Sequence[str]) -> str:
    """An `Ask` for people at a terminal; elsewhere it names the flag that would have answered."""
    if not sys.stdin.isatty():
        among = f": one of {', '.join(choices)}" if choices else ""
        raise InputError(f"--{flag} is needed{among}")
    while True:
        listed = f" ({', '.join(choices)})" if choices else ""
        answer: str = typer.prompt(f"{question}{listed}")
        if not choices or answer in choices:
            return answer


def settled(wishes: Wishes, seen: Look, ask: Ask) -> Wishes:
    """The wishes with task and columns, found in the data or asked for.

    Raises:
        InputError: a column is not there.
    """
    given = dict(wishes.columns or {})
    for key, column in given.items():
        has = [*seen.rows.column_names, *(name for name in seen.pictures if name not in seen.rows.column_names)]
        if key != "separator" and column not in has:
            raise InputError(f"--{key} {column}: {wishes.data} has {', '.join(has)}")
    task = wishes.task or _task(given, seen) or ask("task", "What is it?", list(KINDS))
    if task == "embedding":
        given = given or {"text": _one("text", list(seen.columns), "Which column holds the text?", ask)}
    elif task in FORMS:
        given = _by_name(task, given, seen, ask)
    else:
        if "label" not in given:
            fitting = _label_columns(task, seen, given)
            named = [name for name in fitting if name.lower() in LABEL_NAMES]
            given["label"] = _one("label", named or fitting, "Which column holds what is to be learnt?", ask)
        if task == "image_classification" and "image" not in given:
            given["image"] = _one("image", list(seen.pictures), "Which column holds the picture?", ask)
        if task != "image_classification" and "text" not in given:
            texts = [name for name in seen.columns if name not in given.values()]
            given["text"] = _one("text", texts, "Which column holds the text?", ask)
    return replace(wishes, task=task, columns=given)


def _label_columns(task: str, seen: Look, given: Mapping[str, str]) -> list[str]:
    if task == "regression":
        return [*seen.numbers, *seen.classes]
    if task == "multi_label_classification":
        return [*seen.columns, *seen.classes] if "separator" in given else list(seen.lists)
    return list(seen.classes)


def _by_name(task: str, given: Mapping[str, str], seen: Look, ask: Ask) -> dict[str, str]:
    """The columns of a task that usual names tell, for those that are not given."""
    names = {name.lower(): name for name in seen.filled()}
    for form in FORMS[task]:
        found = {key: next((names[n] for n in usual if n in names), given.get(key)) for key, usual in form.items()}
        found |= {key: column for key, column in given.items() if key in form}
        if all(found.values()):
            if form.get("prompt") == ("instruction",) and "input" in names:
                count = sum(not is_missing(cell) for cell in seen.rows[names["input"]])
                two = f"{names['instruction']!r} and {names['input']!r}"
                raise InputError(
                    f"init: the prompts are in two columns, {two} (with text in {count} of the first "
                    f"{len(seen.rows)} rows); join them into one column"
                )
            return {key: str(column) for key, column in found.items()}
    if task == "causal_lm":
        return dict(given) or {"text": _one("text", list(seen.columns), "Which column holds the text?", ask)}
    return {key: given.get(key) or ask(key, f"Which column holds the {key}?", seen.rows.column_names)
            for key in FORMS[task][0]}  # fmt: skip


def _task(given: Mapping[str, str], seen: Look) -> str | None:
    """The kind of task that the columns are for, if they tell."""
    names = {name.lower() for name in seen.filled()}
    if seen.pictures:
        return "image_classification"
    for task, forms in FORMS.items():
        for form in forms:
            if set(form) & set(given) - {"text"} or all(names & set(usual) for usual in form.values()):
                return task
    label = given.get("label")
    labels = [label] if label else [name for name in seen.rows.column_names if name.lower() in LABEL_NAMES]
    if "separator" in given or any(name in seen.lists for name in labels):
        return "multi_label_classification"
    if labels and all(name in seen.numbers for name in labels):
        return "regression"
    return "text_classification" if labels or "pair" in given else None


def _one(flag: str, found: Sequence[str], question: str, ask: Ask) -> str:
    return found[0] if len(found) == 1 else ask(flag, question, found)


def task_lines(wishes: Wishes, seen: Look) -> list[str]:
    """The `task` section.

    Raises:
        InputError: the label's column does not hold what the task needs.
    """
    columns, task = dict(wishes.columns or {}), wishes.task
    lines = [f"  kind: {task}"]
    order = (*READ, "label", "tags", "answers", "separator")
    lines += [f"  {key}: {plain(columns[key])}" for key in order if key in columns]
    if "prompt" in columns:
        lines.append("  chat: true                    # a user's and an assistant's turn")
    if task == "question_answering":
        empty = any(
            not cell or (isinstance(cell, dict) and not cell.get("text")) for cell in seen.rows[columns["answers"]]
        )
        lines += ["  no_answer: true               # some questions have none"] if empty else []
    labels = _labels(task or "", columns, seen)
    if labels is not None:
        one_hot = task == "multi_label_classification" and _num_one_hot(columns, seen) is not None
        why = "the data do not name them: give each its name" if one_hot else "the position is the class id"
        lines.append(f"  labels: {json.dumps(list(labels), ensure_ascii=False)}   # {why}")
        lines += ["  label_is: one_hot             # a 0 or 1 for each class"] if one_hot else []
    return lines


def _num_one_hot(columns: Mapping[str, str], seen: Look) -> int | None:
    """How many classes lists of 0 and 1 are about; None if the lists hold something else."""
    if "separator" in columns or "label" not in columns:
        return None
    cells = [cell for cell in seen.rows[columns["label"]] if cell is not None]
    sizes = {len(cell) for cell in cells if isinstance(cell, list)}
    count = max(sizes, default=0)
    return count if count > 1 and is_one_hot([f"class_{i}" for i in range(count)], cells) else None


def _labels(task: str, columns: Mapping[str, str], seen: Look) -> Sequence[str] | None:
    """The classes, of a task that has any."""
    column = columns.get("tags", columns.get("label", ""))
    if task in ("text_classification", "image_classification"):
        values = seen.classes.get(column)
        if values is None:
            raise InputError(
                f"--label {column}: has no 2 to {MOST_CLASSES} values that come twice; init makes recipes of classes"
            )
        return values
    if task not in ("multi_label_classification", "token_classification"):
        return None
    inner = getattr(seen.rows.features[column], "feature", None)
    if isinstance(inner, datasets.ClassLabel):
        return list(inner.names)
    num_one_hot = _num_one_hot(columns, seen)
    if num_one_hot is not None:
        return [f"class_{index}" for index in range(num_one_hot)]
    separator = columns.get("separator")
    cells = [str(cell or "").split(separator) if separator else cell for cell in seen.rows[column]]
    if not all(isinstance(cell, list) for cell in cells):
        flag = "tags" if task == "token_classification" else "label"
        raise InputError(f"--{flag} {column}: holds no lists; of texts, say what stands between the names: --separator")
    names = sorted({str(one).strip() for cell in cells for one in cell} - {""})
    if len(names) > MOST_CLASSES:
        raise InputError(f"--label {column}: has {len(names)} different classes, more than {MOST_CLASSES}")
    return [*(["O"] if "O" in names else []), *(name for name in names if name != "O")]


def plain(text: str) -> str:
    """A YAML scalar."""
    return text if re.fullmatch(r"[A-Za-z_~/][\w./:~-]*", text) and ": " not in text else json.dumps(text)
