"""Single-label classification of pictures; every row counts once.

Columns after `encode`: pixels (uint8 [C, H, W] as bytes, of the size that the model reads), digest (of them), label
(class id), num_tokens (1) and truncated (never). Everything after the logits is as for texts.

    B  rows of a batch    C  channels    H  height    W  width
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from distilpeft.data import pictures
from distilpeft.data.labels import LABEL
from distilpeft.data.views import VIEW, chances
from distilpeft.errors import InputError
from distilpeft.recipe.data import Views
from distilpeft.recipe.task import ImageClassification
from distilpeft.tasks import text_rows
from distilpeft.tasks.single_label import SingleLabelTask
from distilpeft.tasks.task import Batch, Columns, Text

if TYPE_CHECKING:
    from distilpeft.tasks.task import InputReader


@dataclass(frozen=True)
class ImageClassificationTask(SingleLabelTask):
    """Single-label classification of pictures."""

    auto_class = "AutoModelForImageClassification"
    peft_task = None  # PEFT has no name for it
    section: ImageClassification

    def features(self) -> datasets.Features:
        """Columns after `encode`."""
        return datasets.Features(
            {
                "pixels": datasets.Value("binary"),
                "digest": datasets.List(datasets.Value("int32")),
                "label": datasets.Value("int64"),
                "num_tokens": datasets.Value("int32"),
                "truncated": datasets.Value("bool"),
            }
        )

    def model_options(self) -> dict[str, object]:
        """Configuration values of a model for this task."""
        return text_rows.named(self.section.labels)

    def columns(self) -> list[tuple[str, str]]:
        """Picture and label."""
        return [("image", self.section.image), ("label", self.section.label)]

    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Why each row cannot be used; of pictures the headers are read. See `text_classification.faults`."""
        return _picture_faults(rows, self.section.image)

    def texts(self, rows: datasets.Dataset) -> Iterator[Text]:
        """What makes two rows the same, for counting duplicates between splits: the file's bytes, else its path."""
        for cell in _cells(rows, self.section.image):
            yield (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell

    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Pixels and class ids; `tokenizer` is a `pictures.Reader`."""
        images = [tokenizer.pixels(cell) for cell in columns[self.section.image]]
        if VIEW in columns:
            images = [self._varied(pixels, chances) for pixels, chances in zip(images, columns[VIEW], strict=True)]
        return {
            "pixels": [pixels.tobytes() for pixels in images],
            "digest": [pictures.digest(pixels) for pixels in images],
            "label": columns[LABEL],
            "num_tokens": [1] * len(images),
            "truncated": [False] * len(images),
        }

    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """A batch: `inputs`: pixel_values [B, C, H, W]; `labels_N`: class ids."""
        import torch

        pixels = np.stack([np.frombuffer(cell, np.uint8).reshape(tokenizer.shape) for cell in columns["pixels"]])
        return {
            "inputs": {"pixel_values": torch.from_numpy(tokenizer.values(pixels))},
            "labels_N": torch.tensor(columns["label"], dtype=torch.long),
        }

    def vary(self, columns: Columns, row_ids: list[int], epoch: int, tokenizer: InputReader) -> Columns:
        """Rows as an epoch of training sees them: a function of row and epoch, so that a teacher sees the same view."""
        if self.section.augment is None:
            return columns
        images = []
        for row, cell in zip(row_ids, columns["pixels"], strict=True):
            pixels = np.frombuffer(cell, np.uint8).reshape(tokenizer.shape)
            chances = np.random.default_rng([epoch, row]).random(3).tolist()
            images.append(self._varied(pixels, chances).tobytes())
        return {**columns, "pixels": images}

    def views(self, rows: datasets.Dataset, settings: Views, seed: int) -> datasets.Dataset:
        """Copies of pictures with the random numbers by which `encode` changes them."""
        copies = [(row, view) for row in range(len(rows)) for view in range(settings.copies)]
        numbers = [[rng.random() for _ in range(3)] for rng in (chances(seed, row, view) for row, view in copies)]
        views = rows.select([row for row, _ in copies])
        feature: Any = datasets.List(datasets.Value("float64"))
        return views.add_column(VIEW, numbers, feature=feature, new_fingerprint=uuid.uuid4().hex)

    def _varied(self, pixels: pictures.Pixels, chances: Sequence[float]) -> pictures.Pixels:
        augment = self.section.augment
        assert augment is not None
        return pictures.varied(pixels, chances, flip=augment.flip, shift=augment.shift)


def _picture_faults(rows: datasets.Dataset, column: str) -> Iterator[str | None]:
    for cell in _cells(rows, column):
        try:
            pictures.opened(cell).close()
        except InputError as error:
            yield f"column {column!r}: {error}"
        else:
            yield None


def _cells(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    """Pictures as stored, not decoded."""
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return text_rows.cells(rows, column)
