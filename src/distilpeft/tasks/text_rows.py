"""Rows that are a text, or a pair of texts: checks, tokens and batches that several tasks share.

Columns after `encode`: input_ids, num_tokens (after the cut), truncated; of pairs also token_types; and the task's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import datasets

from distilpeft.data.views import filled
from distilpeft.data.vocabulary import TYPES
from distilpeft.recipe.task import Embedding, Texts
from distilpeft.tasks.prompts.reader import PromptReader
from distilpeft.tasks.task import Batch, Cells, Columns, Text

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distilpeft.tasks.task import InputReader

BATCH_ROWS = 5_000  # read at once where every row is looked at
BASE = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "num_tokens": datasets.Value("int32"),
    "truncated": datasets.Value("bool"),
}
"""Columns of every task that reads text."""


def features(task: Texts, **own: Any) -> datasets.Features:
    """Columns after `encode`, with the task's own."""
    types = {} if task.pair is None else {"token_types": datasets.List(datasets.Value("int8"))}
    return datasets.Features({**BASE, **own, **types})


def columns(task: Texts) -> list[tuple[str, str]]:
    """The columns of texts; see `Task.columns`."""
    return [("text", task.text), *([] if task.pair is None else [("pair", task.pair)])]


def text_faults(rows: datasets.Dataset, *columns: str | None) -> Iterator[str | None]:
    """What is wrong with the texts of each row, None if nothing is; columns that the recipe does not name are None."""
    names = [column for column in columns if column is not None]
    for texts in zip(*(cells(rows, column) for column in names), strict=True):
        bad = [c for c, text in zip(names, texts, strict=True) if not isinstance(text, str) or not text.strip()]
        yield f"column {bad[0]!r} holds no text" if bad else None


def first_of(*faults: Iterator[str | None]) -> Iterator[str | None]:
    """The first fault of each row, of several kinds of them."""
    return (next(filter(None, row), None) for row in zip(*faults, strict=True))


def cells(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    """The cells of one column, some thousands in memory at a time."""
    for batch in rows.select_columns([column]).iter(batch_size=BATCH_ROWS):
        yield from batch[column]


def encode(task: Texts | Embedding, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
    """Tokenise rows that have no fault; longer ones are cut by the tokenizer, which keeps its special tokens.

    Of a pair the longer text is cut first, token by token.
    """
    pair = getattr(task, "pair", None)
    arguments = [masked(columns[column], tokenizer) for column in (task.text, pair) if column is not None]
    if isinstance(tokenizer, PromptReader):
        asked = tokenizer.encode(arguments, max_tokens)
        return asked if pair is None else {**asked, "token_types": [[0] * length for length in asked["num_tokens"]]}
    full = tokenizer(*arguments, truncation=False, verbose=False)["input_ids"]
    limit = min(max_tokens, tokenizer.model_max_length)
    encoding = tokenizer(*arguments, truncation=True, max_length=limit, return_token_type_ids=pair is not None)
    cut = encoding["input_ids"]
    types = {} if pair is None else {"token_types": encoding["token_type_ids"]}
    return {
        "input_ids": cut,
        "num_tokens": [len(ids) for ids in cut],
        "truncated": [len(ids) > limit for ids in full],
        **types,
    }


def masked(cells: Cells, tokenizer: InputReader) -> Cells:
    """Texts, or words of texts, with the tokenizer's mask for each word that a view has masked."""
    token = tokenizer.mask_token or tokenizer.unk_token or "_"
    return [filled(cell, token) for cell in cells]


def inputs(columns: Columns, tokenizer: InputReader) -> dict[str, Tensor]:
    """What the model takes, padded to the longest row of the batch.

    Returns:
        input_ids and attention_mask [B, S]; for pairs token_type_ids, where the model tells the texts apart by them.
    """
    batch = {"input_ids": columns["input_ids"]}
    if "token_types" in columns and TYPES in tokenizer.model_input_names:
        batch[TYPES] = columns["token_types"]
    return dict(tokenizer.pad(batch, return_tensors="pt"))


def texts(task: Texts | Embedding, rows: datasets.Dataset) -> Iterator[Text]:
    """What makes two rows the same, for counting duplicates between splits."""
    pair = getattr(task, "pair", None)
    if pair is None:
        return cells(rows, task.text)
    return zip(cells(rows, task.text), cells(rows, pair), strict=True)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output for every row of a batch, [B, C]."""
    logits_BC: Tensor = model(**batch["inputs"]).logits
    return logits_BC


def named(labels: Sequence[str]) -> dict[str, object]:
    """Configuration values of a model with these classes."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }


WHOLE = "whole"
"""The pooling of models that give a text's vector themselves, as static ones do."""


def pooled(output: Any, mask_BS: Any, pooling: str) -> Any:
    """A vector [B, D] for each row out of a model's output: the mean of its hidden states, the first, or its own."""
    if pooling == WHOLE:
        return output.pooler_output
    states_BSD = output.last_hidden_state
    if pooling == "first":
        return states_BSD[:, 0]
    mask_BS1 = mask_BS[..., None].to(states_BSD.dtype)
    return (states_BSD * mask_BS1).sum(1) / mask_BS1.sum(1)


def logits_of(output: Any) -> Any:
    """A transformers model's logits; those of a start and an end of an answer as [B, 2, S]."""
    if "start_logits" not in output:
        return output.logits
    import torch

    return torch.stack([output.start_logits, output.end_logits], dim=1)
