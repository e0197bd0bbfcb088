"""Rows: read a source, choose the splits, and say where each row comes from.

Nothing here holds the data in memory: files are mapped into Arrow on disk once, and every later read is a view. The
order of rows is a pure function of (seed, epoch), so resuming needs no iterator state. Works without torch; a row's
`row_id` is its position in its split, and soft targets are looked up by it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data import files, tables
from distilpeft.data.picture_folders import picture_parts
from distilpeft.data.sources import Source, resolve
from distilpeft.errors import InputError
from distilpeft.recipe.data import Data, RowSource, Unlabelled

SPLITS = ("train", "validation", "test")
MOST_LISTED = 5


@dataclass(frozen=True)
class Places:
    """Where the rows of a table come from.

    Attributes:
        origin: the source, as users wrote it.
        numbers_N: each row's number in the source, from 1 (a CSV header is not counted).
        files: of a source of several files, each one's name and number of rows.
        may_train: whether training rows are taken from here.
    """

    origin: str
    numbers_N: NDArray[np.int64]
    files: Sequence[tuple[str, int]] = ()
    may_train: bool = True

    def of(self, index: int) -> str:
        """File and number of a row, for messages."""
        number = int(self.numbers_N[index])
        for name, count in self.files if len(self.files) > 1 else ():
            if number <= count:
                return f"{name}: row {number}"
            number -= count
        return f"{self.origin}: row {number}"

    def listed(self, indices: Sequence[int]) -> str:
        """The first of these rows, by number; of several files with their names."""
        first = indices[:MOST_LISTED]
        names = [self.of(index) if len(self.files) > 1 else str(self.numbers_N[index]) for index in first]
        return ", ".join(names) + (", ..." if len(indices) > MOST_LISTED else "")


@dataclass(frozen=True)
class Part:
    """A split as the source has it.

    Attributes:
        rows: all of them.
        files: names of the files that they come from, with the number of rows of each; none of a hub's or a saved data
            set.
        notes: what should be said of how they were read.
    """

    rows: datasets.Dataset
    files: Sequence[tuple[str, int]] = ()
    notes: Sequence[str] = ()


RowCheck = Callable[[datasets.Dataset, Places], datasets.Dataset]
"""Called with rows and where they come from; gives those to use, in columns of the same types for every part."""


def data_sources(data: RowSource) -> dict[str, Source]:
    """The named sources of a section: one called `""`, or one per split.

    Raises:
        InputError: a source does not exist.
    """
    if isinstance(data.source, str):
        source = resolve(data.source, f"{data.at}.source", data.revision)
        if data.config is not None and source.path is not None:
            raise InputError(f"{data.at}.config: a configuration is for hub data sets; {data.source} is a local path")
        return {"": source}
    if not data.source:
        raise InputError("data.source: the mapping of splits to files is empty")
    if data.revision is not None:
        raise InputError("data.revision: a revision is for hub ids; data.source names files")
    return {split: resolve(name, f"data.source.{split}") for split, name in data.source.items()}


def read_splits(
    data: Data, check: RowCheck, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read the source, check its rows and cut it into train, validation and test rows (not yet tokenised).

    Args:
        data: the recipe's section.
        check: see `RowCheck`.
        columns: those that are used; None: all.
        optional: columns that are read as well where they are there.

    Returns:
        Rows by split; what should be said of how they were read.

    Raises:
        InputError: unreadable data, a missing column or split, an empty split, a row in two splits.
    """
    datasets.disable_progress_bars()
    source = load_parts(data, None if columns is None else [*columns, *data.where], optional)
    parts = {}
    for name, part in source.items():
        if _is_used(data, name):
            rows, numbers = _filter(data, part.rows)
            may_train = _is_used(data, name, ("train",))
            parts[name] = check(rows, Places(origin(data, name), numbers, part.files, may_train))
        else:
            parts[name] = part.rows
    splits = _seeded(data, parts) if data.split is not None else _sliced(data, parts)
    for name, rows in splits.items():
        if len(rows) == 0:
            raise InputError(f"data.{name if data.split is None else 'split.' + name}: this split has no rows")
    return splits, [note for name, part in source.items() if _is_used(data, name) for note in part.notes]


