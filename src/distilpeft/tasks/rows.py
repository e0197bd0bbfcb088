"""The recipe's rows: read and checked once, tokenised for each model that asks.

To add a task: its section in `recipe/task.py`, a file with its class, and a line in `TASKS`.
"""

from __future__ import annotations

import itertools
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.labels import LABEL, Fault
from distilpeft.data.model_files.recipe_models import teacher_of, token_faults
from distilpeft.data.reading import Places, duplicates, read_splits, skipped_lines
from distilpeft.data.reading import origin as data_origin
from distilpeft.data.sources import is_gguf, model_folder
from distilpeft.data.tables import FAULT
from distilpeft.errors import InputError
from distilpeft.machine.files import SUMS, digest_json, is_whole, seal_folder
from distilpeft.recipe import Recipe
from distilpeft.tasks import text_rows
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
    from transformers import PreTrainedTokenizerBase

    from distilpeft.tasks.task import InputReader

MainFirst = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which the main process goes before the others."""
FaultFinder = Callable[[datasets.Dataset], Iterator[str | None]]
"""Says why each row cannot be used, None if it can."""
MOST_GROUPS = 30
GROUP = "__group__"
"""Column of checked rows with the group that a row is scored in."""
TEXT_KEYS = ("text", "pair", "question", "context", "prompt", "completion", "source", "target")
LABEL_KEYS = ("label", "labels", "tags")
"""Keys of columns that hold texts; and of those that `LABEL` stands for."""
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


NOTHING: tuple[Any, ...] = (None, "", [], "[]", "null")
"""Cells of a watched column that hold nothing."""


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
        read = read_task_rows(recipe)
        self._splits, self.skipped = read.splits, read.skipped
        self._tokens: dict[str, Tokens] = {}
        self.duplicates = duplicates({name: self.task.texts(rows) for name, rows in self._splits.items()})

    def first_rows(self, split: str, count: int) -> datasets.Dataset:
        """The first rows of a split as the data have them."""
        rows = self._splits[split]
        return rows.select(range(min(count, len(rows))))

    def texts(self, split: str, count: int) -> list[Text]:
        """The first texts of a split, or pairs of them, as its rows hold them."""
        return list(self.task.texts(self.first_rows(split, count)))

    def groups(self) -> NDArray[np.str_] | None:
        """The group of each row that models are judged on; None if the recipe asks for none."""
        column = self.recipe.evaluate.groups
        return None if column is None else _groups(self._splits[self.recipe.evaluate.split])

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
                lambda batch: self.task.encode(batch, tokenizer, max_tokens),
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


@dataclass(frozen=True)
class TaskRows:
    """The recipe's rows, checked: columns of texts and the like, `labels.LABEL`, and `GROUP` if scores go by groups.

    Attributes:
        splits: rows of train, validation and test.
        skipped: source → rows that could not be used and were left out.
        notes: what should be said of how the files were read.
    """

    splits: dict[str, datasets.Dataset]
    skipped: dict[str, int]
    notes: list[str]

    def remarks(self) -> list[str]:
        """What a user should know of the data, line by line."""
        return [*(f"{note}." for note in self.notes), *skipped_lines(self.skipped)]


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
    more = [token_faults(recipe), None if tokenizer is None else template_check(task, tokenizer)]

    def check(rows: datasets.Dataset, places: Places) -> datasets.Dataset:
        kept = usable(task, rows, places, recipe.data.on_bad_row, groups=column, more=[one for one in more if one])
        if len(kept) < len(rows):
            skipped[places.origin] = len(rows) - len(kept)
        return kept

    skipped: dict[str, int] = {}
    used = [name for _, name in task.columns()] + ([] if column is None else [column])
    splits, notes = read_splits(recipe.data, check, used, task.watched())
    if recipe.needs_template and tokenizer is None:
        notes.append(
            f"The chats were not rendered: the tokenizer of {recipe.teacher.model} is not on this machine yet, or "
            "needs code of its own"
        )
    fault = task.nothing_to_learn(splits["train"])
    if fault is not None:
        raise InputError(f"{data_origin(recipe.data)}: of the training rows {fault}: there is nothing to learn")
    if column is not None:
        count = len(np.unique(_groups(splits[recipe.evaluate.split])))
        if count > MOST_GROUPS:
            raise InputError(
                f"evaluate.groups: column {column!r} has {count} values in the {recipe.evaluate.split} rows; scores "
                f"are reported for at most {MOST_GROUPS} groups"
            )
    return TaskRows(splits, skipped, notes)


def template_check(task: Task, tokenizer: PreTrainedTokenizerBase) -> FaultFinder:
    """A function that finds rows which the tokenizer's template cannot render."""
    return lambda rows: task.template_faults(rows, tokenizer) or itertools.repeat(None, len(rows))


