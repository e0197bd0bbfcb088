"""Any number of classes for each text, or pair of texts; every class of every row is a decision that counts once.

A decision is a distribution over no and yes with the logits (0, z): its softmax is the sigmoid of z, and the KL of two
such distributions the KL of Bernoulli variables. So the loss is that of classes, on [N * C, 2]. Columns after `encode`:
those of `text_rows`, and label (0 or 1 for each class).

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

from distilpeft.data.labels import LABEL, ClassReader, Fault, class_reader, flat, is_one_hot, shown
from distilpeft.metrics.score import Score
from distilpeft.recipe.task import MultiLabelClassification
from distilpeft.tasks import text_rows
from distilpeft.tasks.task import Batch, Columns, Doubles, Label, Rows, Task, Text, Values, by_label, dense
from distilpeft.tasks.text_rows import logits as measured

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from distilpeft.distillation.fused import Soft
    from distilpeft.distillation.losses import Loss
    from distilpeft.metrics.classification import ByClass
    from distilpeft.tasks.task import InputReader

BOUNDS = {"log_loss": (0.0, np.inf)}


@dataclass(frozen=True)
class MultiLabelTask(Task):
    """Any number of classes for each text, or pair of texts."""

    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    section: MultiLabelClassification

    def features(self) -> datasets.Features:
        """Columns after `encode`."""
        return text_rows.features(
            self.section, label=datasets.List(datasets.Value("int8"), length=len(self.section.labels))
        )

    def model_options(self) -> dict[str, object]:
        """Configuration values of a model for this task."""
        return {**text_rows.named(self.section.labels), "problem_type": "multi_label_classification"}

    def columns(self) -> list[tuple[str, str]]:
        """Texts, and the column of classes or one for each class."""
        label, names = self.section.label, self.section.labels
        own = [("labels", name) for name in names] if label is None else [("label", label)]
        return [*text_rows.columns(self.section), *own]

    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Why each row cannot be used; see `text_classification.faults`."""
        return text_rows.text_faults(rows, self.section.text, self.section.pair)

    def labels(self, rows: datasets.Dataset) -> Iterator[Label | Fault]:
        """0 or 1 for each class of each row."""
        return _of_columns(self.section, rows) if self.section.label is None else _of_lists(self.section, rows)

    def label_feature(self) -> Any:
        """0 or 1 for each class."""
        return datasets.List(datasets.Value("int8"), length=len(self.section.labels))

    def blanks(self, rows: datasets.Dataset) -> Iterator[Label]:
        """No class."""
        return itertools.repeat([0] * len(self.section.labels), len(rows))

    def classes_in(self, label: Label) -> Iterable[int]:
        """The classes of a row."""
        return np.flatnonzero(label).tolist()

    def texts(self, rows: datasets.Dataset) -> Iterator[Text]:
        """The texts, or pairs of them."""
        return text_rows.texts(self.section, rows)

    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Tokens, see `text_rows.encode`, and 0 or 1 for each class."""
        return {**text_rows.encode(self.section, columns, tokenizer, max_tokens), "label": columns[LABEL]}

    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """A batch: `inputs`, see `text_rows.inputs`; `labels_N`: 0 or 1, [B, C]."""
        import torch

        return {
            "inputs": text_rows.inputs(columns, tokenizer),
            "labels_N": torch.tensor(columns["label"], dtype=torch.long),
        }

    def soft(self, teacher: nn.Module, batch: Batch) -> Tensor:
        """What the frozen teacher knows of a batch: its logits, [B, C]."""
        return measured(teacher, batch).float()

    def vocabulary(self, teacher: PreTrainedModel, max_tokens: int) -> int:
        """Numbers in a soft target: a logit of each class."""
        return len(self.section.labels)

    def loss_sum(self, model: nn.Module, batch: Batch, loss: Loss, soft: Soft | None) -> Tensor:
        """The loss summed over decisions."""
        from distilpeft.distillation.losses import counted_sum

        known = dense(soft)
        found, theirs = _no_yes(measured(model, batch)), None if known is None else _no_yes(known)
        labels_N = batch["labels_N"].reshape(-1)
        return by_label(batch, loss, lambda own, rows: counted_sum(found, labels_N, theirs, own, rows))

    def hardened(self, soft: Tensor) -> Tensor:
        """Soft targets [N, C] that are sure of every decision."""
        from distilpeft.distillation.losses import MASKED

        return soft.new_tensor(-MASKED).copysign(soft)

    def measure(self, model: nn.Module, batch: Batch, soft: Soft | None = None) -> Tensor:
        """What the scores of a row are computed from: its logits, [B, C]."""
        return measured(model, batch)

    def answers(self, logits_NC: Values, labels_NC: Values) -> tuple[Values, Values]:
        """Outputs and labels as the export's gate compares them: every decision's logits of no and yes, and 0 or 1."""
        return decisions(logits_NC), labels_NC.reshape(-1)

    def majority_values(self, train: Rows, rows: Rows) -> NDArray[np.float32]:
        """`measure` of the class-frequency baseline for each class, [N, C]."""
        return np.tile(self.head_start(train), (len(rows.lengths_N), 1)).astype(np.float32)

    def head_start(self, train: Rows) -> Doubles:
        """The log-odds of each class in training, [C], with one more row that has it and one that has not."""
        labels_NC = _labels(train)
        share_C = (labels_NC.sum(0) + 1) / (len(labels_NC) + 2)
        found_C: Doubles = np.log(share_C / (1 - share_C))
        return found_C

    def metrics(self, values_NC: Values, rows: Rows) -> dict[str, float]:
        """All metrics: F1 by row, over all decisions, and by class; a class is chosen where its logit is positive."""
        return _metrics(values_NC.astype(np.float64), _labels(rows))

    def scores(self, names: tuple[str, ...], values_NC: Values, rows: Rows) -> dict[str, Score]:
        """Metric → value, 95 % interval and number of rows."""
        from distilpeft.metrics.classification import scored

        wide_NC, labels_NC = values_NC.astype(np.float64), _labels(rows)
        return scored(lambda draw: _metrics(wide_NC[draw], labels_NC[draw]), names, len(wide_NC), BOUNDS)

    def added(self, values_NC: Values, rows: Rows) -> tuple[Doubles, Doubles]:
        """What each row adds to the sum of F1 by row, and to its denominator."""
        found_N = samples_f1(values_NC > 0, _labels(rows).astype(bool))
        return found_N, np.ones(len(found_N))

    def calibration(self, values_NC: Values, rows: Rows) -> dict[str, list[float]] | None:
        """Mean confidence, share of right decisions and their number in each bin of confidence that has any."""
        from distilpeft.metrics.classification import reliability
        from distilpeft.metrics.probabilities import softmax

        return reliability(softmax(decisions(values_NC)), _labels(rows).reshape(-1))

    def by_class(self, values_NC: Values, rows: Rows) -> ByClass | None:
        """The answers by class; a row may have several."""
        from distilpeft.metrics.classification import ByClass

        chosen_NC, labels_NC = values_NC > 0, _labels(rows).astype(bool)
        return ByClass((chosen_NC & labels_NC).sum(0), chosen_NC.sum(0), labels_NC.sum(0))

    def against_teacher(self, values_NC: Values, teacher_NC: Values, rows: Rows) -> dict[str, float]:
        """KL(teacher || model) in nats per decision and the share of decisions that are the same."""
        from distilpeft.metrics.classification import agreement

        ours, theirs = (np.asarray(decisions(values), dtype=np.float64) for values in (values_NC, teacher_NC))
        return agreement(ours, theirs)


def _of_lists(task: MultiLabelClassification, rows: datasets.Dataset) -> Iterator[Label | Fault]:
    """Labels of one column that holds all classes of a row: names, ids, or 0 and 1 for each class."""
    assert task.label is not None
    column = task.label

    def cells() -> Iterator[list[object] | None]:
        return (listed(task, cell) for cell in text_rows.cells(rows, column))

    looks_one_hot = task.label_is is None and is_one_hot(task.labels, cells())
    one_hot = task.label_is == "one_hot" or (looks_one_hot and len(task.labels) > 2)
    label_is = None if task.label_is == "one_hot" else task.label_is
    reader = class_reader(task.labels, rows.features[column], flat(cells()), label_is)
    for cell, found in zip(text_rows.cells(rows, column), cells(), strict=True):
        if found is None:
            wants = "a text" if task.separator else "a list"
            hint = "" if task.separator else "; of a text, say what stands between the names: task.separator"
            yield Fault(f"column {column!r} holds {shown(cell)}, not {wants}{hint}")
        elif one_hot:
            yield _one_hot(task, found)
        elif looks_one_hot:
            yield Fault(
                f"{shown(cell)} may be 0 and 1 for each of the two classes, or a list of ids: say which with "
                "task.label_is: one_hot, or index"
            )
        else:
            yield _chosen(reader, found)


def _chosen(reader: ClassReader, cells: list[object]) -> Label | Fault:
    """0 or 1 for each class, of a list of names or ids."""
    if any(isinstance(one, float) for one in cells):
        return Fault(f"a list of classes holds names or whole numbers, not {shown(cells)}")
    ids = reader.class_ids(cells)
    if isinstance(ids, Fault):
        return ids
    if len(set(ids)) < len(ids):
        return Fault(
            f"{shown(cells)} names a class twice; a list with 0 or 1 for each class has {len(reader.labels)} entries "
            "in every row"
        )
    return [int(index in ids) for index in range(len(reader.labels))]


def _one_hot(task: MultiLabelClassification, cells: list[object]) -> Label | Fault:
    """0 or 1 for each class, of a list with as many entries."""
    values = [yes_no(cell) for cell in cells]
    if len(values) != len(task.labels) or None in values:
        return Fault(f"label {shown(cells)} is not a list of {len(task.labels)} entries, 0 or 1 for each class")
    return cast("list[int]", values)


def _of_columns(task: MultiLabelClassification, rows: datasets.Dataset) -> Iterator[Label | Fault]:
    """Labels of a column for each class."""
    for cells in zip(*(text_rows.cells(rows, name) for name in task.labels), strict=True):
        values = [yes_no(cell) for cell in cells]
        bad = values.index(None) if None in values else None
        if bad is None:
            yield cast("list[int]", values)
        else:
            yield Fault(f"column {task.labels[bad]!r} holds {shown(cells[bad])}, neither 0 nor 1")


def yes_no(cell: object) -> int | None:
    """A cell of a class's own column: 1, 0, true or false, also as text; None for anything else."""
    return {"1": 1, "0": 0, "true": 1, "false": 0, "1.0": 1, "0.0": 0}.get(str(cell).strip().lower())