def read_unlabelled(
    data: Unlabelled, check: RowCheck, columns: Mapping[str, str], optional: Sequence[str] = ()
) -> tuple[datasets.Dataset, list[str]]:
    """Read rows without labels, and check those that are used.

    Args:
        data: the recipe's section.
        check: see `RowCheck`.
        columns: the source's column → what it is called afterwards.
        optional: columns that are read as well where they are there.

    Returns:
        Rows; what should be said of how they were read.

    Raises:
        InputError: unreadable data, a missing column or slice.
    """
    datasets.disable_progress_bars()
    source = load_parts(data, [*columns, *data.where], optional)
    spans = _spans(data, {name: len(part.rows) for name, part in source.items()}, f"{data.at}.rows", data.rows)
    pieces = []
    for span in spans:
        rows, numbers = _filter(data, source[span.splitname].rows.select(range(span.from_, span.to)))
        pieces.append((_renamed(data, rows, columns), numbers + span.from_, source[span.splitname].files))
    total = sum(len(rows) for rows, _, _ in pieces)
    picks = np.arange(total)
    if data.max_rows is not None and total > data.max_rows:
        picks = np.sort(np.random.default_rng(0).choice(total, data.max_rows, replace=False))
    parts, start = [], 0
    for rows, numbers, files_of in pieces:
        own = picks[(picks >= start) & (picks < start + len(rows))] - start
        start += len(rows)
        if len(own):
            parts.append(check(rows.select(own), Places(data.source, numbers[own], files_of)))
    if not parts:
        raise InputError(f"{data.at}: {data.source} has no rows")
    notes = [note for name in dict.fromkeys(span.splitname for span in spans) for note in source[name].notes]
    return _joined(parts, f"{data.at}.rows"), notes


