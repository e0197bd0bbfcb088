"""Files that are complete or absent: checksums, atomic writes, sealed folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from distilpeft.errors import InputError

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object; nothing is known of its values until they are read."""
CHECKSUM, SUMS = "checksum", "sums.json"


def read_json(path: Path, advice: str) -> JsonObject:
    """Read a JSON object.

    Raises:
        InputError: missing or damaged; `advice` says what to do.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); {advice}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; {advice}")
    return value


def sealed(value: Mapping[str, object]) -> JsonObject:
    """A JSON object with a checksum of itself, for `read_sealed`."""
    plain: JsonObject = json.loads(json.dumps(value, allow_nan=False))
    return {**plain, CHECKSUM: digest_json(plain)}


def read_sealed(path: Path, advice: str) -> JsonObject:
    """Read a JSON object that `sealed` has made, without its checksum.

    Raises:
        InputError: missing, damaged or altered; `advice` says what to do.
    """
    value = read_json(path, advice)
    if value.pop(CHECKSUM, None) != digest_json(value):
        raise InputError(f"{path}: altered since it was written (its checksum does not fit); {advice}")
    return value


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder and the folders in it, in order of their paths."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def seal_folder(folder: Path) -> None:
    """Record the SHA-256 of every file below a folder, for `is_whole`; all is on disk when this returns."""
    files = [file for file in files_below(folder) if file.name != SUMS and file.suffix != ".lock"]
    for file in files:
        fsync(file)
    write_json(folder / SUMS, {file.relative_to(folder).as_posix(): digest_file(file) for file in files})


def is_whole(folder: Path) -> bool:
    """Whether a folder holds every file that `seal_folder` recorded, byte for byte."""
    try:
        sums = read_json(folder / SUMS, "")
    except InputError:
        return False
    return all((folder / name).is_file() and digest_file(folder / name) == sha256 for name, sha256 in sums.items())


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file so that a crash leaves the old one or the new one, never half of it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one, never half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync(path.parent)


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Force a file's bytes or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_folder(partial: Path, final: Path, *, replace: bool = False) -> None:
    """Put a finished folder in its place by one rename; everything in it is on disk before, the rename when it returns.

    A crash leaves the partial folder or the complete final one.

    Args:
        partial: what was written, next to `final`.
        final: its name from now on.
        replace: remove what is there under that name right before the rename.

    Raises:
        OSError: the disk is full or fails; or without `replace`, there is a folder with files of that name.
    """
    for path in (*partial.rglob("*"), partial):
        fsync(path)
    if replace and final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    fsync(final.parent)


def names_in(folder: Path) -> frozenset[str]:
    """The names in a folder, none if there is no folder.

    Over NFS this shows what other machines have renamed; a look at a single path may miss it for a while.
    """
    try:
        return frozenset(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def replace_link(link: Path, target: str) -> None:
    """Point a symbolic link at `target` (relative to the link's folder) in one atomic step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


@dataclass(frozen=True)
class Usage:
    """What a folder takes on disk.

    Attributes:
        bytes: of all files below it; of a file with several names, this one's share.
        changed: when anything in it was changed last, in seconds since 1970.
    """

    bytes: float
    changed: float


def usage(folder: Path) -> Usage:
    """Measure a folder; links are not followed, and files that vanish meanwhile are not counted."""
    size, changed = 0.0, 0.0
    for place, folders, files in os.walk(folder):
        for name in (".", *folders, *files):
            try:
                status = os.lstat(Path(place) / name)
            except FileNotFoundError:
                continue
            changed = max(changed, status.st_mtime)
            if stat.S_ISREG(status.st_mode):
                size += status.st_size / status.st_nlink
    return Usage(size, changed)


def size_text(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit == "GB" and count < 10 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
