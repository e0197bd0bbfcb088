"""Single-label classification of texts, or of pairs of texts; every row counts once.

Columns after `encode`: those of `text_rows`, and label (class id).

    B  rows of a batch    N  rows    C  classes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.recipe.task import ImageClassification, TextClassification
from distilpeft.tasks import text_rows
from distilpeft.tasks.text_rows import class_id, texts
from distilpeft.tasks.text_rows import logits as measured
from distilpeft.tasks.text_rows import one_each as num_positions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distilpeft.distillation.losses import Loss

__all__ = ["num_positions", "texts"]  # the rows' part of what every task has
AUTO_CLASS = "AutoModelForSequenceClassification"
PEFT_TASK = "SEQ_CLS"
TRAIN_HEADS = True  # the classifier comes without pretrained weights
Values = NDArray[np.floating[Any]]


def features(task: TextClassification) -> datasets.Features:
    """Columns after `encode`."""
    return text_rows.features(task, label=datasets.Value("int64"))


def model_options(task: TextClassification) -> dict[str, Any]:
    """Configuration values of a model for this task."""
    return {**text_rows.named(task.labels), "problem_type": "single_label_classification"}


def check_columns(task: TextClassification, rows: datasets.Dataset, origin: str) -> None:
    """Refuse data without the recipe's columns; see `text_rows.check_columns`."""
    text_rows.check_columns({"text": task.text, "pair": task.pair, "label": task.label}, rows, origin)


def faults(task: TextClassification, rows: datasets.Dataset) -> Iterator[str | None]:
    """Why each row cannot be used, None of one that can: row by row, in their order."""
    return text_rows.first_of(text_rows.text_faults(rows, task.text, task.pair), label_faults(task, rows))


def label_faults(task: TextClassification | ImageClassification, rows: datasets.Dataset) -> Iterator[str | None]:
    """The same of labels alone."""
    names, is_index = text_rows.names_of(rows.features[task.label], task.labels)
    for value in text_rows.cells(rows, task.label):
        known = class_id(value, names, is_index=is_index) is not None
        yield None if known else f"label {value!r} is {text_rows.allowed(task.labels)}"


def learnable(task: TextClassification, rows: datasets.Dataset) -> str | None:
    """Why nothing can be learnt from these training rows, each of which is usable; None if something can."""
    return one_class(task, rows)


def one_class(task: TextClassification | ImageClassification, rows: datasets.Dataset) -> str | None:
    """`learnable` of rows that have a class each."""
    found = set(class_ids(task, rows.features, text_rows.cells(rows, task.label)))
    return f"every row is of the class {task.labels[found.pop()]!r}" if len(found) == 1 else None


def class_ids(
    task: TextClassification | ImageClassification, features: datasets.Features, cells: Iterable[Any]
) -> list[int]:
    """Class ids, in the order of `task.labels`, of label cells that have no fault."""
    names, is_index = text_rows.names_of(features[task.label], task.labels)
    return [text_rows.id_in(task.labels, cell, names, is_index=is_index) for cell in cells]


def encode(
    task: TextClassification, features: datasets.Features, batch: dict[str, list[Any]], tokenizer: Any, max_tokens: int
) -> dict[str, list[Any]]:
    """Tokens and class ids of rows that have no fault; see `text_rows.encode`."""
    return {
        **text_rows.encode(task, batch, tokenizer, max_tokens),
        "label": class_ids(task, features, batch[task.label]),
    }


def collate(rows: dict[str, list[Any]], tokenizer: Any) -> dict[str, Any]:
    """A batch: `inputs`, see `text_rows.inputs`; `labels_N`: class ids."""
    import torch

    return {"inputs": text_rows.inputs(rows, tokenizer), "labels_N": torch.tensor(rows["label"], dtype=torch.long)}


def count_rows(batch: dict[str, Any]) -> int:
    """How many rows of a collated batch the loss counts: here all."""
    return len(batch["labels_N"])


def prepare(task: TextClassification, model: Any) -> None:
    """Nothing to find out: the logits are the model's output."""


def soft(teacher: nn.Module, batch: dict[str, Any]) -> Tensor:
    """What the frozen teacher knows of a batch: its logits."""
    return measured(teacher, batch).float()


def vocabulary(task: TextClassification, teacher: Any, max_tokens: int) -> int:
    """Numbers in a soft target: a logit of each class."""
    del teacher, max_tokens
    return len(task.labels)


def loss_sum(model: nn.Module, batch: dict[str, Any], loss: Loss, soft: Tensor | None) -> Tensor:
    """The loss summed over rows."""
    from distilpeft.distillation.losses import distil_sum

    return distil_sum(measured(model, batch), batch["labels_N"], soft, loss)


def measure(model: nn.Module, batch: dict[str, Any], soft: Tensor | None = None) -> Tensor:
    """What the scores of a row are computed from: its logits, [B, C]."""
    del soft
    return measured(model, batch)


def answers(logits_NC: Values, labels_N: Values) -> tuple[Values, Values]:
    """Outputs and labels as the export's gate compares them: logits over classes, and class ids."""
    return logits_NC, labels_N


def majority_values(task: TextClassification, train: Any, rows: Any) -> NDArray[np.float32]:
    """`measure` of the answer "as often as in training", whose top class is the majority's, [B, C]."""
    labels_N = train.column("label")
    share_C = np.bincount(labels_N, minlength=len(task.labels)) / len(labels_N)
    return np.tile(np.log(np.maximum(share_C, 1e-9)), (len(rows.lengths_N), 1)).astype(np.float32)


def metrics(task: TextClassification, values_NC: Values, rows: Any) -> dict[str, float]:
    """All metrics that work without a hub."""
    from distilpeft.metrics.classification import FUNCTIONS
    from distilpeft.metrics.probabilities import softmax

    del task
    probabilities_NC = softmax(values_NC)
    labels_N = rows.column("label")
    return {name: score(probabilities_NC, labels_N) for name, score in FUNCTIONS.items()}


def scores(task: TextClassification, names: tuple[str, ...], values_NC: Values, rows: Any) -> dict[str, dict[str, Any]]:
    """Metric → value, 95 % interval and number of rows."""
    from distilpeft.metrics import classification as classifier

    del task
    return classifier.scores(names, values_NC.astype(np.float64), rows.column("label"))


def added(task: TextClassification, values_NC: Values, rows: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each row adds to the accuracy's sum, and to its denominator."""
    del task
    right_N = values_NC.argmax(-1) == rows.column("label")
    return right_N.astype(np.float64), np.ones(len(right_N))


def calibration(task: TextClassification, values_NC: Values, rows: Any) -> dict[str, list[float]] | None:
    """Mean confidence, share of right answers and rows of each bin of confidence that has any."""
    from distilpeft.metrics.classification import reliability
    from distilpeft.metrics.probabilities import softmax

    del task
    return reliability(softmax(values_NC), rows.column("label"))


def against_teacher(task: TextClassification, values_NC: Values, teacher_NC: Values, rows: Any) -> dict[str, float]:
    """KL(teacher || model) in nats per row and the share of rows with the same top class."""
    from distilpeft.metrics.classification import agreement

    del task, rows
    return agreement(values_NC.astype(np.float64), teacher_NC.astype(np.float64))


def samples(model: Any, tokenizer: Any, rows: Any, count: int, max_new_tokens: int) -> list[dict[str, str]]:
    """A classifier writes nothing."""
    del model, tokenizer, rows, count, max_new_tokens
    return []