def template_tokenizer(recipe: Recipe, *, download: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer whose template renders chats.

    Args:
        recipe: the recipe.
        download: as in a run, which may also use code that comes with the tokenizer if the recipe allows it.

    Returns:
        None if it is not on this machine, or needs code of its own, and this is no run.

    Raises:
        InputError: it cannot be loaded.
    """
    source = teacher_of(recipe)
    folder = model_folder(source)
    if folder is None and (not download or is_gguf(source)):  # a run reads a GGUF file's tokenizer when it unpacks it
        return None
    import transformers

    where = source.location if folder is None else str(folder)
    try:
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            where, revision=source.revision, trust_remote_code=download and recipe.teacher.trust_remote_code
        )
    except Exception as error:
        if not download and recipe.teacher.trust_remote_code:
            return None
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"teacher.model: the tokenizer of {source.name} cannot be loaded: {reason}") from None
    return found


def usable(
    task: Task,
    rows: datasets.Dataset,
    places: Places,
    on_bad_row: str = "error",
    *,
    groups: str | None = None,
    more: Sequence[FaultFinder] = (),
) -> datasets.Dataset:
    """The rows that the task can use, in columns of the same types whatever the file's were.

    Args:
        task: the recipe's.
        rows: the rows.
        places: where they come from, for messages.
        on_bad_row: the recipe's.
        groups: column of groups to score apart.
        more: what else may be wrong with rows: tokens that a model lacks, chats that a template cannot render.

    Raises:
        InputError: a column is missing; or there are bad rows, and the recipe does not leave them out: what is wrong
            with the first, and where the first few are.
    """
    keys = [(f"task.{key}", column) for key, column in task.columns()]
    for key, column in [*keys, *([] if groups is None else [("evaluate.groups", groups)])]:
        if column not in rows.column_names:
            has = ", ".join(name for name in rows.column_names if name != FAULT)
            raise InputError(f"{key}: {places.origin} has no column {column!r}; its columns are {has}")
    for name in task.watched():
        if name in rows.column_names and any(cell not in NOTHING for cell in text_rows.cells(rows, name)):
            raise InputError(
                f"task.{name}: {places.origin} has a column {name!r} that the recipe does not name; write task.{name}: "
                f"{name} to use it, or null to leave it out"
            )
    labels = task.labels(rows)
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
    taught = None if values is None else [values[index] for index in kept]
    return _checked(task, rows.select(kept) if bad else rows, taught, groups)


def _checked(task: Task, rows: datasets.Dataset, labels: list[Any] | None, groups: str | None) -> datasets.Dataset:
    """Rows with the columns that the task reads, its labels and the group."""
    own = None if groups is None else _as_groups(rows, groups)
    unread = LABEL_KEYS if labels is not None else ()
    read = dict.fromkeys(column for key, column in task.columns() if key not in unread)
    rows = rows.select_columns(list(read))
    for key, column in task.columns():
        if key in TEXT_KEYS and rows.features[column] != datasets.Value("string"):
            rows = _as_text(rows, column)
    if labels is not None:
        rows = _with(rows, LABEL, labels, task.label_feature())
    return rows if own is None else _with(rows, GROUP, own, datasets.Value("string"))


def _with(rows: datasets.Dataset, name: str, cells: list[Any], feature: Any) -> datasets.Dataset:
    """One column more; it would be pickled for a fingerprint, which nothing here goes by."""
    return rows.add_column(name, cells, feature=feature, new_fingerprint=uuid.uuid4().hex)


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
    named = ["" if cell is None else str(cell).strip() for cell in cells]
    return [name or "(none)" for name in named]


def _groups(rows: datasets.Dataset) -> NDArray[np.str_]:
    return np.array(rows[GROUP][:], dtype=np.str_)


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
