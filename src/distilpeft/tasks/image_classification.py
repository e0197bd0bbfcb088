"""Single-label classification of pictures; every row counts once.

Columns after `encode`: pixels (uint8 [C, H, W] as bytes, of the size that the model reads), digest (of them), label
(class id), num_tokens (1) and truncated (never). Everything after the logits is as for texts.

    B  rows of a batch    C  channels    H  height    W  width
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np

from distilpeft.data import pictures
from distilpeft.errors import InputError
from distilpeft.recipe.task import ImageClassification
from distilpeft.tasks import text_rows
from distilpeft.tasks.text_classification import (
    added,
    against_teacher,
    answers,
    calibration,
    class_ids,
    count_rows,
    label_faults,
    loss_sum,
    majority_values,
    measure,
    metrics,
    one_class,
    prepare,
    samples,
    scores,
    soft,
    vocabulary,
)
from distilpeft.tasks.text_rows import one_each as num_positions

__all__ = [  # all that is the same for classes of texts
    "added",
    "against_teacher",
    "answers",
    "calibration",
    "count_rows",
    "loss_sum",
    "majority_values",
    "measure",
    "metrics",
    "num_positions",
    "prepare",
    "samples",
    "scores",
    "soft",
    "vocabulary",
]
AUTO_CLASS = "AutoModelForImageClassification"
PEFT_TASK = None  # PEFT has no name for it
TRAIN_HEADS = True  # the classifier comes without pretrained weights


def features(task: ImageClassification) -> datasets.Features:
    """Columns after `encode`."""
    del task
    return datasets.Features(
        {
            "pixels": datasets.Value("binary"),
            "digest": datasets.List(datasets.Value("int32")),
            "label": datasets.Value("int64"),
            "num_tokens": datasets.Value("int32"),
            "truncated": datasets.Value("bool"),
        }
    )


def model_options(task: ImageClassification) -> dict[str, Any]:
    """Configuration values of a model for this task."""
    return text_rows.named(task.labels)


def check_columns(task: ImageClassification, rows: datasets.Dataset, origin: str) -> None:
    """Refuse data without the recipe's columns; see `text_rows.check_columns`."""
    text_rows.check_columns({"image": task.image, "label": task.label}, rows, origin)


def faults(task: ImageClassification, rows: datasets.Dataset) -> Iterator[str | None]:
    """Why each row cannot be used; of pictures the headers are read. See `text_classification.faults`."""
    return text_rows.first_of(label_faults(task, rows), _picture_faults(rows, task.image))


def _picture_faults(rows: datasets.Dataset, column: str) -> Iterator[str | None]:
    for cell in _cells(rows, column):
        try:
            pictures.opened(cell).close()
        except InputError as error:
            yield f"column {column!r}: {error}"
        else:
            yield None


def learnable(task: ImageClassification, rows: datasets.Dataset) -> str | None:
    """Why nothing can be learnt from these training rows; see `text_classification.learnable`."""
    return one_class(task, rows)


def _cells(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    """Pictures as they are stored, not decoded."""
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return text_rows.cells(rows, column)


def texts(task: ImageClassification, rows: datasets.Dataset) -> Iterator[Any]:
    """What makes two rows the same, for counting duplicates between splits: the file's bytes, else its path."""
    for cell in _cells(rows, task.image):
        yield (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell


def encode(
    task: ImageClassification, features: datasets.Features, batch: dict[str, list[Any]], tokenizer: Any, max_tokens: int
) -> dict[str, list[Any]]:
    """Pixels and class ids of rows that have no fault; `tokenizer` is a `pictures.Reader`."""
    del max_tokens
    found = [tokenizer.pixels(cell) for cell in batch[task.image]]
    return {
        "pixels": [pixels.tobytes() for pixels in found],
        "digest": [pictures.digest(pixels) for pixels in found],
        "label": class_ids(task, features, batch[task.label]),
        "num_tokens": [1] * len(found),
        "truncated": [False] * len(found),
    }


def collate(rows: dict[str, list[Any]], tokenizer: Any) -> dict[str, Any]:
    """A batch: `inputs`: pixel_values [B, C, H, W]; `labels_N`: class ids."""
    import torch

    pixels = np.stack([np.frombuffer(cell, np.uint8).reshape(tokenizer.shape) for cell in rows["pixels"]])
    return {
        "inputs": {"pixel_values": torch.from_numpy(tokenizer.values(pixels))},
        "labels_N": torch.tensor(rows["label"], dtype=torch.long),
    }


def vary(
    task: ImageClassification, rows: dict[str, list[Any]], row_ids: list[int], epoch: int, tokenizer: Any
) -> dict[str, list[Any]]:
    """Rows as an epoch of training sees them: a function of row and epoch, so that a teacher sees the same view."""
    augment = task.augment
    if augment is None:
        return rows
    found = []
    for row, cell in zip(row_ids, rows["pixels"], strict=True):
        pixels = np.frombuffer(cell, np.uint8).reshape(tokenizer.shape)
        chances = np.random.default_rng([epoch, row]).random(3).tolist()
        found.append(pictures.varied(pixels, chances, flip=augment.flip, shift=augment.shift).tobytes())
    return {**rows, "pixels": found}
