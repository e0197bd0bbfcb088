"""Soft targets on disk: a folder of shards that are memory-mapped, looked up by row id, checked, and resumable.

    R  rows of data    N  positions: rows that a loss counts, several to a row of a language model

`rows.npy`: uint64 [R], a hash of each row's token ids and of what is to be predicted.  `positions.npy`: uint32 [R],
positions of each row.  `shard-00000.bin`, ...: blocks of consecutive rows (`codec` says what is in one), then uint64
[rows + 1], where each begins and the last ends.  `store.json`: the layout, the rows of every shard, the SHA-256 of
every file, what was measured while writing, and `bound`: the teacher and all else that the targets depend on. A store
of another teacher, adapter, tokenizer or order of rows is refused with both sides named.

Shards are finished one by one, by any process, so an interrupted writer goes on after the last finished one. Works
without torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.distillation.codec import Bytes, Kept, Layout
from distilpeft.errors import InputError
from distilpeft.machine.files import (
    JsonObject,
    digest_file,
    digest_json,
    fsync,
    read_json,
    read_sealed,
    sealed,
    write_json,
)

FORMAT = 1
STORE, ROWS, POSITIONS, BEGUN = "store.json", "rows.npy", "positions.npy", "begun.json"
TEACHER_VOCABULARY = "teacher_vocabulary"
"""Key of a store that is over fewer ids than the teacher has, since its student has no more: the teacher's number."""
SHARD_TOKENS, NUM_SHARDS = 16_384, 1_000
"""A shard holds about so many tokens, what an interruption may cost; more where there would be too many shards."""
SHARD_BYTES = 256 << 20
HASHED = ("input_ids", "label", "target", "segments", "token_types", "at", "target_ids", "digest")
NUMBERS = 1 << 16  # of an array that are Python objects at once
OPEN_SHARDS = 256  # memory-mapped at once; each holds a file descriptor
Hashes = NDArray[np.uint64]


def row_hashes(tokens: datasets.Dataset) -> Hashes:
    """A hash of each row's token ids and of what is to be predicted there: what its soft targets are targets of."""
    columns = [name for name in HASHED if name in tokens.column_names]
    hashes_R, at = np.empty(len(tokens), dtype=np.uint64), 0
    for batch in tokens.select_columns(columns).with_format("numpy").iter(batch_size=2_000):
        cells = [[_cell_bytes(cell) for cell in batch[name]] for name in columns]
        hashes = []
        for row in zip(*cells, strict=True):
            lengths = np.array([len(part) for part in row], dtype="<i8").tobytes()
            hashes.append(hashlib.blake2b(lengths + b"".join(row), digest_size=8).digest())
        hashes_R[at : at + len(hashes)] = np.frombuffer(b"".join(hashes), dtype="<u8")
        at += len(hashes)
    return hashes_R


def _cell_bytes(cell: object) -> bytes:
    """Ids as int32, numbers on a scale as float64."""
    array = np.asarray(cell)
    return array.astype("<f8" if array.dtype.kind == "f" else "<i4").tobytes()


