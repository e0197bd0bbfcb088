"""A number for each text, or pair of texts; every row counts once.

The loss is `alpha * (student - teacher)^2 + (1 - alpha) * (student - label)^2`, up to a constant the KL of normal
distributions of one width around these numbers. Columns after `encode`: those of `text_rows`, and label.

    B  rows of a batch    N  rows
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.labels import LABEL, Fault, number, shown
from distilpeft.metrics.score import Score
from distilpeft.recipe.task import Regression
from distilpeft.tasks import text_rows
from distilpeft.tasks.task import Batch, Columns, Doubles, Label, Rows, Task, Text, Values, by_label, dense
from distilpeft.tasks.text_rows import logits as measured

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from distilpeft.distillation.fused import Soft
    from distilpeft.distillation.losses import Loss
    from distilpeft.tasks.task import InputReader

BOUNDS = {
    "r2": (-np.inf, 1.0), "pearson": (-1.0, 1.0), "spearman": (-1.0, 1.0), "rmse": (0.0, np.inf), "mae": (0.0, np.inf)
}  # fmt: skip


@dataclass(frozen=True)
class RegressionTask(Task):
    """A number for each text, or pair of texts."""

    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    section: Regression

    def features(self) -> datasets.Features:
        """Columns after `encode`."""
        return text_rows.features(self.section, label=datasets.Value("float64"))

    def model_options(self) -> dict[str, object]:
        """Configuration values of a model for this task."""
        return {"problem_type": "regression", "num_labels": 1}

    def columns(self) -> list[tuple[str, str]]:
        """Texts and number."""
        return [*text_rows.columns(self.section), ("label", self.section.label)]

    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Why each row cannot be used; see `text_classification.faults`."""
        return text_rows.text_faults(rows, self.section.text, self.section.pair)

    def labels(self, rows: datasets.Dataset) -> Iterator[Label | Fault]:
        """The number of each row."""
        for cell in text_rows.cells(rows, self.section.label):
            value = number(cell)
            fault = Fault(f"column {self.section.label!r} holds {shown(cell)}, which is not a number")
            yield fault if value is None else value

    def label_feature(self) -> Any:
        """A number."""
        return datasets.Value("float64")

    def blanks(self, rows: datasets.Dataset) -> Iterator[Label]:
        """Any number."""
        return itertools.repeat(0.0, len(rows))

    def nothing_to_learn(self, rows: datasets.Dataset) -> str | None:
        """Why nothing can be learnt from these training rows: all have one number."""
        numbers = set(text_rows.cells(rows, LABEL))
        return f"column {self.section.label!r} holds {numbers.pop()} in every row" if len(numbers) == 1 else None

    def texts(self, rows: datasets.Dataset) -> Iterator[Text]:
        """The texts, or pairs of them."""
        return text_rows.texts(self.section, rows)

    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Tokens and numbers; see `text_rows.encode`."""
        return {**text_rows.encode(self.section, columns, tokenizer, max_tokens), "label": columns[LABEL]}

    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """A batch: `inputs`, see `text_rows.inputs`; `labels_N`: numbers."""
        import torch

        return {
            "inputs": text_rows.inputs(columns, tokenizer),
            "labels_N": torch.tensor(columns["label"], dtype=torch.float32),
        }

    def soft(self, teacher: nn.Module, batch: Batch) -> Tensor:
        """What the frozen teacher knows of a batch: its numbers, [B, 1]."""
        return measured(teacher, batch).float()

    def vocabulary(self, teacher: PreTrainedModel, max_tokens: int) -> int:
        """Numbers in a soft target: one."""
        return 1

    def loss_sum(self, model: nn.Module, batch: Batch, loss: Loss, soft: Soft | None) -> Tensor:
        """The loss summed over rows."""
        from distilpeft.distillation.losses import squared_sum

        targets = dense(soft)
        ours, theirs = measured(model, batch).squeeze(-1), None if targets is None else targets.squeeze(-1)
        return by_label(batch, loss, lambda own, rows: squared_sum(ours, batch["labels_N"], theirs, own, rows))

    def measure(self, model: nn.Module, batch: Batch, soft: Soft | None = None) -> Tensor:
        """What the scores of a row are computed from: its number, [B, 1]."""
        return measured(model, batch)

    def majority_values(self, train: Rows, rows: Rows) -> NDArray[np.float32]:
        """`measure` of the answer that is always the training rows' mean, [N, 1]."""
        return np.tile(self.head_start(train), (len(rows.lengths_N), 1)).astype(np.float32)

    def head_start(self, train: Rows) -> Doubles:
        """What a new head begins with: the labels' mean in training, [1]."""
        mean: float = train.column("label").mean()
        return np.array([mean])

    def metrics(self, values_N1: Values, rows: Rows) -> dict[str, float]:
        """All metrics; R² is the explained share of the labels' variance, below 0 if their mean is nearer."""
        return _metrics(values_N1[:, 0].astype(np.float64), rows.column("label"))

    def scores(self, names: tuple[str, ...], values_N1: Values, rows: Rows) -> dict[str, Score]:
        """Metric → value, 95 % interval and number of rows."""
        from distilpeft.metrics.classification import scored

        values_N, labels_N = values_N1[:, 0].astype(np.float64), rows.column("label")
        return scored(lambda draw: _metrics(values_N[draw], labels_N[draw]), names, len(values_N), BOUNDS)

    def added(self, values_N1: Values, rows: Rows) -> tuple[Doubles, Doubles]:
        """What each row adds to the variance that is explained, and to all of it: their ratio is R²."""
        labels_N = rows.column("label")
        all_N = np.square(labels_N - labels_N.mean())
        return all_N - np.square(values_N1[:, 0].astype(np.float64) - labels_N), all_N

    def against_teacher(self, values_N1: Values, teacher_N1: Values, rows: Rows) -> dict[str, float]:
        """How far the numbers are from the teacher's: `rmse` and `pearson`."""
        metrics = _metrics(values_N1[:, 0].astype(np.float64), teacher_N1[:, 0].astype(np.float64))
        return {name: metrics[name] for name in ("rmse", "pearson")}


def _metrics(values_N: Doubles, labels_N: Doubles) -> dict[str, float]:
    from scipy.stats import rankdata

    gap_N, spread_N = values_N - labels_N, labels_N - labels_N.mean()
    total = float(np.square(spread_N).sum())
    return {
        "r2": 1 - float(np.square(gap_N).sum()) / total if total else 0.0,
        "pearson": _correlation(values_N, labels_N),
        "spearman": _correlation(rankdata(values_N), rankdata(labels_N)),
        "rmse": float(np.sqrt(np.square(gap_N).mean())),
        "mae": float(np.abs(gap_N).mean()),
    }


def _correlation(one_N: Doubles, two_N: Doubles) -> float:
    """Pearson's; 0 where either side is always the same."""
    if np.ptp(one_N) == 0 or np.ptp(two_N) == 0:
        return 0.0
    one_N, two_N = one_N - one_N.mean(), two_N - two_N.mean()
    return float(one_N @ two_N) / math.sqrt(float(one_N @ one_N) * float(two_N @ two_N))
