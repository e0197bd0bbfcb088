"""A tag for each word of a text: names, parts of speech, punctuation; every word counts once.

A word's answer is the model's at its first token. Words beyond `data.max_tokens` are neither learnt nor scored; how
many rows were cut is reported. Columns after `encode`: input_ids, num_tokens, truncated, num_words, and lists with an
entry per word that is read: at (its first token), label (class id).

    B  rows of a batch    S  tokens    W  words of the longest row    C  classes    N  words    R  rows    K  sums
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.labels import LABEL, Fault, class_reader, flat, shown
from distilpeft.metrics.score import Score
from distilpeft.metrics.word_spans import entities, first_tokens
from distilpeft.recipe.task import TokenClassification
from distilpeft.tasks import text_rows
from distilpeft.tasks.task import Batch, Columns, Doubles, Label, Rows, Task, Values, by_label, dense

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from distilpeft.distillation.fused import Soft
    from distilpeft.distillation.losses import Loss
    from distilpeft.metrics.classification import ByClass
    from distilpeft.tasks.task import InputReader

BINS = 15  # of confidence; as for texts
SUMS = ("words", "right", "nats", "there", "predicted", "matched", *(f"gap_{i}" for i in range(BINS)))
"""Sums over a row's words; there, predicted and matched are entities: of the labels, of the model, of both."""
BOUNDS = {"log_loss": (0.0, np.inf)}
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TokenClassificationTask(Task):
    """A tag for each word of a text."""

    auto_class = "AutoModelForTokenClassification"
    peft_task = "TOKEN_CLS"
    section: TokenClassification

    def features(self) -> datasets.Features:
        """Columns after `encode`."""
        lists = {name: datasets.List(datasets.Value("int32")) for name in ("at", "label")}
        return datasets.Features({**text_rows.BASE, **lists, "num_words": datasets.Value("int32")})

    def model_options(self) -> dict[str, object]:
        """Configuration values of a model for this task."""
        return text_rows.named(self.section.labels)

    def columns(self) -> list[tuple[str, str]]:
        """Words and tags."""
        return [("words", self.section.words), ("tags", self.section.tags)]

    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Why each row cannot be used; see `text_classification.faults`."""
        words, tags = self.section.words, self.section.tags
        if tags not in rows.column_names:
            return (_word_fault(self.section, cell) for cell in text_rows.cells(rows, words))
        cells = zip(text_rows.cells(rows, words), text_rows.cells(rows, tags), strict=True)
        return (_fault(self.section, *pair) for pair in cells)

    def labels(self, rows: datasets.Dataset) -> Iterator[Label | Fault]:
        """The class ids of each row's words."""
        column, section = self.section.tags, self.section
        reader = class_reader(
            section.labels, rows.features[column], flat(text_rows.cells(rows, column)), section.label_is
        )
        return (reader.class_ids(cell) for cell in text_rows.cells(rows, column))

    def label_feature(self) -> Any:
        """A class id for each word."""
        return datasets.List(datasets.Value("int32"))

    def blanks(self, rows: datasets.Dataset) -> Iterator[Label]:
        """Any tag for each word."""
        return ([0] * len(words) for words in text_rows.cells(rows, self.section.words))

    def classes_in(self, label: Label) -> Iterable[int]:
        """The class of each word."""
        return cast("list[int]", label)

    def texts(self, rows: datasets.Dataset) -> Iterator[str]:
        """What makes two rows the same, and what a deployed model reads: the words with spaces between them."""
        return (" ".join(words) for words in text_rows.cells(rows, self.section.words))

    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Tokens, the first token of each word and its class id."""
        rows = text_rows.masked(columns[self.section.words], tokenizer)
        joined = [" ".join(words) for words in rows]
        limit = min(max_tokens, tokenizer.model_max_length)
        full = tokenizer(joined, truncation=False, verbose=False)["input_ids"]
        read = tokenizer(joined, truncation=True, max_length=limit, return_offsets_mapping=True)
        fields: dict[str, list[Any]] = {name: [] for name in ("at", "label", "num_words")}
        for words, ids, offsets in zip(rows, columns[LABEL], read["offset_mapping"], strict=True):
            ends = np.cumsum([len(word) + 1 for word in words]) - 1
            spans = [(int(end) - len(word), int(end)) for word, end in zip(words, ends, strict=True)]
            kept, at = first_tokens(spans, offsets)
            fields["at"].append(at)
            fields["label"].append([ids[w] for w in kept])
            fields["num_words"].append(len(kept))
        return {
            "input_ids": read["input_ids"],
            "num_tokens": [len(ids) for ids in read["input_ids"]],
            "truncated": [len(ids) > limit for ids in full],
            **fields,
        }

    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """Pad to the longest row of the batch.

        Returns:
            `inputs`: input_ids and attention_mask [B, S]. `at_N`: flat positions b * S + s of the words' first tokens,
            `labels_N` their class ids, `rows_N` the b of each, `order_N` its place among the words of its row.
        """
        import torch

        inputs = dict(tokenizer.pad({"input_ids": columns["input_ids"]}, padding_side="right", return_tensors="pt"))
        width = inputs["input_ids"].shape[1]
        flat = [b * width + s for b, at in enumerate(columns["at"]) for s in at]
        return {
            "inputs": inputs,
            "at_N": torch.tensor(flat, dtype=torch.long),
            "labels_N": torch.tensor([label for labels in columns["label"] for label in labels], dtype=torch.long),
            "rows_N": torch.tensor([b for b, at in enumerate(columns["at"]) for _ in at], dtype=torch.long),
            "order_N": torch.tensor([w for at in columns["at"] for w in range(len(at))], dtype=torch.long),
        }

    def soft(self, teacher: nn.Module, batch: Batch) -> Tensor:
        """What the frozen teacher knows of a batch: the logits of its words."""
        return word_logits(teacher, batch).float()

    def num_positions(self, rows: Rows) -> Ints:
        """How many soft targets each row has: one per word."""
        return rows.column("num_words").astype(np.int64)

    def vocabulary(self, teacher: PreTrainedModel, max_tokens: int) -> int:
        """Numbers in a soft target: a logit of each class."""
        return len(self.section.labels)

    def loss_sum(self, model: nn.Module, batch: Batch, loss: Loss, soft: Soft | None) -> Tensor:
        """The loss summed over words."""
        from distilpeft.distillation.losses import counted_sum

        ours = word_logits(model, batch)
        return by_label(batch, loss, lambda own, rows: counted_sum(ours, batch["labels_N"], dense(soft), own, rows))

    def measure(self, model: nn.Module, batch: Batch, soft: Soft | None = None) -> Tensor:
        """The logits of a row's words, one after the other, [B, W * C]; then zeros."""
        logits_NC = word_logits(model, batch).float()
        num_rows, width = len(batch["inputs"]["input_ids"]), 1 + int(batch["order_N"].max()) if len(logits_NC) else 1
        values_BWC = logits_NC.new_zeros(num_rows, width, logits_NC.shape[-1])
        values_BWC[batch["rows_N"], batch["order_N"]] = logits_NC
        return values_BWC.flatten(1)

    def majority_values(self, train: Rows, rows: Rows) -> NDArray[np.float32]:
        """`measure` of the class-frequency baseline, whose top class is the commonest tag."""
        labels_N = np.concatenate(list(train.column("label")))
        share_C = np.bincount(labels_N, minlength=len(self.section.labels)) / max(len(labels_N), 1)
        width = int(rows.column("num_words").max(initial=1))
        return np.tile(np.log(np.maximum(share_C, 1e-9)), (len(rows.lengths_N), width)).astype(np.float32)

    def metrics(self, values_RK: Values, rows: Rows) -> dict[str, float]:
        """All metrics: those of whole entities, and those of words."""
        return _metrics(sums(self.section, values_RK, rows).sum(0))

    def scores(self, names: tuple[str, ...], values_RK: Values, rows: Rows) -> dict[str, Score]:
        """Metric → value, 95 % interval and number of words; rows are resampled, as a row's words correlate."""
        from distilpeft.metrics.classification import scored

        sums_RK = sums(self.section, values_RK, rows)
        words = int(sums_RK[:, 0].sum())
        return scored(lambda draw: _metrics(sums_RK[draw].sum(0)), names, len(sums_RK), BOUNDS, words)

    def added(self, values_RK: Values, rows: Rows) -> tuple[Doubles, Doubles]:
        """What each row adds to the sum of F1 over entities, and to its denominator, which depends on the model."""
        sums_RK = sums(self.section, values_RK, rows)
        there_R, told_R, found_R = (sums_RK[:, SUMS.index(name)] for name in ("there", "predicted", "matched"))
        return 2 * found_R, there_R + told_R

    def calibration(self, values_RK: Values, rows: Rows) -> dict[str, list[float]] | None:
        """Mean confidence, share of right tags and words of each bin of confidence that has any."""
        from distilpeft.metrics.classification import reliability
        from distilpeft.metrics.probabilities import softmax

        logits_NC, labels_N = self._words(values_RK, rows)
        return reliability(softmax(logits_NC), labels_N)

    def by_class(self, values_RK: Values, rows: Rows) -> ByClass | None:
        """The tags of all words, by tag."""
        from distilpeft.metrics.classification import by_class

        logits_NC, labels_N = self._words(values_RK, rows)
        return by_class(logits_NC.argmax(-1), labels_N, len(self.section.labels))

    def _words(self, values_RK: Values, rows: Rows) -> tuple[Values, NDArray[np.int64]]:
        """Logits and tags of all words of all rows."""
        logits_NC = _flat(values_RK, rows.column("num_words").astype(np.int64), len(self.section.labels))
        return logits_NC, np.concatenate([np.asarray(ids, dtype=np.int64) for ids in rows.column("label")])

    def against_teacher(self, values_RK: Values, teacher_RK: Values, rows: Rows) -> dict[str, float]:
        """KL(teacher || model) in nats per word and the share of words with the same tag."""
        from distilpeft.metrics.classification import agreement

        num_words_R = rows.column("num_words").astype(np.int64)
        ours, theirs = (
            np.asarray(_flat(values, num_words_R, len(self.section.labels)), dtype=np.float64)
            for values in (values_RK, teacher_RK)
        )
        return agreement(ours, theirs)