def _renamed(data: Unlabelled, rows: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
    """Rows whose columns are called as those of the main source."""
    for column in columns:
        if column not in rows.column_names:
            has = ", ".join(name for name in rows.column_names if name != tables.FAULT)
            raise InputError(f"{data.at}: {data.source} has no column {column!r}; its columns are {has}")
    in_the_way = [name for name in columns.values() if name in rows.column_names and name not in columns]
    return rows.remove_columns(in_the_way).rename_columns(dict(columns))


def skipped_lines(skipped: Mapping[str, int]) -> list[str]:
    """What to say of rows that were left out."""
    return [f"{count} rows of {name} could not be used and were left out." for name, count in skipped.items()]


def duplicates(splits: Mapping[str, Iterable[Hashable]]) -> dict[str, int]:
    """How many texts of each later split also stand in an earlier one, as `a/b` → count."""
    # Eight bytes a text: sets of Python integers took twice the peak at a million texts.
    hashes = {name: np.fromiter(map(hash, texts), dtype=np.int64) for name, texts in splits.items()}
    pairs = [(a, b) for i, a in enumerate(SPLITS) for b in SPLITS[i + 1 :]]
    return {f"{a}/{b}": int(np.isin(hashes[b], hashes[a], kind="sort").sum()) for a, b in pairs}


def origin(data: RowSource, split: str | None = None) -> str:
    """The source as users wrote it, for messages about its rows."""
    if isinstance(data.source, str):
        return data.source
    return data.source[split] if split in data.source else ", ".join(data.source.values())


def _is_used(data: Data, split: str, for_: Sequence[str] = SPLITS) -> bool:
    """Whether the recipe reads the source's split at all (a hub data set may have unlabelled ones)."""
    specs = [getattr(data, name) for name in for_]
    return any(spec is None or split in (part.partition("[")[0].strip() for part in spec.split("+")) for spec in specs)


def load_parts(data: RowSource, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> dict[str, Part]:
    """The source's own splits; a single file, or files of a pattern that are not splits, are one called train.

    Args:
        data: the recipe's section.
        columns: those that are used; None: all.
        optional: columns that are read as well where they are there.

    Raises:
        InputError: it cannot be read.
    """
    at = f"{data.at}.source"
    columns = None if columns is None else list(dict.fromkeys(columns))
    wishes = tables.Wishes(columns, data.encoding, data.separator, tuple(optional))
    sources = data_sources(data)
    if "" not in sources:
        return {split: _load_files(_listed(source, at), source, wishes, at) for split, source in sources.items()}
    source = sources[""]
    if source.path is None:
        return _load_hub(data, source)
    if source.path.is_dir() and not source.matches:
        saved = _load_saved(source.path, at)
        if saved is not None:
            return saved
        pictures = None if files.in_folder(source.path) else picture_parts(source.path)
        if pictures is not None:
            return {name: Part(rows) for name, rows in pictures.items()}
    paths = _listed(source, at)
    if source.path.is_file():
        return {"train": _load_files(paths, source, wishes, at)}
    grouped = files.parts(paths, source.path)
    if source.matches and not _has_splits(grouped):
        grouped = {"train": list(paths)}
    return {name: _load_files(own, source, wishes, at) for name, own in grouped.items()}


def _has_splits(names: Iterable[str]) -> bool:
    """Whether these are splits, rather than parts such as months."""
    return any(name.lower() in files.SPLIT_NAMES for name in names)


def _load_hub(data: RowSource, source: Source) -> dict[str, Part]:
    try:
        loaded = datasets.load_dataset(source.name, data.config, revision=source.revision)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{data.at}.source: cannot load {source.name} from the hub: {reason}") from None
    return _of_library(loaded)


def _of_library(loaded: Any) -> dict[str, Part]:
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    return {name: Part(rows) for name, rows in splits.items()}


def _load_saved(folder: Path, at: str) -> dict[str, Part] | None:
    """A data set that `save_to_disk` wrote; None if the folder holds none."""
    try:
        return _of_library(datasets.load_from_disk(str(folder)))
    except FileNotFoundError:
        return None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{at}: {folder}: a damaged saved data set: {reason}") from None


def _listed(source: Source, at: str) -> Sequence[Path]:
    """The data files of a local source.

    Raises:
        InputError: there are none.
    """
    path = source.path
    if path is None:
        raise InputError(f"{at}: {source.name}: a data file ends in one of {files.endings()}")
    if source.matches:
        return source.matches
    if path.is_dir():
        paths = files.in_folder(path)
        if not paths:
            raise InputError(
                f"{at}: {path} holds no saved data set, no pictures in folders by class and no file that ends in "
                f"{files.endings()}"
            )
        return paths
    if files.format_of(path) is None:
        raise InputError(f"{at}: {source.name}: a data file ends in one of {files.endings()}")
    return [path]


def _load_files(paths: Sequence[Path], source: Source, wishes: tables.Wishes, at: str) -> Part:
    """Files as one part.

    Raises:
        InputError: one cannot be read; or they are of different formats.
    """
    kinds = {files.format_of(path): path for path in paths}
    if len(kinds) > 1:
        pair = " and ".join(str(path) for path in list(kinds.values())[:2])
        raise InputError(f"{at}: {pair} are of one part but of different formats; convert one of them")
    table = tables.read(paths, wishes)
    names = [source.name] if len(paths) == 1 and source.path == paths[0] else [str(path) for path in paths]
    return Part(table.rows, list(zip(names, table.counts, strict=True)), table.notes)


def _filter(data: RowSource, rows: datasets.Dataset) -> tuple[datasets.Dataset, NDArray[np.int64]]:
    if not data.where:
        return rows, np.arange(1, len(rows) + 1)
    keep = np.ones(len(rows), dtype=bool)
    for column, value in data.where.items():
        if column not in rows.column_names:
            raise InputError(
                f"{data.at}.where.{column}: no such column; {origin(data)} has {', '.join(rows.column_names)}"
            )
        keep &= np.asarray([_equals(cell, value) for cell in rows[column]], dtype=bool)
    if not keep.any():
        raise InputError(f"{data.at}.where: no row of {origin(data)} has {data.where}")
    indices = np.flatnonzero(keep)
    return rows.select(indices), indices + 1


def _equals(cell: Any, value: bool | str | float) -> bool:
    """Whether a cell is the value of `data.where`; text is compared as what the value is."""
    if cell == value and isinstance(cell, bool) == isinstance(value, bool):
        return True
    if isinstance(value, bool) or isinstance(cell, bool) or cell is None:
        return str(cell).strip().lower() == str(value).strip().lower()
    if isinstance(value, str):
        return str(cell) == value
    try:
        return float(cell) == value
    except (TypeError, ValueError):
        return False


def _seeded(data: Data, parts: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    split = data.split
    assert split is not None
    if len(parts) > 1 and _has_splits(parts):
        names = ", ".join(parts)
        raise InputError(
            f"data.split: {origin(data)} already has splits ({names}); name them in data.train, data.validation and "
            "data.test instead"
        )
    rows = _joined(list(parts.values()), ", ".join(parts))
    order = np.random.default_rng(split.seed).permutation(len(rows))
    ends = np.round(np.cumsum([split.train, split.validation, split.test]) * len(rows)).astype(int)
    cuts = [0, *ends]
    return {name: rows.select(order[cuts[i] : cuts[i + 1]]) for i, name in enumerate(SPLITS)}


def _sliced(data: Data, parts: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    sizes = {name: len(rows) for name, rows in parts.items()}
    spans: dict[str, list[Span]] = {}
    for name in SPLITS:
        spans[name] = _spans(data, sizes, f"data.{name}", getattr(data, name))
    for i, a in enumerate(SPLITS):
        for b in SPLITS[i + 1 :]:
            for span in spans[a]:
                for later in spans[b]:
                    overlap = min(span.to, later.to) - max(span.from_, later.from_)
                    if span.splitname == later.splitname and overlap > 0:
                        raise InputError(
                            f"data.{b}: {overlap} rows of {span.splitname} are also in data.{a}; splits may not overlap"
                        )
    return {
        name: _joined([parts[s.splitname].select(range(s.from_, s.to)) for s in spans[name]], getattr(data, name))
        for name in SPLITS
    }


class Span(NamedTuple):
    """A stretch of a part's rows."""

    splitname: str
    from_: int
    to: int


def _spans(data: RowSource, sizes: Mapping[str, int], key: str, spec: str | None) -> list[Span]:
    """The stretches of a slice; None: all rows of all parts.

    Raises:
        InputError: there is no such slice.
    """
    if spec is None:
        return [Span(name, 0, count) for name, count in sizes.items()]
    try:
        slices = datasets.ReadInstruction.from_spec(spec).to_absolute(sizes)
        return [Span(part.splitname, part.from_, part.to) for part in slices]
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        reason = " ".join(str(error).strip("'\"").split())[:200]
        has = ", ".join(f"{split} ({count} rows)" for split, count in sizes.items())
        way = "" if len(sizes) == 1 or _has_splits(sizes) else "; to use all of them together, give data.split"
        way = way if data.at == "data" else ""
        raise InputError(f"{key}: cannot slice {spec!r}: {reason}; {origin(data)} has {has}{way}") from None


def _joined(parts: Sequence[datasets.Dataset], names: str) -> datasets.Dataset:
    """Parts as one table.

    Raises:
        InputError: a column is of another type in one of them.
    """
    for part in parts[1:]:
        for column, feature in part.features.items():
            first = parts[0].features.get(column)
            if first is not None and first != feature:
                raise InputError(f"{names}: column {column!r} is of type {first} in one part and {feature} in another")
    return datasets.concatenate_datasets(list(parts))
