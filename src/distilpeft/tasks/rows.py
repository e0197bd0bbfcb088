"""The recipe's rows: read and checked once, tokenised for each model that asks.

To add a task: its section in `recipe/task.py`, a file with its class, and a line in `TASKS`.
"""

from __future__ import annotations

import copy
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.labels import LABEL
from distilpeft.data.model_files.recipe_models import token_faults
from distilpeft.data.reading import SPLITS, Places, duplicates, read_splits, read_unlabelled, skipped_lines
from distilpeft.data.reading import origin as data_origin
from distilpeft.data.unlabelled import unlabelled_digest
from distilpeft.errors import InputError
from distilpeft.machine.files import SUMS, digest_json, is_whole, seal_folder
from distilpeft.recipe import Recipe
from distilpeft.tasks import text_rows
from distilpeft.tasks.checked_rows import (
    UNLABELLED,
    VIEWS,
    FaultFinder,
    groups_of,
    split_labels,
    taught_only,
    unlabelled_columns,
    usable,
    views_of,
    without_label,
)
from distilpeft.tasks.embedding import EmbeddingTask
from distilpeft.tasks.image_classification import ImageClassificationTask
from distilpeft.tasks.language.causal_lm import CausalLMTask
from distilpeft.tasks.language.seq2seq import Seq2SeqTask
from distilpeft.tasks.language.template_tokenizer import template_tokenizer, why_absent
from distilpeft.tasks.multi_label_classification import MultiLabelTask
from distilpeft.tasks.question_answering import QuestionAnsweringTask
from distilpeft.tasks.regression import RegressionTask
from distilpeft.tasks.task import Batch, Columns, Task, Text
from distilpeft.tasks.text_classification import TextClassificationTask
from distilpeft.tasks.token_classification import TokenClassificationTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distilpeft.tasks.task import InputReader

MainFirst = Callable[[], AbstractContextManager[object]]
"""Makes a context in which the main process goes before the others."""
MOST_GROUPS = 30
TAUGHT = "train+unlabelled"
"""All that the student learns from: the training rows, then those without labels, then views of both."""
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
        num_labelled: the first rows, this many, have a label; None: all.
    """

    def __init__(
        self, task: Task, dataset: datasets.Dataset, tokenizer: InputReader, num_labelled: int | None = None
    ) -> None:
        self._task, self._tokenizer, self.num_labelled = task, tokenizer, num_labelled
        self.dataset, self._varies = dataset, True
        self.lengths_N: NDArray[np.int32] = self.column("num_tokens")
        self.num_truncated = int(self.column("truncated").sum())

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers, one per row."""
        values: NDArray[Any] = self.dataset.select_columns([name]).with_format("numpy")[:][name]
        return values

    def load_batch(self, row_ids_N: NDArray[np.int64], epoch: int | None = None) -> Batch:
        """Collate these rows; with an epoch they come as it sees them in training, where the task varies them."""
        ids = row_ids_N.tolist()
        columns = self.dataset[ids]
        if epoch is not None and self._varies:
            columns = self._task.vary(columns, ids, epoch, self._tokenizer)
        batch: Batch = {**self._task.collate(columns, self._tokenizer), "row_ids_N": row_ids_N, "epoch": epoch}
        if self.num_labelled is not None:
            _tell_labelled(batch, row_ids_N < self.num_labelled)
        return batch

    def fixed(self) -> Tokens:
        """The same rows, which no epoch varies: what the teacher says of each is known once."""
        rows = copy.copy(self)
        rows._varies = False
        return rows