def listed(task: MultiLabelClassification, cell: object) -> list[object] | None:
    """The classes in a cell, one by one; None if it is not of the form that the recipe says."""
    if task.separator is None:
        return list(cell) if isinstance(cell, list | tuple) else None
    if cell is None:
        return []
    return [part.strip() for part in cell.split(task.separator) if part.strip()] if isinstance(cell, str) else None


def _no_yes(logits_BC: Tensor) -> Tensor:
    """Each decision's logits of no and yes, [B * C, 2]."""
    import torch

    flat_M = logits_BC.reshape(-1)
    return torch.stack([torch.zeros_like(flat_M), flat_M], dim=-1)


def decisions(logits_NC: Values) -> Values:
    """Each decision's logits of no and yes, [N * C, 2]."""
    flat_M = logits_NC.reshape(-1)
    return np.stack([np.zeros_like(flat_M), flat_M], axis=-1)


def _labels(rows: Rows) -> NDArray[np.int64]:
    return np.stack(list(rows.column("label"))).astype(np.int64)


def samples_f1(chosen_NC: NDArray[np.bool_], right_NC: NDArray[np.bool_]) -> Doubles:
    """F1 of each row's classes; 1 for a row that has none and gets none."""
    both_N, either_N = (chosen_NC & right_NC).sum(-1), chosen_NC.sum(-1) + right_NC.sum(-1)
    return np.where(either_N == 0, 1.0, 2 * both_N / np.maximum(either_N, 1))


def _metrics(logits_NC: Doubles, labels_NC: NDArray[np.int64]) -> dict[str, float]:
    from distilpeft.metrics.classification import ece
    from distilpeft.metrics.probabilities import softmax

    chosen_NC, right_NC = logits_NC > 0, labels_NC.astype(bool)
    both_C, either_C = (chosen_NC & right_NC).sum(0), chosen_NC.sum(0) + right_NC.sum(0)
    same_NC = chosen_NC == right_NC
    # log(1 + exp(-z)) of a yes, log(1 + exp(z)) of a no
    nats = np.logaddexp(0.0, np.where(right_NC, -logits_NC, logits_NC)).mean()
    return {
        "samples_f1": float(samples_f1(chosen_NC, right_NC).mean()),
        "micro_f1": float(2 * both_C.sum() / max(either_C.sum(), 1)),
        "macro_f1": float((2 * both_C / np.maximum(either_C, 1)).mean()),
        "exact_match": float(same_NC.all(-1).mean()),
        "accuracy": float(same_NC.mean()),
        "ece": ece(softmax(decisions(logits_NC)), labels_NC.reshape(-1)),
        "log_loss": float(nats),
    }
