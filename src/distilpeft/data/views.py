"""Views: changed copies of rows, for the teacher to label where there is no other text. Torch-free.

Words are masked, replaced by words of other rows, cut away at either side, or followed by the end of another row;
masking and n-gram sampling are from arXiv:1903.12136, section 2.3. A view is a function of seed, row and number alone,
but for the words that it borrows.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from typing import TypeVar

from distilpeft.recipe.data import Views

MASK = "\ufdd0"
"""Stands for a masked word until a tokenizer is known; a character that no text may hold."""
VIEW = "__view__"
"""Column of rows that are changed only when they are encoded: the random numbers of their change."""
CLOSE = "\u2e80-\u2fff\u3001-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of languages that put no spaces between words; each counts as one."""
WORD = re.compile(rf"(?:[{CLOSE}]|[^\s{CLOSE}]+)\s*")
Cell = str | list[str]
"""A text, or its words."""
Words = list[str]
"""Of a text each with the white space behind it."""
T = TypeVar("T")
SHORTEST = 0.5
"""The least share of its words that a crop keeps."""


def chances(seed: int, row: int, view: int) -> random.Random:
    """The random numbers of one view; `random()` gives the same in every version of Python."""
    return random.Random(f"{seed} {row} {view}")


def views(rows: Sequence[Sequence[Cell]], settings: Views, seed: int) -> list[tuple[Cell, ...]]:
    """Changed copies of rows.

    Args:
        rows: what is read of each row: a text or more, none of them empty.
        settings: how many copies, and how they are changed.
        seed: of all changes.

    Returns:
        `settings.copies` of the first row, then those of the second, and so on.
    """
    columns = [[split(cell) for cell in cells] for cells in zip(*rows, strict=True)]
    copies = []
    for row, cells in enumerate(rows):
        for view in range(settings.copies):
            changed = _changed(columns, row, settings, chances(seed, row, view))
            copies.append(tuple(_joined(words, cell) for words, cell in zip(changed, cells, strict=True)))
    return copies


def filled(cell: Cell, mask: str) -> Cell:
    """A cell with a tokenizer's own mask where words are masked."""
    if isinstance(cell, str):
        return cell.replace(MASK, mask)
    return [word.replace(MASK, mask) for word in cell]


def split(cell: Cell) -> Words:
    """The words of a text, with the white space behind them."""
    return WORD.findall(cell.lstrip()) if isinstance(cell, str) else cell


def _joined(words: Words, like: Cell) -> Cell:
    """Words in the form of the row's own cell; words that came together get a space between them."""
    if not isinstance(like, str):
        return words
    text = "".join(
        word if word[-1].isspace() or _close(word[-1]) or _close(after[0]) else f"{word} "
        for word, after in itertools.pairwise(words)
    )
    return (text + words[-1]).rstrip()


def _close(character: str) -> bool:
    return re.match(f"[{CLOSE}]", character) is not None


def _changed(columns: Sequence[Sequence[Words]], row: int, settings: Views, rng: random.Random) -> list[Words]:
    """One view of a row; its texts are cropped, or spliced with those of another row, together."""
    crop, splice = rng.random() < settings.crop, rng.random() < settings.splice
    partner = int(rng.random() * len(columns[0]))
    texts = []
    for rows in columns:
        words = rows[row]
        if crop:
            words = _cropped(words, rng)
        if splice:
            words = _spliced(words, rows[partner], rng)
        texts.append(_replaced(words, rows, settings, rng))
    return texts


def _cropped(words: Words, rng: random.Random) -> Words:
    """Half of the words or more, without gaps."""
    count = max(1, round(len(words) * (SHORTEST + (1 - SHORTEST) * rng.random())))
    start = int(rng.random() * (len(words) - count + 1))
    return words[start : start + count]


def _spliced(words: Words, theirs: Words, rng: random.Random) -> Words:
    """The beginning of one row and the end of another, both cut at the same share of their words."""
    share = rng.random()
    return [*words[: max(1, round(len(words) * share))], *theirs[round(len(theirs) * share) :]]


def _replaced(words: Words, pool: Sequence[Words], settings: Views, rng: random.Random) -> Words:
    """Words of which some are masked, others replaced; one at least is not masked."""
    result = []
    for word in words:
        draw = rng.random()
        if draw < settings.mask:
            result.append(MASK + _gap(word))
        elif draw < settings.mask + settings.replace:
            result.append(_any(_any(pool, rng), rng).rstrip() + _gap(word))
        else:
            result.append(word)
    if all(word.startswith(MASK) for word in result):
        index = int(rng.random() * len(words))
        result[index] = words[index]
    return result


def _any(several: Sequence[T], rng: random.Random) -> T:
    return several[int(rng.random() * len(several))]


def _gap(word: str) -> str:
    """The white space behind a word."""
    return word[len(word.rstrip()) :]