def _tell_labelled(batch: Batch, labelled_B: NDArray[np.bool_]) -> None:
    """Note in a batch which of the loss's rows have a label."""
    import torch

    if "rows_N" in batch:
        labelled_N = labelled_B[batch["rows_N"].numpy()]
    else:
        labelled_N = labelled_B.repeat(batch["labels_N"].numel() // len(labelled_B))
    batch["labelled_L"] = torch.from_numpy(np.flatnonzero(labelled_N))
    batch["unlabelled_U"] = torch.from_numpy(np.flatnonzero(~labelled_N))


@dataclass(frozen=True)
class RowReader:
    """How a model reads rows: its tokenizer, or how it reads pictures, and the digest that names it."""

    tokenizer: InputReader
    digest: str


def class_counts(recipe: Recipe, splits: Mapping[str, datasets.Dataset]) -> dict[str, list[int]]:
    """Class → how many rows of train, validation and test have it, words of word tags; empty without classes."""
    task, names = task_of(recipe), getattr(recipe.task, "labels", ())
    counts = {
        split: Counter(index for label in text_rows.cells(rows, LABEL) for index in task.classes_in(label))
        for split, rows in splits.items()
        if names
    }
    return {name: [counts[split][index] for split in SPLITS] for index, name in enumerate(names)}


class TaskData:
    """The recipe's rows: read and checked once, tokenised for each model that asks.

    Attributes:
        digest: names the rows; changes whenever one of them does.
        duplicates: texts shared between splits, `train/test` → count.
        skipped: source → rows that could not be used and were left out.
        held_out: rows without labels that were left out because models are judged on them.
    """

    def __init__(self, recipe: Recipe, digest: str, cache: Path, main_first: MainFirst = nullcontext) -> None:
        self.recipe, self.task, self.digest = recipe, task_of(recipe), digest
        self._cache, self._main_first = cache, main_first
        loaded = read_task_rows(recipe)
        self._splits, self.skipped, self.held_out = loaded.splits, loaded.skipped, loaded.held_out
        self._tokens: dict[str, Tokens] = {}
        self.duplicates = duplicates({name: self.task.texts(rows) for name, rows in self._splits.items()})

    def first_rows(self, split: str, count: int) -> datasets.Dataset:
        """The first rows of a split as the data have them."""
        rows = self._splits[split]
        return rows.select(range(min(count, len(rows))))

    def class_counts(self) -> dict[str, list[int]]:
        """Class → how many rows of train, validation and test have it; empty without classes."""
        return class_counts(self.recipe, {name: self._splits[name] for name in SPLITS})

    def shown(self, split: str, rows: Sequence[int]) -> list[str]:
        """Rows of a split as people read them: texts, or pairs with a bar between."""
        texts = self.task.texts(self._splits[split].select(rows))
        return [
            " | ".join(text) if isinstance(text, tuple) else text if isinstance(text, str) else "" for text in texts
        ]

    def texts(self, split: str, count: int) -> list[Text]:
        """The first texts of a split, or pairs of them, as its rows hold them."""
        return list(self.task.texts(self.first_rows(split, count)))

    def texts_of(self, split: str, rows: Sequence[int] | NDArray[np.int64]) -> list[Text]:
        """The texts of these rows, or pairs of them, as the data hold them."""
        return list(self.task.texts(self._splits[split].select(rows)))

    def groups(self) -> NDArray[np.str_] | None:
        """The group of each row that models are judged on; None if the recipe asks for none."""
        column = self.recipe.evaluate.groups
        return None if column is None else groups_of(self._splits[self.recipe.evaluate.split])

    @property
    def taught_splits(self) -> list[str]:
        """The splits that `TAUGHT` are made of."""
        return [split for split in ("train", UNLABELLED, VIEWS) if split in self._splits]

    def num_rows(self, split: str) -> int:
        """Rows of a split as the data have them."""
        return len(self._splits[split]) if split in self._splits else 0

    def tokens(self, split: str, reader: RowReader, done: Callable[[int], object] = lambda _: None) -> Tokens:
        """Tokenise a split, or find it on disk; `TAUGHT` are two of them. `done` hears how many rows were just read."""
        if split == TAUGHT:
            return self._taught(reader, done)
        rows = self._splits[split]
        own = [unlabelled_digest(self.recipe.data)] if split in (UNLABELLED, VIEWS) else []
        name = digest_json([self.digest, split, reader.digest, self.recipe.data.max_tokens, *own])[:16]
        if name in self._tokens:  # no process waits for the others then
            return self._tokens[name]
        folder = self._cache / f"tokens-{split}-{name}"
        tokenizer, max_tokens = reader.tokenizer, self.recipe.data.max_tokens

        def encode(batch: Columns) -> Columns:
            done(len(next(iter(batch.values()))))
            return self.task.encode(batch, tokenizer, max_tokens)

        with self._main_first():  # the others find the main process's file
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            dataset = rows.map(
                encode,
                batched=True,
                remove_columns=rows.column_names,
                features=self.task.features(),
                cache_file_name=str(folder / "rows.arrow"),
                new_fingerprint=name,
            )
            if not (folder / SUMS).is_file():
                seal_folder(folder)
        if "num_targets" in dataset.column_names and not any(dataset["num_targets"]):
            if not any(dataset["truncated"]):
                raise InputError(f"data.source: no {split} row has anything to learn: every completion is empty")
            raise InputError(
                f"data.max_tokens: no {split} row has a target within {max_tokens} tokens: the prompts fill them; "
                "raise data.max_tokens, or shorten the prompts"
            )
        self._tokens[name] = Tokens(self.task, dataset, tokenizer)
        return self._tokens[name]

    def folder(self, name: str, write: Callable[[Path], object]) -> Path:
        """A folder next to the tokenised rows, filled by `write` where it is not on disk yet."""
        folder = self._cache / name
        with self._main_first():  # the others find the main process's files
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write(folder)
                seal_folder(folder)
        return folder

    def _taught(self, reader: RowReader, done: Callable[[int], object]) -> Tokens:
        train = self.tokens("train", reader, done)
        parts = [self.tokens(split, reader, done).dataset for split in self.taught_splits[1:]]
        if not parts:
            return train
        together = datasets.concatenate_datasets([train.dataset, *parts])
        taught = Tokens(self.task, together, reader.tokenizer, len(train.lengths_N))
        return taught.fixed() if VIEWS in self._splits else taught


@dataclass(frozen=True)
class TaskRows:
    """The recipe's rows, checked: columns of texts and the like, `labels.LABEL`, and `GROUP` if scores go by groups.

    Attributes:
        splits: rows of train, validation and test; and `UNLABELLED` and `VIEWS`, if there are any.
        skipped: source → rows that could not be used and were left out.
        notes: what should be said of how the files were read.
        held_out: rows without labels that were left out because models are judged on them.
    """

    splits: dict[str, datasets.Dataset]
    skipped: dict[str, int]
    notes: list[str]
    held_out: int = 0

    def remarks(self) -> list[str]:
        """What a user should know of the data, line by line."""
        lines = [*(f"{note}." for note in self.notes), *skipped_lines(self.skipped)]
        if self.held_out:
            lines.append(f"{self.held_out} rows without labels are also in validation or test and were left out.")
        return lines


def read_task_rows(recipe: Recipe, *, download: bool = True) -> TaskRows:
    """Read, check and split the recipe's rows.

    Args:
        recipe: the recipe.
        download: whether the teacher's tokenizer may be fetched, whose template has to render chats; if not, and it is
            not on this machine, chats are only checked as far as they go without it, and a note says so.

    Raises:
        InputError: see `data.read_splits` and `usable`; or the training rows are all alike.
    """
    task, column = task_of(recipe), recipe.evaluate.groups
    tokenizer = template_tokenizer(recipe, download=download) if recipe.needs_template else None
    finders = [token_faults(recipe), None if tokenizer is None else template_check(task, tokenizer)]
    checker = _Checker(recipe, task, [finder for finder in finders if finder])
    used = [name for _, name in task.columns()] + ([] if column is None else [column])
    splits, notes = read_splits(recipe.data, checker.main_rows, used, task.watched())
    held_out = _add_unlabelled(recipe, checker, splits, notes)
    if recipe.needs_template and tokenizer is None:
        notes.append(
            f"The chats were not rendered: the tokenizer of {recipe.teacher.model} {why_absent(recipe)}; a run checks "
            "them with it"
        )
    fault = task.nothing_to_learn(splits["train"])
    if fault is not None:
        raise InputError(f"{data_origin(recipe.data)}: of the training rows {fault}: there is nothing to learn")
    if column is not None:
        count = len(np.unique(groups_of(splits[recipe.evaluate.split])))
        if count > MOST_GROUPS:
            raise InputError(
                f"evaluate.groups: column {column!r} has {count} values in the {recipe.evaluate.split} rows; scores "
                f"are reported for at most {MOST_GROUPS} groups"
            )
    return TaskRows(splits, checker.skipped, notes, held_out)


def _add_unlabelled(
    recipe: Recipe, checker: _Checker, splits: dict[str, datasets.Dataset], notes: list[str]
) -> int:  # fmt: skip
    """Give the splits all rows without labels: returns how many were left out because models are judged on them."""
    task, data, loose, held_out = task_of(recipe), recipe.data, checker.without_label, 0
    if data.labelled is not None:
        splits["train"], rest = split_labels(task, splits["train"], data)
        loose.append(rest)
    if data.unlabelled is not None:
        columns = unlabelled_columns(task, data.unlabelled)
        more, remarks = read_unlabelled(data.unlabelled, checker.unlabelled, columns, task.watched())
        loose.append(more)
        notes += remarks
    if any(map(len, loose)):
        together = datasets.concatenate_datasets([part for part in loose if len(part)])
        taught = taught_only(task, splits, together)
        held_out = len(together) - len(taught)
        splits |= {UNLABELLED: taught} if len(taught) else {}
    if data.views is not None:
        views = views_of(task, splits, data)
        splits |= {VIEWS: views} if len(views) else {}
    return held_out


class _Checker:
    """Checks rows, and keeps count of those that are left out and of those that have no label."""

    def __init__(self, recipe: Recipe, task: Task, faults: Sequence[FaultFinder]) -> None:
        self._data, self._groups, self._task, self._faults = recipe.data, recipe.evaluate.groups, task, faults
        self.skipped: dict[str, int] = {}
        self.without_label: list[datasets.Dataset] = []

    def main_rows(self, rows: datasets.Dataset, places: Places) -> datasets.Dataset:
        """The usable rows with a label; those without are put aside if the recipe has a use for them."""
        if self._data.on_empty_label == "unlabelled" and places.may_train:
            empty_N = without_label(self._task, rows)
            if empty_N.any():
                self.without_label.append(self.unlabelled(*_some(rows, places, empty_N)))
            rows, places = _some(rows, places, ~empty_N)
        return self._usable(rows, places, labelled=True)

    def unlabelled(self, rows: datasets.Dataset, places: Places) -> datasets.Dataset:
        """The usable rows, whose labels are not looked at."""
        return self._usable(rows, places, labelled=False)

    def _usable(self, rows: datasets.Dataset, places: Places, *, labelled: bool) -> datasets.Dataset:
        kept = usable(
            self._task, rows, places, self._data.on_bad_row,
            groups=self._groups if labelled else None, more=self._faults, labelled=labelled,
        )  # fmt: skip
        if len(kept) < len(rows):
            self.skipped[places.origin] = self.skipped.get(places.origin, 0) + len(rows) - len(kept)
        return kept


def _some(rows: datasets.Dataset, places: Places, mask_N: NDArray[np.bool_]) -> tuple[datasets.Dataset, Places]:
    """Some of the rows, and their places."""
    return rows.select(np.flatnonzero(mask_N)), replace(places, numbers_N=places.numbers_N[mask_N])


def template_check(task: Task, tokenizer: PreTrainedTokenizerBase) -> FaultFinder:
    """A function that finds rows which the tokenizer's template cannot render."""
    return lambda rows: task.template_faults(rows, tokenizer) or itertools.repeat(None, len(rows))


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
        values: NDArray[Any] = self._rows.column(name)[self._mask_N]
        return values

    def load_batch(self, row_ids_N: NDArray[np.int64], epoch: int | None = None) -> Batch:
        """See `Rows`; `row_ids_N` count the rows of the subset."""
        return self._rows.load_batch(np.flatnonzero(self._mask_N)[row_ids_N], epoch)
