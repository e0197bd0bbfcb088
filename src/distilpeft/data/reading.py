"""Rows: read a source, choose the splits, keep tokenised rows in memory-mapped Arrow, order them for training.

Nothing here holds the data in memory: `datasets` maps files into Arrow on disk once, and every later read is a
view. The order of rows is a pure function of (seed, epoch), so resuming needs no iterator state. Works without
torch; a row's `row_id` is its position in its split, and soft targets are looked up by it.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.sources import DATA_SUFFIXES, Source, resolve
from distilpeft.errors import InputError, machine_fault
from distilpeft.machine.files import SUMS, digest_file, digest_json, is_whole, seal_folder
from distilpeft.machine.host import cache_folder
from distilpeft.machine.locks import Lock
from distilpeft.recipe.data import Data

VERSION = datasets.__version__  # another one may read a file otherwise
SPLITS = ("train", "validation", "test")
RowCheck = Callable[[datasets.Dataset, NDArray[np.int64], str], datasets.Dataset]
"""Called with rows, their 1-based numbers in the source, and the source's name; gives those to use, or InputError."""


def data_sources(data: Data) -> dict[str, Source]:
    """The named sources of a `data` section: one called `""`, or one per split.

    Raises:
        InputError: a source does not exist.
    """
    if isinstance(data.source, str):
        source = resolve(data.source, "data.source", data.revision)
        if data.config is not None and source.path is not None:
            raise InputError(f"data.config: a configuration is for hub data sets; {data.source} is a local path")
        return {"": source}
    if not data.source:
        raise InputError("data.source: the mapping of splits to files is empty")
    if data.revision is not None:
        raise InputError("data.revision: a revision is for hub ids; data.source names files")
    return {split: resolve(name, f"data.source.{split}") for split, name in data.source.items()}


def read_splits(data: Data, check: RowCheck) -> dict[str, datasets.Dataset]:
    """Read the source, check its rows and cut it into train, validation and test rows (not yet tokenised).

    Raises:
        InputError: unreadable data, a missing column or split, an empty split, a row in two splits.
    """
    datasets.disable_progress_bars()
    parts = {}
    for name, rows in load_parts(data).items():
        if _is_used(data, name):
            chosen, numbers = _filter(data, rows)
            parts[name] = check(chosen, numbers, origin(data, name))
        else:
            parts[name] = rows
    splits = _seeded(data, parts) if data.split is not None else _sliced(data, parts)
    for name, rows in splits.items():
        if len(rows) == 0:
            raise InputError(f"data.{name if data.split is None else 'split.' + name}: this split has no rows")
    return splits


def told_skipped(skipped: Mapping[str, int]) -> list[str]:
    """What to say of rows that were left out."""
    return [f"{count} rows of {name} could not be used and were left out." for name, count in skipped.items()]


def duplicates(splits: Mapping[str, Iterable[Hashable]]) -> dict[str, int]:
    """How many texts of each later split also stand in an earlier one, as `a/b` → count."""
    # Eight bytes a text: sets of Python integers took twice the peak at a million texts.
    seen = {name: np.fromiter(map(hash, texts), dtype=np.int64) for name, texts in splits.items()}
    pairs = [(a, b) for i, a in enumerate(SPLITS) for b in SPLITS[i + 1 :]]
    return {f"{a}/{b}": int(np.isin(seen[b], seen[a], kind="sort").sum()) for a, b in pairs}


def origin(data: Data, split: str | None = None) -> str:
    """The source as users wrote it, for messages about its rows."""
    if isinstance(data.source, str):
        return data.source
    return data.source[split] if split in data.source else ", ".join(data.source.values())


def _is_used(data: Data, split: str) -> bool:
    """Whether the recipe reads the source's split at all (a hub data set may have unlabelled ones)."""
    specs = [getattr(data, name) for name in SPLITS]
    return any(spec is None or split in (part.partition("[")[0].strip() for part in spec.split("+")) for spec in specs)


def load_parts(data: Data) -> dict[str, datasets.Dataset]:
    """The source's own splits, whole; a single file is one called train.

    Raises:
        InputError: it cannot be read.
    """
    sources = data_sources(data)
    if "" not in sources:
        return {split: _load_file(source) for split, source in sources.items()}
    source = sources[""]
    if source.path is not None and source.path.is_file():
        loaded: Any = {"train": _load_file(source)}
    elif source.path is not None:
        loaded = _load_folder(source.path)
    else:
        try:
            loaded = datasets.load_dataset(source.name, data.config, revision=source.revision)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"data.source: cannot load {source.name} from the hub: {reason}") from None
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


def _load_folder(path: Path) -> Any:
    try:
        return datasets.load_from_disk(str(path))
    except FileNotFoundError:
        pass
    except Exception as error:
        raise InputError(
            f"data.source: {path}: a damaged saved data set: {' '.join(str(error).split())[:200]}"
        ) from None
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in DATA_SUFFIXES}
    if not files:
        raise InputError(f"data.source: {path} holds no saved data set and no {', '.join(DATA_SUFFIXES)} files")
    return {split: _load_file(Source(str(file), file)) for split, file in files.items()}


