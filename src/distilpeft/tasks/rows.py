"""Tasks: what a row is, how it becomes tokens and labels, which rows count, and how its scores are computed.

One module per task, all with the same small set of names (see `text_classification`). To add a task: add a
module, its section in `task_sections.py`, a line in `kinds.py`, and one to `TASKS`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.reading import duplicates, read_splits
from distilpeft.data.reading import origin as data_origin
from distilpeft.errors import InputError
from distilpeft.machine.files import SUMS, digest_json, is_whole, seal_folder
from distilpeft.recipe import Recipe
from distilpeft.tasks import (
    embedding,
    image_classification,
    multi_label_classification,
    question_answering,
    regression,
    text_classification,
    token_classification,
)
from distilpeft.tasks.language import causal_lm, seq2seq

MainFirst = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which the main process goes before the others."""
MOST_GROUPS, MOST_LISTED = 30, 5
TASKS: dict[str, ModuleType] = {
    "text_classification": text_classification,
    "multi_label_classification": multi_label_classification,
    "regression": regression,
    "token_classification": token_classification,
    "question_answering": question_answering,
    "causal_lm": causal_lm,
    "seq2seq": seq2seq,
    "image_classification": image_classification,
    "embedding": embedding,
}


def task_module(recipe: Recipe) -> ModuleType:
    """The module of the recipe's task."""
    return TASKS[recipe.task.kind]


