"""`distilpeft predict`: texts from the command line, lines or a data file in, one answer per text out, as JSON lines.

A data file (csv, tsv, json, jsonl, parquet, txt) is read as `data.source` is: its text stands in the column that the
recipe named, or under `text`, `prompt` or `image`; of pairs also under `pair`. Every column of the input is kept; an
answer whose key is taken gets `predicted_` before it. What goes to a file appears there complete or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from distilpeft.data import files, tables
from distilpeft.errors import InputError
from distilpeft.export.bundle import Bundle, Text
from distilpeft.recipe.task import KINDS

TEXT, PAIR = "text", "pair"
FIRST, SECOND = ("text", "prompt", "image", "question", "source"), ("pair", "context")
"""Keys of the recipe's `task`, and of input rows, for what a model reads first and second."""
MOST_TOKENS = 64
Row = dict[str, object]
Placed = tuple[str, Row]
"""A row, and where it stands, for messages."""


@dataclass(frozen=True)
class Columns:
    """The columns that hold what a model reads, in the order in which they are looked for."""

    first: Sequence[str]
    second: Sequence[str]

    def texts(self, place: str, row: Mapping[str, object], *, pairs: bool) -> tuple[str, str | None]:
        """The text of a row, and of pairs the second one.

        Raises:
            InputError: a text is not there, empty, or no text.
        """
        first = _text(place, row, self.first, "--text")
        return first, _text(place, row, self.second, "--pair") if pairs else None


