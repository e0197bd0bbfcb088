"""How long the rows are in tokens, and how many are cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets

from distilpeft.data.model_files.recipe_models import TEXT_COLUMNS, teacher_of
from distilpeft.data.model_files.tokens import Words, longest_text
from distilpeft.data.reading import SPLITS
from distilpeft.planning.choose_models import PATCHES
from distilpeft.planning.text_profile import FRAME, Count, count_with, estimate
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import CausalLM, QuestionAnswering, Seq2Seq

LOOKED_AT = 500
"""Rows of each split whose tokens are counted."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a training row on average, once it is cut; and a line for each limit with the rows that it cuts."""

    mean: float
    lines: Sequence[str] = ()


def lengths(recipe: Recipe, splits: Mapping[str, datasets.Dataset] | None) -> Lengths:
    """The lengths of a recipe's rows; as long as they may be where the rows are not here, or are made of others."""
    task, longest = recipe.task, recipe.data.max_tokens
    if recipe.kind.reads_images:
        return Lengths(PATCHES)
    if splits is None or (isinstance(task, CausalLM) and (task.pack or task.text is not None)):
        return Lengths(longest)
    teacher = teacher_of(recipe)
    words, own = Words.of(teacher), longest_text(teacher)
    count = estimate if words is None else count_with(words)
    how = "estimated from words and characters" if words is None else f"counted with the tokenizer of {teacher.name}"
    limit = min(longest, own or longest)
    if isinstance(task, Seq2Seq):
        read, written = ([one] for one in (task.source, task.target))
        limits = {
            "data.max_tokens": (read, limit),
            "task.max_target_tokens": (written, task.max_target_tokens or limit),
        }
    else:
        read = [name for key in TEXT_COLUMNS if isinstance(name := getattr(task, key, None), str)]
        limits = {"data.max_tokens": (read, limit)}
    lines = []
    for key, (columns, most) in limits.items():
        tokens = {split: _tokens(splits[split], columns, count) for split in SPLITS}
        if key == "data.max_tokens":
            mean = sum(min(one, most) for one in tokens["train"]) / max(len(tokens["train"]), 1)
        if not isinstance(task, QuestionAnswering):  # which reads long texts in windows
            lines.append(_line(f"{key}: {most}", tokens, most, how))
    return Lengths(mean, lines)


def _line(limit: str, tokens: Mapping[str, Sequence[float]], most: int, how: str) -> str:
    cut = {split: sum(one > most for one in found) for split, found in tokens.items()}
    if any(len(found) == LOOKED_AT for found in tokens.values()):
        how = f"the first {LOOKED_AT} rows of each split, {how}"
    if not any(cut.values()):
        return f"{limit} cuts no row ({how})."
    parts = [f"{cut[split]} of {len(found)} in {split}" for split, found in tokens.items()]
    return f"{limit} cuts rows: {', '.join(parts)} ({how})."


def _tokens(rows: datasets.Dataset, columns: Sequence[str], count: Count) -> list[float]:
    """Tokens of each of the first rows, with those that frame it."""
    some = rows.select(range(min(LOOKED_AT, len(rows)))).select_columns(list(columns))
    return [FRAME * len(columns) + sum(count(cell) for cell in row.values()) for row in some]
