"""Files of rows, each cell as the file's text has it.

Nothing is guessed from cells: those of CSV are text; those of JSON are what JSON says, column by column text or values
of any kind. So a hole, a note or a decimal late in a file changes no other row, and a label `TRUE` or `01` stays one.
Only the columns that are used are kept. A broken row stays a row, with its fault in the column `FAULT`.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.arrow_writer import ArrowWriter

from distilpeft.data import files
from distilpeft.errors import InputError, machine_fault
from distilpeft.machine.files import SUMS, digest_file, digest_json, is_whole, read_json, seal_folder, write_json
from distilpeft.machine.host import cache_folder
from distilpeft.machine.locks import Lock

VERSION = [datasets.__version__, 2]
"""Another one may read a file differently."""
FAULT, ABOUT = "__fault__", "about.json"
"""Column with what is wrong with a row as such; only there if a row has a fault."""
BATCH_ROWS = 5_000
SAMPLE = 100
"""Records that are read to find the separator."""
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_INDEX = re.compile(r"__index_level_\d+__")
_END = "\x00end of file"


class Record(NamedTuple):
    """A row of a file."""

    cells: Mapping[str, object]
    fault: str | None = None


@dataclass(frozen=True)
class Source:
    """A file that has been looked at, not yet read.

    Attributes:
        columns: their names, in order.
        types: the types of each column's cells; none where all are missing.
        records: begins to read the rows, from the first on.
        notes: what was found out about the file and should be said.
    """

    columns: Sequence[str]
    types: Mapping[str, frozenset[type]]
    records: Callable[[], Iterator[Record]]
    notes: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of one or several files, memory-mapped.

    Attributes:
        rows: of all files, in their order.
        counts: how many each file has.
        notes: what should be said of how they were read.
    """

    rows: datasets.Dataset
    counts: Sequence[int]
    notes: Sequence[str]


@dataclass(frozen=True)
class Wishes:
    """How to read.

    Attributes:
        columns: those that are used; None: all.
        encoding: of the file's text, as the recipe says it.
        separator: of a CSV's fields, as the recipe says it.
        optional: columns that are read as well where they are there.
    """

    columns: Sequence[str] | None = None
    encoding: str | None = None
    separator: str | None = None
    optional: Sequence[str] = ()

    def of(self, available: Sequence[str]) -> list[str]:
        """The columns to read of those that are there; all of them if one that is used is not."""
        if self.columns is None or not set(self.columns) <= set(available):
            return list(available)
        return [*self.columns, *(name for name in self.optional if name in available and name not in self.columns)]


def read(paths: Sequence[Path], wishes: Wishes) -> Table:
    """Read files of one format into one table, from a cache that is found by their content and checked byte for byte.

    Args:
        paths: the files, in order.
        wishes: see there; if a file lacks one of the columns, all columns are read, so that a message can name them.

    Raises:
        InputError: a file cannot be read; with the line where there is one.
    """
    key = [[str(path.resolve()), digest_file(path)] for path in paths]
    folder = cache_folder() / "rows" / digest_json([key, VERSION, vars(wishes)])[:32]
    with Lock(folder.parent, folder.name).held():
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        load = _parquet if files.format_of(paths[0]) == "parquet" else _text
        rows = load(paths, wishes, folder)
        if not (folder / SUMS).is_file():
            seal_folder(folder)
        about = read_json(folder / ABOUT, f"delete {folder}")
    return Table(rows, about["counts"], about["notes"])