def run(  # noqa: PLR0913 - the command line's options
    folder: Path,
    texts: Sequence[str],
    source: Path | TextIO | None,
    out: Path | None,
    *,
    batch_size: int,
    max_new_tokens: int | None,
    text_column: str | None = None,
    pair_column: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Answer every text.

    Args:
        folder: an exported folder.
        texts: given on the command line.
        source: a file to read instead, or lines.
        out: a file for the answers.
        batch_size: texts that go through a classifier at once.
        max_new_tokens: of a language model's continuation; None: an encoder-decoder's own, else `MOST_TOKENS`.
        text_column: of the input, where it is not that of the recipe.
        pair_column: of the input, for the second text.
        say: called at the end with the number of texts that were cut, if any were.

    Yields:
        An answer as a line of JSON, unless it went to the file.

    Raises:
        InputError: the folder is not an export, or a row cannot be answered; it is named.
    """
    bundle = Bundle(folder)
    pairs = bool(bundle.manifest.get("pair"))
    if source is None:
        rows = _of_arguments(folder, texts, pairs=pairs)
    elif isinstance(source, Path) and files.format_of(source) not in (None, "text"):
        rows = of_table(source)
    elif isinstance(source, Path):
        rows = of_text_file(source, pairs=pairs)
    else:
        rows = of_lines(source, getattr(source, "name", "input"), pairs=pairs)
    columns = columns_of(bundle.manifest.get("provenance", {}), text_column, pair_column)
    answers = _lines(bundle, _some(rows, source), columns, batch_size, max_new_tokens)
    if out is None:
        yield from answers
    else:
        _write(out, answers)
    if say is not None and bundle.num_cut:
        most = bundle.manifest["max_tokens"]
        say(f"{bundle.num_cut} texts were longer than {most} tokens and were cut there, as in training.")


def columns_of(provenance: Mapping[str, Any], text: str | None = None, pair: str | None = None) -> Columns:
    """The columns to look for: those that are named, else the recipe's, else the usual ones."""
    task = provenance.get("recipe", {}).get("task", {})
    own = [[task[key] for key in keys if isinstance(task.get(key), str)] for keys in (FIRST, SECOND)]
    first = [text] if text is not None else [*own[0][:1], *FIRST]
    second = [pair] if pair is not None else [*own[1][:1], *SECOND]
    return Columns(list(dict.fromkeys(first)), list(dict.fromkeys(second)))


def _of_arguments(folder: Path, texts: Sequence[str], *, pairs: bool) -> Iterator[Placed]:
    """Texts of the command line; of pairs the two of one row."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise InputError(f"text {number}: is empty")
    if pairs and len(texts) != 2:
        raise InputError(f"{folder}: reads pairs of texts; give two, or a file with both")
    rows: list[Row] = [dict(zip((TEXT, PAIR), texts, strict=True))] if pairs else [{TEXT: text} for text in texts]
    return ((f"text {number}", row) for number, row in enumerate(rows, 1))


def of_table(path: Path) -> Iterator[Placed]:
    """Rows of a data file, with all their columns.

    Raises:
        InputError: the file or a row of it is broken.
    """
    for number, record in tables.rows_of(path):
        place = f"{path}: row {number}"
        if record.fault is not None:
            raise InputError(f"{place}: {record.fault}")
        yield place, dict(record.cells)


def of_text_file(path: Path, *, pairs: bool) -> Iterator[Placed]:
    """Rows of a file of lines; see `of_lines`."""
    with files.open_text(path, files.encoding_of(path)[0]) as file:
        yield from of_lines(file, str(path), pairs=pairs)


def of_lines(source: Iterable[str], name: str, *, pairs: bool = False) -> Iterator[Placed]:
    """Rows of lines; empty ones are left out.

    A line that is a JSON object is a row, any other one a text. Where the first is an object, all have to be: then one
    that is none is a broken row, not a text. A stream that is a JSON array holds its objects.

    Raises:
        InputError: a row is broken.
    """
    lines = ((number, line) for number, line in enumerate(source, 1) if line.strip())
    number, first = next(lines, (0, ""))
    first = first.removeprefix("\ufeff")
    head = [(number, first)] if first else []
    if first.startswith("["):
        head += lines
        array = _array("".join(line for _, line in head))
        if array is not None:
            yield from ((place, _object(place, row)) for place, row in _numbered(array, name))
            return
    objects_only = pairs or _as_object(first) is not None
    for at, line in chain(head, lines):
        row = _as_object(line)
        if row is None and objects_only:
            wants = "a JSON object with both texts" if pairs else "a JSON object, as the first line is"
            raise InputError(f"{name}:{at}: not {wants}; quote a text that begins with a brace as JSON")
        yield f"{name}:{at}", {TEXT: line.rstrip("\r\n")} if row is None else row


def _numbered(rows: Iterable[object], name: str) -> Iterator[tuple[str, object]]:
    return ((f"{name}: row {number}", row) for number, row in enumerate(rows, 1))


def _array(text: str) -> list[object] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def _as_object(line: str) -> Row | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _object(place: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{place}: not a JSON object but a {type(value).__name__}")
    return value


def _some(rows: Iterator[Placed], source: Path | TextIO | None) -> Iterator[Placed]:
    """The rows.

    Raises:
        InputError: there are none.
    """
    first = next(rows, None)
    if first is None:
        name = source if isinstance(source, Path) else getattr(source, "name", "input")
        raise InputError(f"{name}: holds no texts")
    return chain([first], rows)


def _text(place: str, row: Mapping[str, object], columns: Sequence[str], flag: str) -> str:
    """The text under the first of these columns that the row has."""
    column = next((name for name in columns if name in row), None)
    if column is None:
        names = " or ".join(map(repr, columns[:2]))
        raise InputError(f"{place}: no text under {names}; its columns are {', '.join(row)}; name one with {flag}")
    cell = row[column]
    if not isinstance(cell, str):
        kind = "a number" if isinstance(cell, int | float) and not isinstance(cell, bool) else type(cell).__name__
        raise InputError(f"{place}: {column!r} holds {kind} ({str(cell)[:40]}), not a text")
    if not cell.strip():
        raise InputError(f"{place}: {column!r} is empty")
    return cell


def _lines(
    bundle: Bundle, rows: Iterator[Placed], columns: Columns, batch_size: int, max_new_tokens: int | None
) -> Iterator[str]:
    """Each row with its answer, as a line of JSON."""
    for row, answer in answered(bundle, rows, columns, batch_size, max_new_tokens):
        yield json.dumps(row | beside(row, answer), ensure_ascii=False, default=str)


def beside(row: Mapping[str, object], answer: Mapping[str, object]) -> Row:
    """An answer under keys that the row does not have."""
    fields: Row = {}
    for key, value in answer.items():
        name = key
        while name in row:
            name = f"predicted_{name}"
        fields[name] = value
    return fields


def answered(
    bundle: Bundle, rows: Iterator[Placed], columns: Columns, batch_size: int, max_new_tokens: int | None
) -> Iterator[tuple[Row, Row]]:
    """Each row with its answer: see `Bundle.answers`; of a language model `completion` or `output`."""
    kind = KINDS[bundle.manifest["task"]]
    if kind.is_language_model:
        key = "output" if kind.reads_first else "completion"
        most = max_new_tokens or bundle.manifest.get("max_new_tokens") or MOST_TOKENS
        for place, row in rows:
            yield row, {key: bundle.complete(columns.texts(place, row, pairs=False)[0], most)}
        return
    pairs = bool(bundle.manifest.get("pair"))
    while batch := list(islice(rows, batch_size)):
        texts: list[Text] = []
        for place, row in batch:
            first, second = columns.texts(place, row, pairs=pairs)
            texts.append(first if second is None else (first, second))
        yield from zip((row for _, row in batch), bundle.answers(texts), strict=True)


def _write(out: Path, lines: Iterator[str]) -> None:
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
        Path(name).chmod(0o644)
        Path(name).replace(out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