def shard_edges(num_tokens_R: NDArray[np.integer[Any]], bytes_R: NDArray[np.floating[Any]]) -> list[int]:
    """Where shards begin and the last ends, a function of the rows and the layout alone."""
    limit = max(SHARD_TOKENS, -(-int(num_tokens_R.sum()) // NUM_SHARDS))
    edges, tokens, size = [0], 0, 0.0
    for row, (count, weight) in enumerate(zip(_plain_numbers(num_tokens_R), _plain_numbers(bytes_R), strict=True)):
        if row > edges[-1] and (tokens + count > limit or size + weight > SHARD_BYTES):
            edges.append(row)
            tokens, size = 0, 0.0
        tokens, size = tokens + count, size + weight
    return [*edges, len(num_tokens_R)]


def _plain_numbers(array_R: NDArray[Any]) -> Iterator[Any]:
    """Python numbers, some thousands in memory at a time."""
    for start in range(0, len(array_R), NUMBERS):
        yield from array_R[start : start + NUMBERS].tolist()


def _digest_numbers(array_R: NDArray[np.integer[Any]]) -> str:
    """`digest_json` of a list of whole numbers, without the list."""
    sha = hashlib.sha256(b"[")
    for start in range(0, len(array_R), NUMBERS):
        text = ", ".join(map(str, array_R[start : start + NUMBERS].tolist()))
        sha.update((", " if start else "").encode() + text.encode())
    sha.update(b"]")
    return sha.hexdigest()


@dataclass(frozen=True)
class Contents:
    """What a store is to hold.

    Attributes:
        layout: how positions are kept.
        bound: name → what the targets belong to.
        hashes_R: see `row_hashes`.
        positions_R: positions of each row.
        edges: see `shard_edges`.
    """

    layout: Layout
    bound: Mapping[str, str]
    hashes_R: Hashes
    positions_R: NDArray[np.integer[Any]]
    edges: Sequence[int]

    @functools.cached_property
    def identity(self) -> JsonObject:
        """Plain values that name it."""
        rows = hashlib.sha256(self.hashes_R.astype("<u8").tobytes()).hexdigest()
        shards = {"edges": list(self.edges), "positions": _digest_numbers(self.positions_R)}
        return {"format": FORMAT, "layout": _plain(self.layout), "bound": dict(self.bound), "rows": rows, **shards}


class Writer:
    """Fills a store shard by shard; on a folder that was interrupted, finished shards stay.

    Several processes may each have one on the same folder: the main one is made first.
    """

    def __init__(self, folder: Path, contents: Contents, *, is_main: bool = True) -> None:
        self._folder, self._contents = folder, contents
        if is_main and not self._is_same():
            for file in [*folder.glob("shard-*"), folder / STORE, folder / BEGUN]:
                file.unlink(missing_ok=True)
            write_json(folder / BEGUN, contents.identity)
        self.num_shards = len(contents.edges) - 1

    def _is_same(self) -> bool:
        """Whether the folder holds these very targets, begun or complete."""
        begun, store = self._folder / BEGUN, self._folder / STORE
        if begun.is_file():
            return _read_or_none(begun, read_json) == self._contents.identity
        put_together = _read_or_none(store, read_sealed) or {}
        return put_together.get("identity") == digest_json(self._contents.identity)

    def rows(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the one behind its last."""
        return self._contents.edges[shard], self._contents.edges[shard + 1]

    def is_done(self, shard: int) -> bool:
        """Whether a shard is on disk in full, byte for byte as it was written."""
        if (self._folder / STORE).is_file():  # put together, but killed before it was published
            return True
        file, record = self._folder / _name(shard), self._folder / _record(shard)
        entry = _read_or_none(record, read_sealed)
        if entry is None or not file.is_file():
            return False
        return bool(file.stat().st_size == entry["bytes"] and digest_file(file) == entry["sha256"])

    def write(self, shard: int, rows: Sequence[Kept], measured: Mapping[str, float]) -> None:
        """Store what is kept of the rows of a shard, in their order; it is on disk when this returns."""
        start, stop = self.rows(shard)
        assert [len(kept) for kept in rows] == self._contents.positions_R[start:stop].tolist()
        blocks = [self._contents.layout.encode(kept) for kept in rows]
        offsets = np.cumsum([0, *map(len, blocks)]).astype("<u8")
        file = self._folder / _name(shard)
        (self._folder / _record(shard)).unlink(missing_ok=True)  # it may describe other bytes
        with file.open("wb") as out:
            out.writelines([*blocks, offsets.tobytes()])
            out.flush()
            os.fsync(out.fileno())
        entry = {"file": file.name, "first_row": start, "num_rows": stop - start, "bytes": file.stat().st_size}
        content = {**entry, "sha256": digest_file(file), "measured": dict(measured)}
        write_json(self._folder / _record(shard), sealed(content))

    def finish(self, notes: Mapping[str, object]) -> JsonObject:
        """Put the store together; `notes` are kept in it unchanged.

        Returns:
            The figures of `measured`.
        """
        folder, contents = self._folder, self._contents
        if not (folder / STORE).is_file():
            records = [folder / _record(shard) for shard in range(self.num_shards)]
            assert all(record.is_file() for record in records), "soft targets are missing shards"
            shards = [read_sealed(record, "delete it") for record in records]
            np.save(folder / ROWS, contents.hashes_R.astype("<u8"), allow_pickle=False)
            np.save(folder / POSITIONS, contents.positions_R.astype("<u4"), allow_pickle=False)
            num_bytes = sum(shard["bytes"] for shard in shards)
            sums = [shard.pop("measured") for shard in shards]
            store = {
                "format": FORMAT,
                "identity": digest_json(contents.identity),
                "layout": _plain(contents.layout),
                "num_rows": len(contents.hashes_R),
                "num_positions": int(contents.positions_R.sum()),
                "bound": dict(contents.bound),
                "measured": summary(sums, num_bytes),
                **notes,
                "rows": {name: digest_file(folder / name) for name in (ROWS, POSITIONS)},
                "shards": shards,
            }
            fsync(folder)
            write_json(folder / STORE, sealed(store))
        for record in [*folder.glob("shard-*.json"), folder / BEGUN]:
            record.unlink(missing_ok=True)
        measured: JsonObject = read_store(folder)["measured"]
        return measured


def _read_or_none(path: Path, read: Callable[[Path, str], JsonObject]) -> JsonObject | None:
    """What a file holds; None if that is damaged or not there, and is to be made again."""
    try:
        return read(path, "")
    except InputError:
        return None


def summary(sums: Sequence[Mapping[str, float]], num_bytes: int) -> JsonObject:
    """Figures of a store from the sums of its shards; see `sparse.describe`. Bytes are those of the shards."""
    positions = max(1.0, sum(part["positions"] for part in sums))
    figures: JsonObject = {"bytes": num_bytes, "bytes_per_token": num_bytes / positions}
    names = {"ids": "ids_per_token", "mass": "captured_mass", "entropy": "entropy_nats", "error": "log_p_error"}
    for key, name in names.items():
        if all(key in part for part in sums):
            figures[name] = sum(part[key] for part in sums) / positions
    if all("max_error" in part for part in sums):
        figures["log_p_max_error"] = max((part["max_error"] for part in sums), default=0.0)
    return figures


def read_store(folder: Path) -> JsonObject:
    """The checked content of `store.json`.

    Raises:
        InputError: there is none, it was altered, or another version wrote it.
    """
    if (folder / BEGUN).exists():
        raise InputError(f"{folder}: these soft targets are not finished; run the recipe that makes them again")
    path = folder / STORE
    store = read_sealed(path, "give a folder of soft targets, or make them again")
    if store.get("format") != FORMAT:
        raise InputError(f"{path}: format {store.get('format')!r}, but this version reads {FORMAT}; make them again")
    return store


class SoftTargets:
    """A complete store, read by row id.

    Attributes:
        store: content of `store.json`.
        layout: how positions are kept.
        positions_R: positions of each row.
    """

    def __init__(self, folder: Path) -> None:
        self.store = read_store(folder)
        self._folder = folder
        layout = self.store["layout"]
        self.layout = Layout(**{**layout, "temperatures": tuple(layout["temperatures"])})
        self.positions_R: NDArray[np.int64] = self._array(POSITIONS).astype(np.int64)
        self._first_rows = np.array([shard["first_row"] for shard in self.store["shards"]])
        # Closed with the store; a shard's pages are the system's to keep or drop.
        self._open: Callable[[int], tuple[Bytes, NDArray[np.int64]]] = functools.lru_cache(OPEN_SHARDS)(self._map)

    def _array(self, name: str) -> NDArray[Any]:
        try:
            array: NDArray[Any] = np.load(self._folder / name, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{self._folder / name}: cannot be read ({type(error).__name__})") from None
        return array

    def _map(self, shard: int) -> tuple[Bytes, NDArray[np.int64]]:
        """A shard's bytes, memory-mapped, and where its blocks begin."""
        entry = self.store["shards"][shard]
        path = self._folder / entry["file"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise InputError(f"{path}: missing, or not of the {entry['bytes']} bytes that were written")
        mapped: Bytes = np.memmap(path, dtype=np.uint8, mode="r")
        size = 8 * (entry["num_rows"] + 1)
        return mapped, np.array(mapped[-size:]).view("<u8").astype(np.int64)

    def row(self, row_id: int) -> Kept:
        """What is kept of one row's positions."""
        if not 0 <= row_id < len(self.positions_R):
            raise IndexError(f"row {row_id} of {len(self.positions_R)}")
        shard = int(np.searchsorted(self._first_rows, row_id, side="right")) - 1
        mapped, offsets = self._open(shard)
        at = row_id - int(self._first_rows[shard])
        return self.layout.decode(np.array(mapped[offsets[at] : offsets[at + 1]]), int(self.positions_R[row_id]))

    def lookup(self, row_ids_N: NDArray[np.int64]) -> Kept:
        """What is kept of these rows' positions, row by row."""
        return Kept.join([self.row(row_id) for row_id in row_ids_N.tolist()])

    def verify(self) -> None:
        """Compare every file with its recorded size and SHA-256.

        Raises:
            InputError: one is missing or altered; the message names it.
        """
        recorded = {entry["file"]: entry["sha256"] for entry in self.store["shards"]}
        for name, sha256 in {**self.store["rows"], **recorded}.items():
            file = self._folder / name
            if not file.is_file() or digest_file(file) != sha256:
                raise InputError(f"{file}: missing or altered since it was written; make the soft targets again")

    def check(self, expected: Mapping[str, str], hashes_R: Hashes) -> None:
        """Refuse targets of anything else.

        Args:
            expected: name → what the targets must belong to.
            hashes_R: of the rows that they are wanted for.

        Raises:
            InputError: the first difference, with both sides named.
        """
        for name, value in expected.items():
            actual = self.store["bound"].get(name)
            if actual != value:
                raise InputError(
                    f"{self._folder}: these soft targets belong to {name} {actual}, not to {value}; "
                    "make them again with this recipe"
                )
        fault = _rows_fault(self._array(ROWS), hashes_R)
        if fault is not None:
            raise InputError(f"{self._folder}: these soft targets belong to other rows: {fault}")


def ids_fault(store: JsonObject, num_ids: int) -> str | None:
    """Why a store cannot serve a student with this number of token ids; None if it can.

    Kept ids are over those that teacher and student share: what probability these have together is not known from ids
    that were kept of more, and of fewer the others are missing. All logits can be cut to any student's.
    """
    layout = store["layout"]
    own = layout["vocabulary"]
    shared = min(num_ids, store.get(TEACHER_VOCABULARY, own))
    if own == shared or (layout["kind"] == "full" and own > shared):
        return None
    return f"its soft targets are over {own} token ids, but teacher and student share {shared}"


def _rows_fault(ours: Hashes, theirs: Hashes) -> str | None:
    """How the rows of a store differ from those that it is wanted for."""
    if len(ours) != len(theirs):
        return f"{len(ours)} rows in the store, {len(theirs)} here"
    differing = np.flatnonzero(ours != theirs)
    if not len(differing):
        return None
    first = int(differing[0])
    if np.array_equal(np.sort(ours), np.sort(theirs)):
        where = int(np.flatnonzero(ours == theirs[first])[0])
        return f"the same rows in another order: row {first} here is row {where} of the store"
    return (
        f"row {first} has other tokens (hash {int(ours[first]):016x} in the store, {int(theirs[first]):016x} here; "
        f"{len(differing)} rows differ); tokenizer, template, max_tokens and data must be those of the store"
    )


def _plain(layout: Layout) -> JsonObject:
    return {**asdict(layout), "temperatures": list(layout.temperatures)}


def _name(shard: int) -> str:
    return f"shard-{shard:05d}.bin"


def _record(shard: int) -> str:
    return f"shard-{shard:05d}.json"
