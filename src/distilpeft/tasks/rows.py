"""The recipe's rows: read and checked once, tokenised for each model that asks.

To add a task: its section in `recipe/task.py`, a file with its class, and a line in `TASKS`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.reading import duplicates, read_splits
from distilpeft.data.reading import origin as data_origin
from distilpeft.errors import InputError
from distilpeft.machine.files import SUMS, digest_json, is_whole, seal_folder
from distilpeft.recipe import Recipe
from distilpeft.tasks.embedding import EmbeddingTask
from distilpeft.tasks.image_classification import ImageClassificationTask
from distilpeft.tasks.language.causal_lm import CausalLMTask
from distilpeft.tasks.language.seq2seq import Seq2SeqTask
from distilpeft.tasks.multi_label_classification import MultiLabelTask
from distilpeft.tasks.question_answering import QuestionAnsweringTask
from distilpeft.tasks.regression import RegressionTask
from distilpeft.tasks.task import Batch, Task, Text
from distilpeft.tasks.text_classification import TextClassificationTask
from distilpeft.tasks.token_classification import TokenClassificationTask

if TYPE_CHECKING:
    from distilpeft.tasks.task import InputReader

MainFirst = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which the main process goes before the others."""
MOST_GROUPS, MOST_LISTED = 30, 5
TASKS: dict[str, Callable[..., Task]] = {
    "text_classification": TextClassificationTask,
    "multi_label_classification": MultiLabelTask,
    "regression": RegressionTask,
    "token_classification": TokenClassificationTask,
    "question_answering": QuestionAnsweringTask,
    "causal_lm": CausalLMTask,
    "seq2seq": Seq2SeqTask,
    "image_classification": ImageClassificationTask,
    "embedding": EmbeddingTask,
}


def task_of(recipe: Recipe) -> Task:
    """The recipe's task, with its settings."""
    return TASKS[recipe.task.kind](recipe.task)


