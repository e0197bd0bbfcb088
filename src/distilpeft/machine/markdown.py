"""Texts and tables inside Markdown files: names, labels and licences come from users and must not turn into markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKS = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")
"""What Markdown gives a meaning inside a line; an underscore within a word has none."""


def plain(text: str) -> str:
    """Any text on one line, to be read as it is."""
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split())).replace("<", "&lt;")


def code(text: str) -> str:
    """Any text on one line, set as code."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of plain texts; the first row holds the titles."""
    titles, *others = ([plain(cell) for cell in row] for row in rows)
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *others)]
