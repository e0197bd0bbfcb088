"""How many tokens a student's vocabulary will keep, counted before any run by the tokenizer's file. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.cut_vocabulary import kept
from distilpeft.data.model_files.recipe_models import readings, texts_of
from distilpeft.data.model_files.tokens import Words
from distilpeft.machine.files import JsonObject
from distilpeft.recipe import Recipe
from distilpeft.tasks.checked_rows import UNLABELLED

COUNTED_ROWS = 20_000
"""Rows of which tokens are counted; a run counts all."""
AT_ONCE = 1_000


@dataclass(frozen=True)
class Kept:
    """How many tokens are kept, of how many, counted in how many rows."""

    count: int
    of: int
    rows: int


def kept_tokens(recipe: Recipe, splits: Mapping[str, datasets.Dataset] | None) -> Kept | None:
    """About how many tokens the student keeps; None if they cannot be counted here, or all are kept.

    Framing by chat templates and the tokens that only they hold are not counted.

    Raises:
        InputError: the tokens that have to be kept are more than the recipe allows.
    """
    wanted = recipe.student.vocabulary
    words = Words.of(readings(recipe)[-1].tokenizer) if wanted is not None and splits is not None else None
    if wanted is None or splits is None or words is None:
        return None
    spec: JsonObject = json.loads(words.core.to_str())
    counts_V, num_rows = np.zeros(words.size, dtype=np.int64), 0
    for rows in (splits[name] for name in ("train", UNLABELLED) if name in splits):
        some = rows.select(range(min(len(rows), COUNTED_ROWS)))
        _count(recipe, some, words, counts_V)
        num_rows += len(some)
    return Kept(len(kept.kept_ids(spec, counts_V, (), wanted)), words.size, num_rows)


def _count(recipe: Recipe, rows: datasets.Dataset, words: Words, counts_V: NDArray[np.int64]) -> None:
    """Add how often each id occurs in rows."""
    limit = None if recipe.kind.same_tokens else recipe.data.max_tokens
    texts = [text for row in texts_of(recipe, rows) for text in row]
    for start in range(0, len(texts), AT_ONCE):
        for encoded in words.core.encode_batch(texts[start : start + AT_ONCE]):
            np.add.at(counts_V, encoded.ids[:limit], 1)