class Tokens:
    """The rows of one split as one model reads them, memory-mapped.

    Attributes:
        dataset: the task's columns; row i has row_id i.
        lengths_N: tokens per row.
        num_truncated: rows that were cut to `data.max_tokens`.
    """

    def __init__(self, task: Task, dataset: datasets.Dataset, tokenizer: InputReader) -> None:
        self._task, self._tokenizer = task, tokenizer
        self.dataset = dataset
        self.lengths_N: NDArray[np.int32] = self.column("num_tokens")
        self.num_truncated = int(self.column("truncated").sum())

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers, one per row."""
        found: NDArray[Any] = self.dataset.select_columns([name]).with_format("numpy")[:][name]
        return found

    def load_batch(self, row_ids_N: NDArray[np.int64], epoch: int | None = None) -> Batch:
        """Collate these rows; with an epoch they come as it sees them in training, where the task varies them."""
        ids = row_ids_N.tolist()
        columns = self.dataset[ids]
        if epoch is not None:
            columns = self._task.vary(columns, ids, epoch, self._tokenizer)
        return {**self._task.collate(columns, self._tokenizer), "row_ids_N": row_ids_N, "epoch": epoch}


@dataclass(frozen=True)
class RowReader:
    """How a model reads rows: its tokenizer, or how it reads pictures, and the digest that names it."""

    tokenizer: InputReader
    digest: str


class TaskData:
    """The recipe's rows: read and checked once, tokenised for each model that asks.

    Attributes:
        digest: names the rows; changes whenever one of them does.
        duplicates: texts shared between splits, `train/test` → count.
        skipped: source → rows that could not be used and were left out.
    """

    def __init__(self, recipe: Recipe, digest: str, cache: Path, main_first: MainFirst = nullcontext) -> None:
        self.recipe, self.task, self.digest = recipe, task_of(recipe), digest
        self._cache, self._main_first = cache, main_first
        self._splits, self.skipped = read_task_splits(recipe)
        self._tokens: dict[str, Tokens] = {}
        self.duplicates = duplicates({name: self.task.texts(rows) for name, rows in self._splits.items()})

    def texts(self, split: str, count: int) -> list[Text]:
        """The first texts of a split, or pairs of them, as its rows hold them."""
        rows = self._splits[split]
        return list(self.task.texts(rows.select(range(min(count, len(rows))))))

    def groups(self) -> NDArray[np.str_] | None:
        """The group of each row that models are judged on; None if the recipe asks for none."""
        column = self.recipe.evaluate.groups
        return None if column is None else _groups(self._splits[self.recipe.evaluate.split], column)

    def tokens(self, split: str, reader: RowReader) -> Tokens:
        """Tokenise a split, or find it on disk."""
        rows = self._splits[split]
        name = digest_json([self.digest, split, reader.digest, self.recipe.data.max_tokens])[:16]
        if name in self._tokens:  # no process waits for the others then
            return self._tokens[name]
        folder = self._cache / f"tokens-{split}-{name}"
        tokenizer, max_tokens = reader.tokenizer, self.recipe.data.max_tokens
        with self._main_first():  # the others find the main process's file
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            dataset = rows.map(
                lambda batch: self.task.encode(rows.features, batch, tokenizer, max_tokens),
                batched=True,
                remove_columns=rows.column_names,
                features=self.task.features(),
                cache_file_name=str(folder / "rows.arrow"),
                new_fingerprint=name,
            )
            if not (folder / SUMS).is_file():
                seal_folder(folder)
        self._tokens[name] = Tokens(self.task, dataset, tokenizer)
        return self._tokens[name]


def read_task_splits(recipe: Recipe) -> tuple[dict[str, datasets.Dataset], dict[str, int]]:
    """Read, check and split the recipe's rows.

    Returns:
        The rows by split; how many could not be used and were left out, by source.

    Raises:
        InputError: see `data.read_splits` and `usable`; or the training rows are all alike.
    """
    task, column = task_of(recipe), recipe.evaluate.groups

    def check(rows: datasets.Dataset, numbers: NDArray[np.int64], origin: str) -> datasets.Dataset:
        kept = usable(task, rows, numbers, origin, recipe.data.on_bad_row)
        if column is not None and column not in rows.column_names:
            has = ", ".join(rows.column_names)
            raise InputError(f"evaluate.groups: {origin} has no column {column!r}; its columns are {has}")
        if len(kept) < len(rows):
            skipped[origin] = len(rows) - len(kept)
        return kept

    skipped: dict[str, int] = {}
    splits = read_splits(recipe.data, check)
    fault = task.nothing_to_learn(splits["train"])
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
    task: Task, rows: datasets.Dataset, numbers_N: NDArray[np.int64], origin: str, on_bad_row: str = "error"
) -> datasets.Dataset:
    """The rows that the task can use.

    Args:
        task: the recipe's.
        rows: the rows.
        numbers_N: each row's number in its source, from 1 (a CSV header is not counted).
        origin: the source, for the message.
        on_bad_row: the recipe's.

    Raises:
        InputError: a column is missing; or there are others, and the recipe does not leave them out: what is wrong
            with the first, and where the first five are.
    """
    task.check_columns(rows, origin)
    bad, first = [], ""
    for index, fault in enumerate(task.faults(rows)):
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


class RowSubset:
    """Some rows of a split, for scores of their own."""

    def __init__(self, rows: Tokens, mask_N: NDArray[np.bool_]) -> None:
        self._rows, self._mask_N = rows, mask_N
        self.lengths_N = rows.lengths_N[mask_N]

    @property
    def dataset(self) -> datasets.Dataset:
        """See `Rows`."""
        return self._rows.dataset.select(np.flatnonzero(self._mask_N))

    def column(self, name: str) -> NDArray[Any]:
        """See `Rows`."""
        found: NDArray[Any] = self._rows.column(name)[self._mask_N]
        return found

    def load_batch(self, row_ids_N: NDArray[np.int64], epoch: int | None = None) -> Batch:
        """See `Rows`; `row_ids_N` count the rows of the subset."""
        return self._rows.load_batch(np.flatnonzero(self._mask_N)[row_ids_N], epoch)