def _parquet(paths: Sequence[Path], wishes: Wishes, folder: Path) -> datasets.Dataset:
    """Columns of their own types; an index that pandas wrote along is none of them."""
    import pyarrow.parquet as pq

    datasets.logging.set_verbosity(logging.CRITICAL)  # it would log its own lines before ours
    path = paths[0]
    try:
        names = [name for name in pq.read_schema(path).names if not _INDEX.fullmatch(name)]
        for path in paths[1:]:
            columns = set(pq.read_schema(path).names)
            names = [name for name in names if name in columns]
        rows = datasets.load_dataset(
            "parquet",
            data_files=[str(path) for path in paths],
            split="train",
            cache_dir=str(folder),
            columns=wishes.of(names),
        )
    except Exception as error:
        if machine_fault(error) is not None:
            raise
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        name = path if len(paths) == 1 else ", ".join(path.name for path in paths)
        raise InputError(f"{name}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not (folder / ABOUT).is_file():
        write_json(folder / ABOUT, {"counts": [pq.read_metadata(path).num_rows for path in paths], "notes": []})
    return rows


def _text(paths: Sequence[Path], wishes: Wishes, folder: Path) -> datasets.Dataset:
    target = folder / "rows.arrow"
    if not target.is_file():
        opened = [look(path, wishes) for path in paths]
        counts = _write(target, opened, wishes)
        write_json(folder / ABOUT, {"counts": counts, "notes": [note for source in opened for note in source.notes]})
    rows = datasets.Dataset.from_file(str(target))
    return rows if rows.data.column(FAULT).null_count < len(rows) else rows.remove_columns(FAULT)


def _write(target: Path, opened: Sequence[Source], wishes: Wishes) -> list[int]:
    """Write the rows of files one after another; returns how many each has."""
    every = list(dict.fromkeys(name for source in opened for name in source.columns))
    used = wishes.of(every)
    features = {name: _feature(name, opened) for name in used}
    counts = [0] * len(opened)
    with ArrowWriter(
        path=str(target), features=datasets.Features({**features, FAULT: datasets.Value("string")})
    ) as writer:
        for place, source in enumerate(opened):
            records = source.records()
            while batch := list(itertools.islice(records, BATCH_ROWS)):
                cells = {name: [_stored(record.cells.get(name), features[name]) for record in batch] for name in used}
                writer.write_batch({**cells, FAULT: [record.fault for record in batch]})
                counts[place] += len(batch)
        writer.finalize()
    return counts


def _feature(name: str, opened: Sequence[Source]) -> Any:
    """The type of a column: text, booleans or numbers; JSON where cells differ or are lists and objects."""
    types = frozenset().union(*(source.types.get(name, frozenset()) for source in opened))
    if types <= {str}:
        return datasets.Value("string")
    if types <= {int, float}:
        return datasets.Value("int64" if types == {int} else "float64")
    return datasets.Value("bool") if types == {bool} else datasets.Json()


def _stored(cell: object, feature: object) -> object:
    """A cell as stored; `datasets` would take a text that is JSON for what it says."""
    return json.dumps(cell, ensure_ascii=False) if isinstance(feature, datasets.Json) and cell is not None else cell


def look(path: Path, wishes: Wishes) -> Source:
    """Look at a file of text: its encoding, separator and columns.

    Raises:
        InputError: it is empty, no text, or holds no table.
    """
    encoding, note = files.encoding_of(path, wishes.encoding)
    kind = files.format_of(path)
    make = {"csv": _csv, "json": _json, "text": _lines}[kind or "text"]
    source = make(path, encoding, wishes)
    return source if note is None else replace(source, notes=[note, *source.notes])


def _lines(path: Path, encoding: str, wishes: Wishes) -> Source:
    """Lines of plain text, a row each, in the column `text`; empty ones are left out."""

    def records() -> Iterator[Record]:
        with files.open_text(path, encoding) as file:
            yield from (Record({"text": line.rstrip("\r\n")}) for line in file if line.strip())

    return Source(["text"], {}, records, [])


# CSV


def _csv(path: Path, encoding: str, wishes: Wishes) -> Source:
    separator, header_line, note = _separator(path, encoding, wishes)

    def raw() -> Iterator[tuple[int, list[str]]]:
        return _csv_records(path, encoding, separator, header_line)

    first = next(raw(), None)
    if first is None:
        raise InputError(f"{path}: the file has no header")
    names = _names(first[1])
    for name in wishes.columns or ():
        if [cell.strip() for cell in first[1]].count(name) > 1:
            raise InputError(f"{path}:{first[0]}: the header has the column {name!r} twice")

    def records() -> Iterator[Record]:
        rows = raw()
        next(rows)
        for line, cells in rows:
            beyond = [cell for cell in cells[len(names) :] if cell]
            if beyond:
                yield Record({}, f"line {line} has {len(cells)} fields and the header {len(names)}; quote fields that "
                             "hold the separator")  # fmt: skip
            else:
                yield Record(dict(zip(names, cells, strict=False)))

    return Source(names, {}, records, [] if note is None else [note])


def _names(header: Sequence[str]) -> list[str]:
    """Column names; those without one and those that come again are numbered, as pandas does."""
    names: list[str] = []
    for place, cell in enumerate(header):
        name = cell.strip() or f"Unnamed: {place}"
        names.append(next(free for free in itertools.chain([name], (f"{name}.{i}" for i in itertools.count(1)))
                          if free not in names))  # fmt: skip
    return names


def _csv_records(path: Path, encoding: str, separator: str, skip: int) -> Iterator[tuple[int, list[str]]]:
    """Line and fields of each record; blank lines are left out.

    Raises:
        InputError: a quote is never closed: what follows it is lost to every reader.
    """
    csv.field_size_limit(sys.maxsize)
    with files.open_text(path, encoding) as file:
        lines = itertools.islice(file, skip, None)
        # A reader says nothing of a quote that is open at the end, but then takes this line for a part of it.
        reader = csv.reader(itertools.chain(lines, [_END]), delimiter=separator)
        line = skip + 1
        for cells in reader:
            if cells == [_END]:
                return
            if cells and cells[-1].endswith(_END):
                raise InputError(f"{path}:{line}: a quote that opens in this row is never closed")
            if cells:
                yield line, cells
            line = skip + reader.line_num + 1


def _separator(path: Path, encoding: str, wishes: Wishes) -> tuple[str, int, str | None]:
    """What separates the fields, the lines before the header, and what to say if that was found out.

    The usual one of the file's ending is taken if it gives the columns that are used, or else equally many fields in
    nearly all rows; then the others. Excel may say it in the first line: `sep=;`.
    """
    usual = "\t" if files.is_tabbed(path) else ","
    if wishes.separator is not None:
        return wishes.separator, 0, None
    with files.open_text(path, encoding) as file:
        sample = list(itertools.islice(file, SAMPLE))
    match = re.fullmatch(r"sep=(.)\s*", sample[0].lstrip("\ufeff")) if sample else None
    if match is not None:
        return match[1], 1, None
    order = [usual, *(sep for sep in SEPARATORS if sep != usual)]
    tables = {sep: [cells for cells in csv.reader(sample, delimiter=sep) if cells] for sep in order}
    names = set(wishes.columns or ())
    fits = [sep for sep in order if names and tables[sep] and names <= {name.strip() for name in tables[sep][0]}]
    best = next(iter(fits or [sep for sep in order if _is_even(tables[sep])]), usual)
    return best, 0, None if best == usual else f"{path}: the fields are separated by {SEPARATORS[best]}"


def _is_even(table: Sequence[Sequence[str]]) -> bool:
    """Whether nearly all rows have as many fields as the header, and more than one."""
    wide = len(table[0]) if table else 0
    return wide > 1 and sum(len(cells) == wide for cells in table) >= 0.9 * len(table)


# JSON


def _json(path: Path, encoding: str, wishes: Wishes) -> Source:
    values = _json_document(path, encoding)

    def records() -> Iterator[Record]:
        return _json_lines(path, encoding) if values is None else map(_json_record, values)

    types: dict[str, set[type]] = {}
    for record in records():
        for name, cell in record.cells.items():
            kinds = types.setdefault(name, set())
            if cell is not None:
                kinds.add(object if isinstance(cell, int) and abs(cell) >= 2**63 else type(cell))
    columns = [name for name in types if not _INDEX.fullmatch(name) or name in (wishes.columns or ())]
    return Source(columns, {name: frozenset(types[name]) for name in columns}, records, [])


def _json_document(path: Path, encoding: str) -> list[Any] | None:
    """The rows of a file that is one JSON value; None of a file with an object on each line.

    Raises:
        InputError: the value holds no rows.
    """
    with files.open_text(path, encoding) as file:
        first = next((line for line in file if line.strip()), "").strip().lstrip("\ufeff")
        single = not any(line.strip() for line in file)
    is_lines = first.startswith("{") and _parsed(first)[1] is None
    if not first.startswith("[") and (path.suffix.lower() in (".jsonl", ".ndjson") or (is_lines and not single)):
        return None
    with files.open_text(path, encoding) as file:
        value, fault = _parsed(file.read().lstrip("\ufeff"))
    if fault is not None:
        if first.startswith("[") and not single and _parsed(first)[1] is None:
            return None  # an array on each line: every row says so
        raise InputError(f"{path}:{fault}") from None
    rows = _json_rows(value)
    if rows is None:
        raise InputError(f"{path}: no rows: wants a list of objects, or an object on each line")
    return rows


def _json_rows(value: object) -> list[Any] | None:
    """The rows in a JSON value: a list, an object with one list of objects, or columns as pandas writes them."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value:
        return None
    lists = [one for one in value.values() if isinstance(one, list) and one and all(isinstance(x, dict) for x in one)]
    if len(lists) == 1:
        rows: list[Any] = lists[0]
        return rows
    columns = [list(column.values()) if isinstance(column, dict) else column for column in value.values()]
    lengths = {len(column) if isinstance(column, list) else 0 for column in columns}
    if len(lengths) == 1 and lengths.pop() > 1:
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return [value]


def _json_lines(path: Path, encoding: str) -> Iterator[Record]:
    with files.open_text(path, encoding) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                value, fault = _parsed(line.strip().lstrip("\ufeff"), number)
                yield Record({}, f"not a JSON object: line {fault}") if fault else _json_record(value, number)


def _json_record(value: object, line: int | None = None) -> Record:
    if not isinstance(value, dict):
        where = "" if line is None else f" (line {line})"
        return Record({}, f"not a JSON object but a {type(value).__name__}{where}")
    return Record(value)


def _parsed(text: str, line: int = 1) -> tuple[Any, str | None]:
    """A JSON value; or None and what is wrong with it, beginning with the line. NaN is not a number, so nothing."""
    try:
        value = json.loads(text, parse_constant=lambda _: None)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return None, f"{line + error.lineno - 1}: {error.msg} (column {error.colno})"
    except UnicodeEncodeError:
        return None, f"{line}: it holds half of a surrogate pair, which is not a character"
    except RecursionError:
        return None, f"{line}: it is nested too deeply"
    return value, None


def rows_of(path: Path) -> Iterator[tuple[int, Record]]:
    """All rows of a file with all their columns, one after another, each with its number from 1.

    Raises:
        InputError: the file cannot be read.
    """
    if files.format_of(path) == "parquet":
        rows: Iterable[Record] = (Record(row) for row in read([path], Wishes()).rows)
    else:
        rows = look(path, Wishes()).records()
    yield from enumerate(rows, 1)