def inputs_of(data: TaskData, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """All that a model takes for a batch, on the CPU as that is."""
    more = getattr(data.task, "inputs", None)
    found: dict[str, Any] = batch["inputs"] if more is None else more(model, batch)
    return found


class Tokens:
    """The rows of one split as one model reads them, memory-mapped.

    Attributes:
        dataset: the task's columns; row i has row_id i.
        lengths_N: tokens per row.
        num_truncated: rows that were cut to `data.max_tokens`.
    """

    def __init__(self, task: ModuleType, dataset: datasets.Dataset, tokenizer: Any, section: Any = None) -> None:
        self._task, self._tokenizer, self._section = task, tokenizer, section
        self.dataset = dataset
        self.lengths_N: NDArray[np.int32] = self.column("num_tokens")
        self.num_truncated = int(self.column("truncated").sum())

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers, one per row."""
        found: NDArray[Any] = self.dataset.select_columns([name]).with_format("numpy")[:][name]
        return found

    def load_batch(self, row_ids_N: NDArray[np.int64], epoch: int | None = None) -> dict[str, Any]:
        """Collate these rows; the batch also holds their `row_ids_N`, and `epoch`.

        With an epoch they come as it sees them in training, where the task varies them.
        """
        ids = row_ids_N.tolist()
        rows = self.dataset[ids]
        vary = getattr(self._task, "vary", None)
        if epoch is not None and vary is not None:
            rows = vary(self._section, rows, ids, epoch, self._tokenizer)
        return {**self._task.collate(rows, self._tokenizer), "row_ids_N": row_ids_N, "epoch": epoch}


class TaskData:
    """The recipe's rows: read and checked once, tokenised for each model that asks.

    Attributes:
        digest: names the rows; changes whenever one of them does.
        duplicates: texts shared between splits, `train/test` → count.
        skipped: source → rows that could not be used and were left out.
    """

    def __init__(self, recipe: Recipe, digest: str, cache: Path, main_first: MainFirst = nullcontext) -> None:
        self.recipe, self.task, self.digest = recipe, task_module(recipe), digest
        self._cache, self._main_first = cache, main_first
        self._splits, self.skipped = read_task_splits(recipe)
        self._tokens: dict[str, Tokens] = {}
        self.duplicates = duplicates({name: self.task.texts(recipe.task, rows) for name, rows in self._splits.items()})

    def texts(self, split: str, count: int) -> list[Any]:
        """The first texts of a split, or pairs of them, as its rows hold them."""
        rows = self._splits[split]
        return list(self.task.texts(self.recipe.task, rows.select(range(min(count, len(rows))))))

    def groups(self) -> NDArray[np.str_] | None:
        """The group of each row that models are judged on; None if the recipe asks for none."""
        column = self.recipe.evaluate.groups
        return None if column is None else _groups(self._splits[self.recipe.evaluate.split], column)

    def tokens(self, split: str, tokenizer: Any, tokenizer_digest: str) -> Tokens:
        """Tokenise a split, or find it on disk; `tokenizer_digest` names the tokenizer."""
        rows = self._splits[split]
        name = digest_json([self.digest, split, tokenizer_digest, self.recipe.data.max_tokens])[:16]
        if name in self._tokens:  # no process waits for the others then
            return self._tokens[name]
        folder = self._cache / f"tokens-{split}-{name}"
        task, max_tokens = self.recipe.task, self.recipe.data.max_tokens
        with self._main_first():  # the others find the main process's file
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            dataset = rows.map(
                lambda batch: self.task.encode(task, rows.features, batch, tokenizer, max_tokens),
                batched=True,
                remove_columns=rows.column_names,
                features=self.task.features(task),
                cache_file_name=str(folder / "rows.arrow"),
                new_fingerprint=name,
            )
            if not (folder / SUMS).is_file():
                seal_folder(folder)
        self._tokens[name] = Tokens(self.task, dataset, tokenizer, task)
        return self._tokens[name]


def read_task_splits(recipe: Recipe) -> tuple[dict[str, datasets.Dataset], dict[str, int]]:
    """Read, check and split the recipe's rows.

    Returns:
        The rows by split; how many could not be used and were left out, by source.

    Raises:
        InputError: see `data.read_splits` and `usable`; or the training rows are all alike.
    """
    task, column = task_module(recipe), recipe.evaluate.groups

    def check(rows: datasets.Dataset, numbers: NDArray[np.int64], origin: str) -> datasets.Dataset:
        kept = usable(task, recipe.task, rows, numbers, origin, recipe.data.on_bad_row)
        if column is not None and column not in rows.column_names:
            has = ", ".join(rows.column_names)
            raise InputError(f"evaluate.groups: {origin} has no column {column!r}; its columns are {has}")
        if len(kept) < len(rows):
            skipped[origin] = len(rows) - len(kept)
        return kept

    skipped: dict[str, int] = {}
    splits = read_splits(recipe.data, check)
    learnable = getattr(task, "learnable", None)
    fault = learnable(recipe.task, splits["train"]) if learnable is not None else None
    if fault is not None:
        raise InputError(f"{data_origin(recipe.data)}: of the training rows {fault}: there is nothing to learn")
    if column is not None:
        found = len(np.unique(_groups(splits[recipe.evaluate.split], column)))
        if found > MOST_GROUPS:
            raise InputError(
                f"evaluate.groups: column {column!r} has {found} values in the {recipe.evaluate.split} rows; scores "
                f"are told for at most {MOST_GROUPS} groups"
            )
    return splits, skipped


def usable(
    task: ModuleType, section: Any, rows: datasets.Dataset, numbers_N: NDArray[np.int64], origin: str,
    on_bad_row: str = "error",
) -> datasets.Dataset:  # fmt: skip
    """The rows that the task can use.

    Args:
        task: the recipe's.
        section: names the columns.
        rows: the rows.
        numbers_N: each row's number in its source, from 1 (a CSV header is not counted).
        origin: the source, for the message.
        on_bad_row: the recipe's.

    Raises:
        InputError: a column is missing; or there are others, and the recipe does not leave them out: what is wrong
            with the first, and where the first five are.
    """
    task.check_columns(section, rows, origin)
    bad, first = [], ""
    for index, fault in enumerate(task.faults(section, rows)):
        if fault is not None:
            first = first or fault
            bad.append(index)
    if not bad:
        return rows
    if on_bad_row == "skip" and len(bad) < len(rows):
        return rows.select(np.setdiff1d(np.arange(len(rows)), bad))
    listed = ", ".join(str(number) for number in numbers_N[bad[:MOST_LISTED]])
    count = f"{len(bad)} bad rows of {len(rows)}: {listed}{', ...' if len(bad) > MOST_LISTED else ''}"
    way = "mend them" if len(bad) == len(rows) else "mend them, or leave them out with data.on_bad_row: skip"
    raise InputError(f"{origin}: row {numbers_N[bad[0]]}: {first} ({count}); {way}")


def _groups(rows: datasets.Dataset, column: str) -> NDArray[np.str_]:
    """Values of a column as text; a class by its name, a missing one as `(none)`."""
    feature, cells = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        cells = [None if cell is None else feature.int2str(cell) for cell in cells]
    named = ["" if cell is None else str(cell).strip() for cell in cells]
    return np.array([name or "(none)" for name in named], dtype=np.str_)


class Part:
    """Some rows of a split, for scores of their own."""

    def __init__(self, rows: Tokens, mask_N: NDArray[np.bool_]) -> None:
        self._rows, self._mask_N = rows, mask_N
        self.lengths_N = rows.lengths_N[mask_N]

    def column(self, name: str) -> NDArray[Any]:
        """See `Tokens.column`."""
        found: NDArray[Any] = self._rows.column(name)[self._mask_N]
        return found
