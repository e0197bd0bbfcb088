"""Pieces of the page. Whatever comes from outside is escaped here: names, labels and texts are untrusted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Cell", "Column", "details", "escape", "listed", "notes", "plain", "section", "table"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is read.
        value: what it is sorted by, where that is a figure; None sorts last.
        small: a second, quieter line.
        lead: HTML of our own before the text.
        badges: short words after it.
    """

    text: str
    value: float | None = None
    small: str = ""
    lead: str = ""
    badges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column's title, what it means, and whether it is sorted as figures."""

    title: str
    hint: str = ""
    numeric: bool = True


def table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]], caption: str, *, kind: str = "") -> str:
    """A table that scrolls on its own where it is too wide; the script makes its heads sort it."""
    heads = "".join(_head(column) for column in columns)
    body = "".join(f"<tr>{_row(columns, row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _head(column: Column) -> str:
    sort = "number" if column.numeric else "text"
    hint = f' title="{escape(column.hint)}"' if column.hint else ""
    return f'<th scope="col" aria-sort="none" data-sort="{sort}"{hint}>{escape(column.title)}</th>'


def _row(columns: Sequence[Column], row: Sequence[Cell]) -> str:
    parts = []
    for at, (column, cell) in enumerate(zip(columns, row, strict=True)):
        value = f' data-value="{cell.value!r}"' if cell.value is not None else ""
        small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
        shown = "".join(f' <span class="badge">{escape(badge)}</span>' for badge in cell.badges)
        badges = f'<span class="badges">{shown}</span>' if shown else ""
        inner = f"{cell.lead}{escape(cell.text)}{badges}{small}"
        kind = ' class="number"' if column.numeric else ""
        parts.append(f'<th scope="row">{inner}</th>' if at == 0 else f"<td{kind}{value}>{inner}</td>")
    return "".join(parts)


def plain(titles: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table of ready texts; its columns are figures but for the first, as far as they can be read as such."""
    kept = [tuple(row) for row in rows]
    figures = [all(_figure(row[at]) is not None or row[at] in "–-" for row in kept) for at in range(len(titles))]
    columns = [Column(title, numeric=figure) for title, figure in zip(titles, figures, strict=True)]
    return table(columns, ([Cell(text, _figure(text)) for text in row] for row in kept), caption)


def _figure(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def section(name: str, title: str, *parts: str, lead: str = "") -> str:
    """A section with its heading; nothing if it has no content."""
    inner = "".join(parts)
    if not inner:
        return ""
    said = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>{said}{inner}</section>'


def details(summary: str, inner: str, *, opened: bool = False) -> str:
    """Content that opens on demand."""
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{inner}</details>"


def notes(lines: Iterable[str], kind: str = "notes") -> str:
    """Lines of text as a list."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def listed(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs)
    return f"<dl>{items}</dl>" if items else ""