def _fault(task: TokenClassification, words: Any, tags: Any) -> str | None:
    for column, cell in ((task.words, words), (task.tags, tags)):
        if not isinstance(cell, list) or not cell:
            return _no_list(column, cell)
    if len(words) != len(tags):
        return f"{len(words)} words in {task.words!r}, but {len(tags)} tags in {task.tags!r}"
    return _word_fault(task, words)


def _word_fault(task: TokenClassification, words: object) -> str | None:
    if not isinstance(words, list) or not words:
        return _no_list(task.words, words)
    empty = [at for at, word in enumerate(words, 1) if not isinstance(word, str) or not word.strip()]
    return f"word {empty[0]} of {task.words!r} is empty or no text" if empty else None


def _no_list(column: str, cell: object) -> str:
    return f"column {column!r} holds {shown(cell)}, not a list with an entry per word"


def word_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of every word of a batch, [N, C]."""
    logits_BSC: Tensor = model(**batch["inputs"]).logits
    return logits_BSC.reshape(-1, logits_BSC.shape[-1])[batch["at_N"]]


def _flat(values_RK: Values, num_words_R: Ints, num_classes: int) -> Values:
    """The logits of all words, row by row, [N, C]."""
    values_RWC = values_RK.reshape(len(values_RK), -1, num_classes)
    return values_RWC[np.arange(values_RWC.shape[1]) < num_words_R[:, None]]


def sums(task: TokenClassification, values_RK: Values, rows: Rows) -> Doubles:
    """What each row adds to the scores, [R, K] in the order of `SUMS`."""
    from distilpeft.metrics.probabilities import log_softmax

    num_words_R = rows.column("num_words").astype(np.int64)
    log_p_NC = log_softmax(_flat(values_RK, num_words_R, len(task.labels)).astype(np.float64))
    labels_N = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in rows.column("label")])
    rows_N, guess_N = np.repeat(np.arange(len(num_words_R)), num_words_R), log_p_NC.argmax(-1)
    right_N = (guess_N == labels_N).astype(np.float64)
    sure_N = np.exp(log_p_NC.max(-1))
    sums_RK = np.zeros((len(num_words_R), len(SUMS)))
    sums_RK[:, 0] = num_words_R
    nats_N = -log_p_NC[np.arange(len(labels_N)), labels_N]
    for column, values_N in ((1, right_N), (2, nats_N)):
        sums_RK[:, column] = np.bincount(rows_N, values_N, minlength=len(sums_RK))
    bins_N = len(SUMS) - BINS + np.minimum((sure_N * BINS).astype(int), BINS - 1)
    np.add.at(sums_RK, (rows_N, bins_N), sure_N - right_N)
    ends_R = np.cumsum(num_words_R)
    for row, (start, end) in enumerate(zip(ends_R - num_words_R, ends_R, strict=True)):
        gold, guess = (
            set(entities([task.labels[i] for i in ids_N[start:end]])) if end > start else set()
            for ids_N in (labels_N, guess_N)
        )
        sums_RK[row, 3:6] = len(gold), len(guess), len(gold & guess)
    return sums_RK


def _metrics(sums_K: Doubles) -> dict[str, float]:
    total = dict(zip(SUMS, (float(value) for value in sums_K), strict=True))
    words = max(total["words"], 1.0)
    return {
        "entity_f1": 2 * total["matched"] / max(total["predicted"] + total["there"], 1.0),
        "entity_precision": total["matched"] / max(total["predicted"], 1.0),
        "entity_recall": total["matched"] / max(total["there"], 1.0),
        "accuracy": total["right"] / words,
        "ece": float(np.abs(sums_K[-BINS:]).sum()) / words,
        "log_loss": total["nats"] / words,
    }
