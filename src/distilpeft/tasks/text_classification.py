"""Single-label classification of texts, or of pairs of texts; every row counts once.

Columns after `encode`: input_ids, label (class id), num_tokens (after the cut), truncated; of pairs also token_types.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import InputError
from distilpeft.recipe import TextClassification
from distilpeft.runners import TYPES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distilpeft.losses import Loss

AUTO_CLASS = "AutoModelForSequenceClassification"
PEFT_TASK = "SEQ_CLS"
TRAIN_HEADS = True  # the classifier comes without pretrained weights
BATCH_ROWS = 5_000  # read at once where every row is looked at
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "label": datasets.Value("int64"),
        "num_tokens": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
    }
)
PAIR_FEATURES = datasets.Features({**FEATURES, "token_types": datasets.List(datasets.Value("int8"))})


def features(task: TextClassification) -> datasets.Features:
    """Columns after `encode`."""
    return FEATURES if task.pair is None else PAIR_FEATURES


def model_options(task: TextClassification) -> dict[str, Any]:
    """Configuration values of a model for this task."""
    return {
        "num_labels": len(task.labels),
        "id2label": dict(enumerate(task.labels)),
        "label2id": {name: index for index, name in enumerate(task.labels)},
        "problem_type": "single_label_classification",
    }


def check_rows(task: TextClassification, rows: datasets.Dataset, numbers_N: NDArray[np.int64], origin: str) -> None:
    """Refuse rows that cannot be used.

    Args:
        task: names the columns and classes.
        rows: the rows.
        numbers_N: each row's number in its source, from 1 (a CSV header is not counted).
        origin: the source, for the message.

    Raises:
        InputError: names the first bad row, what is wrong and how many there are.
    """
    columns = {"text": task.text, "pair": task.pair, "label": task.label}
    for key, column in columns.items():
        if column is not None and column not in rows.column_names:
            has = ", ".join(rows.column_names)
            raise InputError(f"task.{key}: {origin} has no column {column!r}; its columns are {has}")
    for column in (task.text, task.pair):
        if column is None:
            continue
        empty = [
            n
            for n, text in zip(numbers_N, _cells(rows, column), strict=True)
            if not isinstance(text, str) or not text.strip()
        ]
        if empty:
            raise InputError(f"{origin}: row {empty[0]}: column {column!r} holds no text ({len(empty)} such rows)")
    names, is_index = _names(task, rows.features)
    bad = [
        (n, value)
        for n, value in zip(numbers_N, _cells(rows, task.label), strict=True)
        if class_id(value, names, is_index=is_index) is None
    ]
    if bad:
        number, value = bad[0]
        allowed = ", ".join(task.labels)
        raise InputError(
            f"{origin}: row {number}: label {value!r} is none of task.labels ({allowed}) nor an index "
            f"0..{len(task.labels) - 1} ({len(bad)} such rows)"
        )


def _cells(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    """The cells of one column, some thousands in memory at a time."""
    for batch in rows.select_columns([column]).iter(batch_size=BATCH_ROWS):
        yield from batch[column]


def class_id(value: Any, labels: Sequence[str], *, is_index: bool = False) -> int | None:
    """The class id of a label cell, None if it is neither a class name nor an index.

    A name comes first: with labels "1" and "2", a cell 1 means the class named "1", however the file spells it.
    `is_index` says that the cells are indices for sure (a hub's ClassLabel column).
    """
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    text = str(value).strip()
    if text in labels and not is_index:
        return list(labels).index(text)
    if isinstance(value, str):
        value = int(text) if text.isdecimal() else None
    return int(value) if value is not None and 0 <= value < len(labels) else None


def _names(task: TextClassification, features: datasets.Features) -> tuple[Sequence[str], bool]:
    """Class names in the source's own order, and whether cells are indices into them.

    A hub's ClassLabel column may number the same names otherwise than the recipe.
    """
    feature = features[task.label]
    if isinstance(feature, datasets.ClassLabel):
        return (list(feature.names) if set(feature.names) == set(task.labels) else task.labels), True
    return task.labels, False


def class_ids(task: TextClassification, features: datasets.Features, cells: Iterable[Any]) -> list[int]:
    """Class ids, in the order of `task.labels`, of label cells that passed `check_rows`."""
    names, is_index = _names(task, features)
    found = []
    for cell in cells:
        index = class_id(cell, names, is_index=is_index)
        assert index is not None, f"label {cell!r} passed the row check"
        found.append(task.labels.index(names[index]))
    return found


def encode(
    task: TextClassification,
    features: datasets.Features,
    batch: dict[str, list[Any]],
    tokenizer: Any,
    max_tokens: int,
) -> dict[str, list[Any]]:
    """Tokenise rows that passed `check_rows`; longer ones are cut by the tokenizer, which keeps its special tokens.

    Of a pair the longer text is cut first, token by token.
    """
    given = [batch[column] for column in (task.text, task.pair) if column is not None]
    full = tokenizer(*given, truncation=False, verbose=False)["input_ids"]
    limit = min(max_tokens, tokenizer.model_max_length)
    found = tokenizer(*given, truncation=True, max_length=limit, return_token_type_ids=task.pair is not None)
    cut = found["input_ids"]
    types = {} if task.pair is None else {"token_types": found["token_type_ids"]}
    return {
        "input_ids": cut,
        "label": class_ids(task, features, batch[task.label]),
        "num_tokens": [len(ids) for ids in cut],
        "truncated": [len(ids) > limit for ids in full],
        **types,
    }


def collate(rows: dict[str, list[Any]], tokenizer: Any) -> dict[str, Any]:
    """Pad to the longest row of the batch.

    Returns:
        `inputs`: what the model takes (input_ids and attention_mask, shape [B, S]; for pairs token_type_ids, where it
        tells the texts apart by them); `labels_N`: class ids.
    """
    import torch

    given = {"input_ids": rows["input_ids"]}
    if "token_types" in rows and TYPES in tokenizer.model_input_names:
        given[TYPES] = rows["token_types"]
    inputs = tokenizer.pad(given, return_tensors="pt")
    return {"inputs": dict(inputs), "labels_N": torch.tensor(rows["label"], dtype=torch.long)}


def count_rows(batch: dict[str, Any]) -> int:
    """How many rows of a collated batch the loss counts: here all."""
    return len(batch["labels_N"])


def texts(task: TextClassification, rows: datasets.Dataset) -> Iterator[str | tuple[str, str]]:
    """What makes two rows the same, for counting duplicates between splits."""
    if task.pair is None:
        return _cells(rows, task.text)
    return zip(_cells(rows, task.text), _cells(rows, task.pair), strict=True)


def prepare(task: TextClassification, model: Any) -> None:
    """Nothing to find out: the logits are the model's output."""


def row_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Logits of every row of a batch, [B, C]."""
    logits: Tensor = model(**batch["inputs"]).logits
    return logits


def soft(teacher: nn.Module, batch: dict[str, Any]) -> Tensor:
    """What the frozen teacher knows of a batch: its logits."""
    return row_logits(teacher, batch).float()


def num_positions(rows: Any) -> NDArray[np.int64]:
    """How many soft targets each row has: one."""
    return np.ones(len(rows.lengths_N), dtype=np.int64)


def vocabulary(task: TextClassification, teacher: Any) -> int:
    """Numbers in a soft target: a logit of each class."""
    del teacher
    return len(task.labels)


def loss_sum(model: nn.Module, batch: dict[str, Any], loss: Loss, soft: Tensor | None) -> Tensor:
    """The loss summed over rows."""
    from distilpeft.losses import distil_sum

    return distil_sum(row_logits(model, batch), batch["labels_N"], soft, loss)


def measure(model: nn.Module, batch: dict[str, Any], soft: Tensor | None = None) -> Tensor:
    """What the scores of a row are computed from: its logits, [B, C]."""
    del soft
    return row_logits(model, batch)


def majority_values(task: TextClassification, train: Any, rows: Any) -> NDArray[np.float32]:
    """`measure` of the answer "as often as in training", whose top class is the majority's, [B, C]."""
    labels_N = train.column("label")
    share_C = np.bincount(labels_N, minlength=len(task.labels)) / len(labels_N)
    return np.tile(np.log(np.maximum(share_C, 1e-9)), (len(rows.lengths_N), 1)).astype(np.float32)


def metrics(values_NC: NDArray[np.floating[Any]], rows: Any) -> dict[str, float]:
    """All metrics that work without a hub."""
    from distilpeft.metrics import FUNCTIONS
    from distilpeft.probabilities import softmax

    probabilities_NC = softmax(values_NC)
    labels_N = rows.column("label")
    return {name: score(probabilities_NC, labels_N) for name, score in FUNCTIONS.items()}


def scores(names: tuple[str, ...], values_NC: NDArray[np.floating[Any]], rows: Any) -> dict[str, dict[str, Any]]:
    """Metric → value, 95 % interval and number of rows."""
    from distilpeft import metrics as classifier

    return classifier.scores(names, values_NC.astype(np.float64), rows.column("label"))


def added(values_NC: NDArray[np.floating[Any]], rows: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each row adds to the accuracy's sum, and to its denominator."""
    right_N = values_NC.argmax(-1) == rows.column("label")
    return right_N.astype(np.float64), np.ones(len(right_N))


def calibration(values_NC: NDArray[np.floating[Any]], rows: Any) -> dict[str, list[float]] | None:
    """Mean confidence, share of right answers and rows of each bin of confidence that has any."""
    from distilpeft.metrics import reliability
    from distilpeft.probabilities import softmax

    return reliability(softmax(values_NC), rows.column("label"))


def against_teacher(
    values_NC: NDArray[np.floating[Any]], teacher_NC: NDArray[np.floating[Any]]
) -> dict[str, float] | None:
    """KL(teacher || model) in nats per row and the share of rows with the same top class."""
    from distilpeft.metrics import agreement

    return agreement(values_NC.astype(np.float64), teacher_NC.astype(np.float64))


def forward(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """One pass as users make it."""
    return model(**inputs)


def samples(model: Any, tokenizer: Any, rows: Any, count: int, max_new_tokens: int) -> list[dict[str, str]]:
    """A classifier writes nothing."""
    del model, tokenizer, rows, count, max_new_tokens
    return []
