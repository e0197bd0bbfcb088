"""Rows as the data have them to rows that a task can use: checked one by one, in columns of the same types.

Rows without labels take the same way, but for the columns that hold labels: these are not read, and blanks that nobody
looks at stand where they would be.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.labels import LABEL, Fault
from distilpeft.data.reading import SPLITS, Places
from distilpeft.data.tables import FAULT
from distilpeft.data.unlabelled import chosen_labels, evened, not_held_out
from distilpeft.data.views import VIEW
from distilpeft.errors import InputError
from distilpeft.recipe.data import Data, Unlabelled
from distilpeft.tasks import text_rows
from distilpeft.tasks.task import Label, Task

FaultFinder = Callable[[datasets.Dataset], Iterator[str | None]]
"""Says why each row cannot be used, None if it can."""
GROUP = "__group__"
"""Column of checked rows with the group that a row is scored in."""
TEXT_KEYS = ("text", "pair", "question", "context", "prompt", "completion", "source", "target")
LABEL_KEYS = ("label", "labels", "tags")
ANSWER_KEYS = (*LABEL_KEYS, "answers")
"""Keys of columns that hold texts; of those that `LABEL` stands for; and of all that rows without a label lack."""
UNLABELLED, VIEWS = "unlabelled", "views"
"""The splits of the rows without labels, and of changed copies."""
NOTHING: tuple[object, ...] = (None, "", [], "[]", "null")
"""Cells of a watched column that hold nothing."""


def usable(
    task: Task,
    rows: datasets.Dataset,
    places: Places,
    on_bad_row: str = "error",
    *,
    groups: str | None = None,
    more: Sequence[FaultFinder] = (),
    labelled: bool = True,
) -> datasets.Dataset:
    """The rows that the task can use, in columns of the same types whatever the file's were.

    Args:
        task: the recipe's.
        rows: the rows.
        places: where they come from, for messages.
        on_bad_row: the recipe's.
        groups: column of groups to score apart.
        more: what else may be wrong with rows: tokens that a model lacks, chats that a template cannot render.
        labelled: whether they have labels; if not, columns of labels are not looked at.

    Raises:
        InputError: a column is missing; or there are bad rows, and the recipe does not leave them out: what is wrong
            with the first, and where the first few are.
    """
    if not labelled:
        unread = [column for key, column in task.columns() if key in ANSWER_KEYS and column in rows.column_names]
        rows = rows.remove_columns(unread)
    keys = [(f"task.{key}", column) for key, column in task.columns() if labelled or key not in ANSWER_KEYS]
    _check_columns(task, rows, places, [*keys, *([] if groups is None else [("evaluate.groups", groups)])])
    labels = task.labels(rows) if labelled else None
    values = None if labels is None else list(labels)
    checks: list[Iterable[Any]] = [text_rows.cells(rows, FAULT)] if FAULT in rows.column_names else []
    checks.append(task.faults(rows))
    checks += [(label if isinstance(label, Fault) else None for label in values)] if values is not None else []
    checks += [find(rows) for find in more]
    bad: dict[int, str] = {}
    for index, faults in enumerate(zip(*checks, strict=True)):
        fault = next(filter(None, faults), None)
        if fault is not None:
            bad[index] = fault
    if bad and not (on_bad_row == "skip" and len(bad) < len(rows)):
        first = next(iter(bad))
        way = "" if len(bad) == len(rows) else " or skip them with data.on_bad_row: skip"
        raise InputError(
            f"{places.of(first)}: {bad[first]} ({len(bad)} bad rows of {len(rows)}: {places.listed(list(bad))}); fix "
            f"them{way}"
        )
    kept = np.setdiff1d(np.arange(len(rows)), list(bad))
    good = rows.select(kept) if bad else rows
    if not labelled:
        return _blank(task, _as_texts(task, good))
    return _checked(task, good, None if values is None else [values[index] for index in kept], groups)


def _check_columns(task: Task, rows: datasets.Dataset, places: Places, keys: Iterable[tuple[str, str]]) -> None:
    """Look for the columns that these keys of the recipe name.

    Raises:
        InputError: one is missing; or there is one that means something, of which the recipe does not say what to do.
    """
    for key, column in keys:
        if column not in rows.column_names:
            has = ", ".join(name for name in rows.column_names if name != FAULT)
            raise InputError(f"{key}: {places.origin} has no column {column!r}; its columns are {has}")
    for name in task.watched():
        if name in rows.column_names and any(cell not in NOTHING for cell in text_rows.cells(rows, name)):
            raise InputError(
                f"task.{name}: {places.origin} has a column {name!r} that the recipe does not name; write task.{name}: "
                f"{name} to use it, or null to leave it out"
            )


def _checked(
    task: Task, rows: datasets.Dataset, labels: list[Label | Fault] | None, groups: str | None
) -> datasets.Dataset:
    """Rows with the columns that the task reads, its labels and the group."""
    own = None if groups is None else _as_groups(rows, groups)
    unread = LABEL_KEYS if labels is not None else ()
    read = dict.fromkeys(column for key, column in task.columns() if key not in unread)
    rows = _as_texts(task, rows.select_columns(list(read)))
    if labels is not None:
        rows = _with(rows, LABEL, labels, task.label_feature())
    return rows if own is None else _with(rows, GROUP, own, datasets.Value("string"))


def _with(rows: datasets.Dataset, name: str, cells: Sequence[object], feature: object) -> datasets.Dataset:
    """One column more; it would be pickled for a fingerprint, which nothing here goes by."""
    return rows.add_column(name, cells, feature=feature, new_fingerprint=uuid.uuid4().hex)


def _as_texts(task: Task, rows: datasets.Dataset) -> datasets.Dataset:
    """Rows whose texts are in the one type that all sources share."""
    for key, column in task.columns():
        if key in TEXT_KEYS and rows.features[column] != datasets.Value("string"):
            rows = _as_text(rows, column)
    return rows


def _as_text(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """A column of texts in the one type that all sources share."""
    if getattr(rows.features[column], "dtype", "") == "large_string":
        return rows.cast_column(column, datasets.Value("string"))
    features = datasets.Features({**rows.features, column: datasets.Value("string")})
    return rows.map(lambda batch: {column: batch[column]}, batched=True, features=features, keep_in_memory=True)


def _as_groups(rows: datasets.Dataset, column: str) -> list[str]:
    """Values of a column as text; a class by its name, a missing one as `(none)`."""
    feature, cells = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        cells = [None if cell is None else feature.int2str(cell) for cell in cells]
    names = ["" if cell is None else str(cell).strip() for cell in cells]
    return [name or "(none)" for name in names]


def groups_of(rows: datasets.Dataset) -> NDArray[np.str_]:
    """The group of each checked row."""
    return np.array(rows[GROUP][:], dtype=np.str_)


def without_label(task: Task, rows: datasets.Dataset) -> NDArray[np.bool_]:
    """Which rows have nothing in any column of labels."""
    empty_N = np.ones(len(rows), dtype=bool)
    for key, column in task.columns():
        if key in ANSWER_KEYS and column in rows.column_names:
            empty_N &= np.array([_is_empty(cell) for cell in text_rows.cells(rows, column)], dtype=bool)
    return empty_N


def _is_empty(cell: object) -> bool:
    if isinstance(cell, str):
        return not cell.strip()
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def split_labels(task: Task, train: datasets.Dataset, data: Data) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training rows that keep their labels, and the others without theirs; see `Data.labelled`."""
    assert data.labelled is not None
    feature = train.features.get(LABEL)
    by_class = isinstance(feature, datasets.Value) and feature.dtype == "int64"
    classes = train[LABEL][:] if by_class else [None] * len(train)
    kept = chosen_labels(classes, data.labelled, 0 if data.split is None else data.split.seed)
    rest = np.setdiff1d(np.arange(len(train)), kept)
    others = train.select(rest)
    return train.select(kept), _blank(task, others) if len(rest) else others


