"""What a task is: the face that every kind of task shows to the rest of distilpeft.

A task turns rows of data into tokens and labels, a model's output into a loss, and answers into scores. There is one
class per kind, made from the recipe's `task` section; mypy checks each against this protocol. What most tasks share
has a default here, so a task says only what is its own.

    B  rows of a batch    N  rows that a loss counts    R  rows of a split    S  tokens    T  target tokens
    K  numbers that `measure` finds per row
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Required, TypeAlias, TypedDict, cast

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.labels import Fault
from distilpeft.data.views import views
from distilpeft.metrics.score import Score
from distilpeft.recipe.data import Views

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distilpeft.distillation.fused import Running, Soft
    from distilpeft.distillation.losses import Loss
    from distilpeft.metrics.classification import ByClass
    from distilpeft.recipe.evaluate import Generate

InputReader: TypeAlias = "PreTrainedTokenizerBase"
"""What makes inputs out of rows: a tokenizer, or for images a `pictures.Reader`."""
Cells: TypeAlias = list[Any]
"""Cells of a column, as the data file has them: nothing is known of them before `Task.faults` has looked."""
Columns: TypeAlias = dict[str, Cells]
"""Rows as `datasets` hands them over: column → cells."""
Label: TypeAlias = int | float | list[int]
"""What a row teaches: a class id, a number, 0 or 1 for each class, or a class id for each word."""
Text: TypeAlias = str | tuple[str, str] | bytes | None
"""What makes two rows the same: a text, a pair of texts, or the bytes of a picture."""
Values: TypeAlias = NDArray[np.floating[Any]]
Doubles: TypeAlias = NDArray[np.float64]


def dense(soft: Soft | None) -> Tensor | None:
    """Soft targets of a task whose distributions are always kept whole: one tensor, [N, C]."""
    return cast("Tensor | None", soft)


class Batch(TypedDict, total=False):
    """A collated batch, on the CPU or moved to the device.

    Every batch has `inputs` and `labels_N`; the other keys belong to the tasks that set them.
    """

    inputs: Required[dict[str, Tensor]]  # what the model is called with; [B, ...]
    labels_N: Required[Tensor]  # class or token ids, 0/1 decisions [B, C], or numbers
    row_ids_N: NDArray[np.int64]  # row ids in the split, [B]
    epoch: int | None  # the epoch whose view of the rows this is; None outside of training
    at_N: Tensor  # flat positions in [B * S] that labels_N belong to
    rows_N: Tensor  # the b of each of these
    order_N: Tensor  # its place among the words of its row
    allowed_NS: Tensor  # whether a token can be an answer
    targets_BT: Tensor  # target ids, padded with -100
    num_bytes_B: Tensor  # bytes of the targets' text in UTF-8
    references: list[str]  # the targets as the data have them, [B]
    labelled_L: Tensor  # positions among the N rows of the loss of those with a label; absent if all have one
    unlabelled_U: Tensor  # positions of the others
    label_scale: Tensor  # rows of the step over those of them that have a label, []


def by_label(batch: Batch, loss: Loss, sum_of: Callable[[Loss, Tensor | None], Tensor]) -> Tensor:
    """The loss summed over the rows of a batch, of which some may have no label.

    Args:
        batch: collated.
        loss: the recipe's.
        sum_of: gives the sum over the rows at these positions; None: all.
    """
    if "labelled_L" not in batch:
        return sum_of(loss, None)
    with_label = sum_of(loss.labelled(batch.get("label_scale", 1.0)), batch["labelled_L"])
    return with_label + sum_of(loss.unlabelled(), batch["unlabelled_U"])


class Sample(TypedDict):
    """A text that a model wrote."""

    prompt: str
    completion: str


class Rows(Protocol):
    """The rows of a split as one model reads them, or some of them."""

    lengths_N: NDArray[np.int32]

    @property
    def dataset(self) -> datasets.Dataset:
        """The columns of `Task.features`."""

    def column(self, name: str) -> NDArray[Any]:
        """One number, or one list of numbers, per row."""

    def load_batch(self, row_ids_N: NDArray[np.int64], epoch: int | None = None) -> Batch:
        """These rows, collated."""


class Task(Protocol):
    """One kind of task, with the recipe's settings.

    Attributes:
        auto_class: name of the transformers class that loads its models.
        peft_task: PEFT's name of the task; None if it has none.
        trains_heads: heads come without pretrained weights, so they are trained in full beside an adapter.
    """

    auto_class: ClassVar[str]
    peft_task: ClassVar[str | None]
    trains_heads: ClassVar[bool] = True

    # Rows

    @abstractmethod
    def features(self) -> datasets.Features:
        """Columns after `encode`; all have input_ids or pixels, num_tokens and truncated."""

    @abstractmethod
    def columns(self) -> list[tuple[str, str]]:
        """The columns that the recipe names: (key under `task`, column)."""

    def watched(self) -> tuple[str, ...]:
        """Columns that mean something where they are there, so that the recipe has to say what becomes of them."""
        return ()

    @abstractmethod
    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Why each row cannot be used, None if it can: row by row, in their order; labels are not looked at."""

    def template_faults(self, rows: datasets.Dataset, tokenizer: InputReader) -> Iterator[str | None] | None:
        """Why the tokenizer's template cannot render each row, None if it can; None where rows need no template."""
        return None

    def labels(self, rows: datasets.Dataset) -> Iterator[Label | Fault] | None:
        """What is learnt of each row, or what is wrong with its label; None for tasks without a column of labels."""
        return None

    def label_feature(self) -> Any:
        """Type of the column of `labels`, which stands in checked rows as `labels.LABEL`."""
        return None

    def classes_in(self, label: Label) -> Iterable[int]:
        """The classes that a label holds, each as often as it counts; none for labels that are no classes."""
        return ()

    def blanks(self, rows: datasets.Dataset) -> Iterator[Label] | None:
        """What stands in the column of `labels` for checked rows without one, and is never looked at; see `labels`."""
        return None

    def views(self, rows: datasets.Dataset, settings: Views, seed: int) -> datasets.Dataset:
        """Changed copies of checked rows, which hold only what is read of them; see `data.views`."""
        cells = zip(*(rows[column][:] for column in rows.column_names), strict=True)
        changed = zip(*views(list(cells), settings, seed), strict=True)
        columns = dict(zip(rows.column_names, map(list, changed), strict=True))
        return datasets.Dataset.from_dict(columns, features=rows.features)

    def nothing_to_learn(self, rows: datasets.Dataset) -> str | None:
        """Why nothing can be learnt from these training rows, each of which is usable; None if something can."""
        return None

    @abstractmethod
    def texts(self, rows: datasets.Dataset) -> Iterator[Text]:
        """What makes two rows the same, for counting duplicates between splits."""

    @abstractmethod
    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Tokens and labels of checked rows.

        Args:
            columns: the rows, with their labels in `labels.LABEL`.
            tokenizer: the model's tokenizer, or for images its `pictures.Reader`.
            max_tokens: longer rows are cut.
        """

    @abstractmethod
    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """Encoded rows as a batch, padded to the longest of them."""

    def vary(self, columns: Columns, row_ids: list[int], epoch: int, tokenizer: InputReader) -> Columns:
        """Encoded rows as an epoch of training sees them: a function of row id and epoch alone."""
        return columns

    # Models

    def model_options(self) -> dict[str, object]:
        """Configuration values of a model for this task."""
        return {}

    def prepare(self, model: PreTrainedModel) -> None:
        """Find out, or set, what the loss has to know of a model just loaded.

        Raises:
            GateError: the architecture is not supported.
        """
        return

    def head_start(self, train: Rows) -> Doubles | None:
        """The bias that a new head starts with, [C]: the answer usual in training; None keeps the random start."""
        return None

    def attach(self, student: PreTrainedModel, width: int) -> None:
        """Give the student weights that only training needs; `width` is that of the teacher's soft targets."""
        return

    def inputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """All that a model is called with for a batch."""
        return batch["inputs"]

    # The loss

    def count_rows(self, batch: Batch) -> int:
        """How many rows of a batch the loss counts."""
        return batch["labels_N"].numel()

    def count_labelled(self, batch: Batch) -> int:
        """How many of these have a label."""
        return len(batch["labelled_L"]) if "labelled_L" in batch else self.count_rows(batch)

    def num_positions(self, rows: Rows) -> NDArray[np.int64]:
        """How many soft targets each row has, [R]."""
        return np.ones(len(rows.lengths_N), dtype=np.int64)

    @abstractmethod
    def vocabulary(self, teacher: PreTrainedModel, max_tokens: int) -> int:
        """Numbers in one soft target."""

    @abstractmethod
    def soft(self, teacher: nn.Module, batch: Batch) -> Running | Tensor:
        """What the frozen teacher knows of a batch: N soft targets."""

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch, loss: Loss, soft: Soft | None) -> Tensor:
        """The loss summed over the rows that it counts, in nats."""

    def hardened(self, soft: Tensor) -> Tensor:
        """Soft targets [N, C] with all of their probability on the likeliest class."""
        from distilpeft.distillation.losses import MASKED

        return soft.new_full(soft.shape, MASKED).scatter_(-1, soft.argmax(-1, keepdim=True), 0.0)

    # Scores

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch, soft: Soft | None = None) -> Tensor:
        """What the scores of a row are computed from, [B, K]; with a teacher's `soft`, also how far it is away."""

    def answers(self, outputs: Values, labels: Values) -> tuple[Values, Values]:
        """Outputs and labels of an export as its gate compares them."""
        return outputs, labels

    @abstractmethod
    def majority_values(self, train: Rows, rows: Rows) -> Values:
        """`measure` of the best answer that looks at no row: the class-frequency baseline, [R, K]."""

    @abstractmethod
    def metrics(self, values_RK: Values, rows: Rows) -> dict[str, float]:
        """All metrics that need no hub."""

    @abstractmethod
    def scores(self, names: tuple[str, ...], values_RK: Values, rows: Rows) -> dict[str, Score]:
        """The named metrics with their 95 % intervals."""

    @abstractmethod
    def added(self, values_RK: Values, rows: Rows) -> tuple[Doubles, Doubles]:
        """What each row adds to the numerator and to the denominator of the main metric; for paired tests."""

    @abstractmethod
    def against_teacher(self, values_RK: Values, teacher_RK: Values, rows: Rows) -> dict[str, float] | None:
        """How far a model's answers are from the teacher's; None where that was not measured."""

    def calibration(self, values_RK: Values, rows: Rows) -> dict[str, list[float]] | None:
        """Mean confidence, share of right answers and rows per bin of confidence; None for answers without one."""
        return None

    def by_class(self, values_RK: Values, rows: Rows) -> ByClass | None:
        """The answers by class; None for tasks without classes."""
        return None

    # Writing

    def samples(
        self, model: PreTrainedModel, tokenizer: InputReader, rows: Rows, count: int, max_new_tokens: int
    ) -> list[Sample]:
        """Texts that the model writes for the first rows; none for tasks that write nothing."""
        return []

    def written(self, model: PreTrainedModel, batch: Batch, tokenizer: InputReader, settings: Generate) -> Tensor:
        """Sums over what the model writes by itself for each row, [B, K], behind those of `measure`."""
        raise AssertionError(f"{type(self).__name__} writes nothing")