def _load_file(source: Source) -> datasets.Dataset:
    path = source.path
    if path is None or path.suffix not in DATA_SUFFIXES:
        raise InputError(f"data.source: {source.name}: a data file ends in one of {', '.join(DATA_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if path.suffix != ".parquet":
        _check_utf8(path)
    options: dict[str, Any] = {"sep": "\t"} if path.suffix == ".tsv" else {}
    if DATA_SUFFIXES[path.suffix] == "csv":
        options["keep_default_na"] = False  # the words NA, null and None are text, not holes
    datasets.logging.set_verbosity(logging.CRITICAL)  # it would log its own lines before ours
    try:
        rows = _mapped(path, DATA_SUFFIXES[path.suffix], options)
    except Exception as error:
        if machine_fault(error) is not None:
            raise
        raise InputError(_located_data_error(path, error)) from None
    if "__index_level_0__" in rows.column_names:
        raise InputError(f"{path}:2: the rows have more fields than the header; quote fields that hold the separator")
    return rows


def _mapped(path: Path, reader: str, options: Mapping[str, Any]) -> datasets.Dataset:
    """A file's rows, memory-mapped from a cache that is found by its content and is whole, byte for byte.

    The library's own cache is found by the file's path and time: a file that was exchanged for another of the same
    time gave the rows of the first.
    """
    folder = cache_folder() / "rows" / digest_json([str(path.resolve()), digest_file(path), VERSION])[:32]
    with Lock(folder.parent, folder.name).held():
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        rows = datasets.load_dataset(reader, data_files=str(path), split="train", cache_dir=str(folder), **options)
        if not (folder / SUMS).is_file():
            seal_folder(folder)
    return rows


def _check_utf8(path: Path) -> None:
    """Readers decode late and lose the line; text is checked first, in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                line += piece[: max(0, error.start - (len(error.object) - len(piece)))].count(b"\n")
                raise InputError(f"{path}:{line}: not UTF-8 text") from None
            line += piece.count(b"\n")


def _located_data_error(path: Path, error: BaseException) -> str:
    """Name the line that the reader stumbled over."""
    while error.__cause__ is not None:
        error = error.__cause__
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                fault = _json_fault(text)
                if fault:
                    return f"{path}:{number}: not a JSON object: {fault}"
    reason = " ".join(str(error).split())[:200]
    found = re.search(r"(line|starting at row|row) (\d+)", reason)
    if found is None:
        return f"{path}: cannot be read: {reason}"
    line = int(found.group(2)) + (found.group(1) == "starting at row")  # pandas counts these from 0
    return f"{path}:{line}: {reason}"


def _json_fault(text: str) -> str | None:
    """What is wrong with one line of a jsonl file."""
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        return str(error)
    return None if isinstance(value, dict) else f"it is a {type(value).__name__}"


def _filter(data: Data, rows: datasets.Dataset) -> tuple[datasets.Dataset, NDArray[np.int64]]:
    if not data.where:
        return rows, np.arange(1, len(rows) + 1)
    keep = np.ones(len(rows), dtype=bool)
    for column, value in data.where.items():
        if column not in rows.column_names:
            raise InputError(f"data.where.{column}: no such column; {origin(data)} has {', '.join(rows.column_names)}")
        keep &= np.asarray([cell == value for cell in rows[column]], dtype=bool)
    if not keep.any():
        raise InputError(f"data.where: no row of {origin(data)} has {data.where}")
    kept = np.flatnonzero(keep)
    return rows.select(kept), kept + 1


def _seeded(data: Data, parts: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    split = data.split
    assert split is not None
    if len(parts) > 1:
        names = ", ".join(parts)
        raise InputError(f"data.split: {origin(data)} already has splits ({names}); give train, validation and test")
    (rows,) = parts.values()
    order = np.random.default_rng(split.seed).permutation(len(rows))
    ends = np.round(np.cumsum([split.train, split.validation, split.test]) * len(rows)).astype(int)
    cuts = [0, *ends]
    return {name: rows.select(order[cuts[i] : cuts[i + 1]]) for i, name in enumerate(SPLITS)}


def _sliced(data: Data, parts: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    sizes = {name: len(rows) for name, rows in parts.items()}
    spans: dict[str, list[Any]] = {}
    for name in SPLITS:
        spec = getattr(data, name)
        try:
            spans[name] = datasets.ReadInstruction.from_spec(spec).to_absolute(sizes)
        except (ValueError, AssertionError, KeyError, TypeError) as error:
            reason = " ".join(str(error).strip("'\"").split())[:200]
            has = ", ".join(f"{split} ({count} rows)" for split, count in sizes.items())
            raise InputError(f"data.{name}: cannot slice {spec!r}: {reason}; {origin(data)} has {has}") from None
    for i, a in enumerate(SPLITS):
        for b in SPLITS[i + 1 :]:
            for one in spans[a]:
                for two in spans[b]:
                    overlap = min(one.to, two.to) - max(one.from_, two.from_)
                    if one.splitname == two.splitname and overlap > 0:
                        raise InputError(
                            f"data.{b}: {overlap} rows of {one.splitname} are also in data.{a}; splits may not overlap"
                        )
    return {
        name: datasets.concatenate_datasets([parts[s.splitname].select(range(s.from_, s.to)) for s in spans[name]])
        for name in SPLITS
    }
