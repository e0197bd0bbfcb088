"""The teacher's soft targets on disk: all class logits of every training row, looked up by row id.

Layout of the folder: `logits.npy`, float32 [rows, classes], a plain NumPy file that is memory-mapped for reading;
`bound.json`, which names everything the logits belong to. A store that was made for another teacher, adapter,
tokenizer or set of rows is refused with both sides named. Writing is resumable: `progress.json` holds how many
rows are safely on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.artifact import Artifact, digest_json, read_json, write_json
from distilpeft.errors import InputError

LOGITS, BOUND, PROGRESS = "logits.npy", "bound.json", "progress.json"
Floats = NDArray[np.float32]


def rows_digest(tokens: datasets.Dataset) -> str:
    """A hash of every row's token ids and label, in order: what the logits of a store are logits of."""
    result = hashlib.sha256()
    for batch in tokens.with_format("arrow").iter(batch_size=10_000):
        ids = batch["input_ids"].combine_chunks()
        result.update(ids.flatten().to_numpy().astype("<i4").tobytes())
        result.update(ids.value_lengths().to_numpy().astype("<i4").tobytes())
        result.update(batch["label"].to_numpy().astype("<i8").tobytes())
    return result.hexdigest()


def binding(teacher: Artifact, tokens: datasets.Dataset, tokenizer_digest: str) -> dict[str, str]:
    """Everything that a store's logits depend on: the teacher's own files, the tokenizer and the rows."""
    files = teacher.manifest()["files"]
    weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    return {
        "teacher": teacher.key,
        "base": str(teacher.inputs.get("base")),
        "weights": digest_json(weights),
        "tokenizer": tokenizer_digest,
        "rows": rows_digest(tokens),
    }


class Writer:
    """Fills a store row by row id; a new Writer on a folder that was interrupted goes on after `done` rows."""

    def __init__(self, folder: Path, num_rows: int, num_classes: int, bound: Mapping[str, str]) -> None:
        self._folder = folder
        path = folder / LOGITS
        known = folder / PROGRESS
        self.done = 0
        if known.is_file() and path.is_file() and read_json(folder / BOUND, "delete it") == dict(bound):
            self.done = int(read_json(known, "delete it")["done"])
            self._logits_NC: Floats = np.load(path, mmap_mode="r+", allow_pickle=False)
        else:
            known.unlink(missing_ok=True)  # before anything else: it counts rows of the store that is begun anew
            write_json(folder / BOUND, bound)
            self._logits_NC = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.float32, shape=(num_rows, num_classes)
            )

    def append(self, logits_NC: Floats) -> None:
        """Store the logits of the next rows; they are on disk when this returns."""
        end = self.done + len(logits_NC)
        self._logits_NC[self.done : end] = logits_NC
        assert isinstance(self._logits_NC, np.memmap)
        self._logits_NC.flush()
        self.done = end
        write_json(self._folder / PROGRESS, {"done": end})

    def close(self) -> None:
        """Finish: the store is whole."""
        assert self.done == len(self._logits_NC), "soft targets are missing rows"
        del self._logits_NC
        (self._folder / PROGRESS).unlink()


class SoftTargets:
    """A whole store, read by row id."""

    def __init__(self, folder: Path, expected: Mapping[str, str]) -> None:
        if (folder / PROGRESS).exists():
            raise InputError(f"{folder}: these soft targets are not finished; run the recipe that makes them again")
        bound = read_json(folder / BOUND, f"delete {folder} to make it again")
        for name, value in expected.items():
            if bound.get(name) != value:
                raise InputError(
                    f"{folder}: these soft targets belong to {name} {bound.get(name)}, not to {value}; "
                    f"delete the folder to make them again"
                )
        self._logits_NC: Floats = np.load(folder / LOGITS, mmap_mode="r", allow_pickle=False)

    def lookup(self, row_ids_N: NDArray[np.int64]) -> Floats:
        """Teacher logits [N, C] of these rows."""
        return np.asarray(self._logits_NC[row_ids_N])
