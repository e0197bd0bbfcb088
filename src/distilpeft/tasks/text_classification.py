"""Single-label classification of texts, or of pairs of texts; every row counts once.

Columns after `encode`: those of `text_rows`, and label (class id).

    B  rows of a batch    N  rows    C  classes
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets

from distilpeft.data.labels import LABEL
from distilpeft.recipe.task import TextClassification
from distilpeft.tasks import text_rows
from distilpeft.tasks.single_label import SingleLabelTask
from distilpeft.tasks.task import Batch, Columns, Text

if TYPE_CHECKING:
    from distilpeft.tasks.task import InputReader


@dataclass(frozen=True)
class TextClassificationTask(SingleLabelTask):
    """Single-label classification of texts, or of pairs of texts."""

    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    section: TextClassification

    def features(self) -> datasets.Features:
        """Columns after `encode`."""
        return text_rows.features(self.section, label=datasets.Value("int64"))

    def model_options(self) -> dict[str, object]:
        """Configuration values of a model for this task."""
        return {**text_rows.named(self.section.labels), "problem_type": "single_label_classification"}

    def columns(self) -> list[tuple[str, str]]:
        """Texts and label."""
        return [*text_rows.columns(self.section), ("label", self.section.label)]

    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Why each row cannot be used, None if it can: row by row, in their order."""
        return text_rows.text_faults(rows, self.section.text, self.section.pair)

    def texts(self, rows: datasets.Dataset) -> Iterator[Text]:
        """The texts, or pairs of them."""
        return text_rows.texts(self.section, rows)

    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Tokens and class ids; see `text_rows.encode`."""
        return {**text_rows.encode(self.section, columns, tokenizer, max_tokens), "label": columns[LABEL]}

    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """A batch: `inputs`, see `text_rows.inputs`; `labels_N`: class ids."""
        import torch

        return {
            "inputs": text_rows.inputs(columns, tokenizer),
            "labels_N": torch.tensor(columns["label"], dtype=torch.long),
        }