def unlabelled_columns(task: Task, data: Unlabelled) -> dict[str, str]:
    """Column of the rows without labels → what it is called in the main source."""
    read = {key: column for key, column in task.columns() if key not in ANSWER_KEYS}
    for key in data.columns:
        if key not in read:
            raise InputError(f"data.unlabelled.columns.{key}: what is read of a row is {', '.join(read)}")
    return {data.columns.get(key, column): column for key, column in read.items()}


def _blank(task: Task, rows: datasets.Dataset) -> datasets.Dataset:
    """Checked rows without what they teach: only what is read, and blanks where labels would stand."""
    read = dict.fromkeys(column for key, column in task.columns() if key not in ANSWER_KEYS)
    return _with_blanks(task, rows.select_columns(list(read)))


def _with_blanks(task: Task, rows: datasets.Dataset) -> datasets.Dataset:
    blanks = task.blanks(rows)
    return rows if blanks is None else _with(rows, LABEL, list(blanks), task.label_feature())


def taught_only(task: Task, splits: Mapping[str, datasets.Dataset], rows: datasets.Dataset) -> datasets.Dataset:
    """Rows without labels, less those that also stand in validation or test."""
    held_out = itertools.chain.from_iterable(task.texts(splits[name]) for name in SPLITS[1:])
    keep_N = np.array(list(not_held_out(task.texts(rows), held_out)), dtype=bool)
    return rows.select(np.flatnonzero(keep_N))


def views_of(task: Task, splits: Mapping[str, datasets.Dataset], data: Data) -> datasets.Dataset:
    """Changed copies of all rows that the student learns from, as rows without labels.

    Copies that change nothing, equal others, or also stand in validation or test, are left out; those of pictures,
    which are made later, are all kept.
    """
    assert data.views is not None
    parts = [_blank(task, splits[name]) for name in ("train", UNLABELLED) if name in splits]
    taught = datasets.concatenate_datasets(parts)
    seed = 0 if data.split is None else data.split.seed
    read = taught.select_columns([column for column in taught.column_names if column != LABEL])
    views = task.views(read, data.views, seed)
    if VIEW not in views.column_names:
        texts = {evened(text) for rows in (taught, *(splits[name] for name in SPLITS[1:])) for text in task.texts(rows)}
        views = views.select([at for at, text in enumerate(task.texts(views)) if _is_new(evened(text), texts)])
    return _with_blanks(task, views)


def _is_new(text: object, known: set[object]) -> bool:
    """Whether a text has not been seen; from now on it has."""
    is_new = text not in known
    known.add(text)
    return is_new
