"""Single-label classification, whatever the rows are: everything after the logits.

B  rows of a batch    N  rows    C  classes
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.labels import LABEL, Fault, class_reader
from distilpeft.metrics.score import Score
from distilpeft.recipe.task import ImageClassification, TextClassification
from distilpeft.tasks import text_rows
from distilpeft.tasks.task import Batch, Doubles, Label, Rows, Task, Values, by_label, dense
from distilpeft.tasks.text_rows import logits

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from distilpeft.distillation.fused import Soft
    from distilpeft.distillation.losses import Loss
    from distilpeft.metrics.classification import ByClass


@dataclass(frozen=True)
class SingleLabelTask(Task):
    """One class for each row."""

    section: TextClassification | ImageClassification

    def labels(self, rows: datasets.Dataset) -> Iterator[Label | Fault]:
        """The class id of each row."""
        column, section = self.section.label, self.section
        reader = class_reader(section.labels, rows.features[column], text_rows.cells(rows, column), section.label_is)
        return (reader.class_id(cell) for cell in text_rows.cells(rows, column))

    def label_feature(self) -> Any:
        """A class id."""
        return datasets.Value("int64")

    def blanks(self, rows: datasets.Dataset) -> Iterator[Label]:
        """Any class."""
        return itertools.repeat(0, len(rows))

    def classes_in(self, label: Label) -> Iterable[int]:
        """The class."""
        return (cast(int, label),)

    def nothing_to_learn(self, rows: datasets.Dataset) -> str | None:
        """Why nothing can be learnt: all rows are of one class."""
        ids = set(text_rows.cells(rows, LABEL))
        return f"every row is of the class {self.section.labels[ids.pop()]!r}" if len(ids) == 1 else None

    def soft(self, teacher: nn.Module, batch: Batch) -> Tensor:
        """What the frozen teacher knows of a batch: its logits."""
        return logits(teacher, batch).float()

    def vocabulary(self, teacher: PreTrainedModel, max_tokens: int) -> int:
        """Numbers in a soft target: a logit of each class."""
        return len(self.section.labels)

    def loss_sum(self, model: nn.Module, batch: Batch, loss: Loss, soft: Soft | None) -> Tensor:
        """The loss summed over rows."""
        from distilpeft.distillation.losses import counted_sum

        ours = logits(model, batch)
        return by_label(batch, loss, lambda own, rows: counted_sum(ours, batch["labels_N"], dense(soft), own, rows))

    def measure(self, model: nn.Module, batch: Batch, soft: Soft | None = None) -> Tensor:
        """What the scores of a row are computed from: its logits, [B, C]."""
        return logits(model, batch)

    def majority_values(self, train: Rows, rows: Rows) -> NDArray[np.float32]:
        """`measure` of the class frequencies in training, whose top class is the majority's, [N, C]."""
        labels_N = train.column("label")
        share_C = np.bincount(labels_N, minlength=len(self.section.labels)) / len(labels_N)
        return np.tile(np.log(np.maximum(share_C, 1e-9)), (len(rows.lengths_N), 1)).astype(np.float32)

    def metrics(self, values_NC: Values, rows: Rows) -> dict[str, float]:
        """All metrics that work without a hub."""
        from distilpeft.metrics.classification import FUNCTIONS
        from distilpeft.metrics.probabilities import softmax

        probabilities_NC = softmax(values_NC)
        labels_N = rows.column("label")
        return {name: score(probabilities_NC, labels_N) for name, score in FUNCTIONS.items()}

    def scores(self, names: tuple[str, ...], values_NC: Values, rows: Rows) -> dict[str, Score]:
        """Metric → value, 95 % interval and number of rows."""
        from distilpeft.metrics import classification as classifier

        return classifier.scores(names, values_NC.astype(np.float64), rows.column("label"))

    def added(self, values_NC: Values, rows: Rows) -> tuple[Doubles, Doubles]:
        """What each row adds to the accuracy's sum, and to its denominator."""
        right_N = values_NC.argmax(-1) == rows.column("label")
        return right_N.astype(np.float64), np.ones(len(right_N))

    def calibration(self, values_NC: Values, rows: Rows) -> dict[str, list[float]] | None:
        """Mean confidence, share of right answers and rows of each bin of confidence that has any."""
        from distilpeft.metrics.classification import reliability
        from distilpeft.metrics.probabilities import softmax

        return reliability(softmax(values_NC), rows.column("label"))

    def by_class(self, values_NC: Values, rows: Rows) -> ByClass | None:
        """The answers by class."""
        from distilpeft.metrics.classification import by_class

        return by_class(values_NC.argmax(-1), rows.column("label"), len(self.section.labels))

    def against_teacher(self, values_NC: Values, teacher_NC: Values, rows: Rows) -> dict[str, float]:
        """KL(teacher || model) in nats per row and the share of rows with the same top class."""
        from distilpeft.metrics.classification import agreement

        return agreement(values_NC.astype(np.float64), teacher_NC.astype(np.float64))
