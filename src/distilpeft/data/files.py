"""Which files hold rows, and how their bytes become text: endings, compression, folders and shards, encodings.

A folder's files are grouped into parts: shards of a split (`train-00000-of-00003.parquet`) belong together, and so do
files in a folder of their own (`train/a.csv`). What is hidden (`._train.csv`, `.~lock.train.csv#`) is not data.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from distilpeft.errors import InputError

FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip
"""Ending, in lower case → how the file is read."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
PATTERN = re.compile(r"[*?\[]")
SPLIT_NAMES = frozenset(
    {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
)
"""Names by which people call splits; `train-0` and `train-1` are shards of one, `2024-01` and `2024-02` are not."""
PIECE = 1 << 20
WESTERN = 0.25
"""Share of the bytes beyond ASCII that follow another, at most, for Windows-1252; in other alphabets most do."""
_RAW = re.compile("[\udc80-\udcff]+")
_UNDEFINED = frozenset("\udc81\udc8d\udc8f\udc90\udc9d")  # no characters in Windows-1252
_SHARD = re.compile(r"[-_.]\d+[-_.]of[-_.]\d+$")
_NUMBER = re.compile(r"[-_.]?\d+$")
_POINTER = b"version https://git-lfs.github.com/spec/"
_NO_DATA = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"})
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_SHOWN = {"utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "utf-32": "UTF-32"}


def endings() -> str:
    """What a data file may end in, for messages."""
    return f"{', '.join(FORMATS)}, each alone or with {', '.join(COMPRESSED)}"


def format_of(path: Path) -> str | None:
    """How a file is read, by its ending in upper or lower case; None if it is not a data file."""
    return FORMATS.get(_bare(path)[1])


def is_tabbed(path: Path) -> bool:
    """Whether the ending says that tabs separate the fields."""
    return _bare(path)[1] == ".tsv"


def _bare(path: Path) -> tuple[str, str]:
    """A file's name without endings, and the ending that names its format."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return plain.stem, plain.suffix.lower()


def matches(pattern: str) -> list[Path]:
    """The data files that a pattern such as `part-*.csv` names, in order; `**` goes into folders."""
    root = Path(pattern).expanduser()
    fixed = next(i for i, part in enumerate(root.parts) if PATTERN.search(part))
    base = Path(*root.parts[:fixed])
    paths = base.glob("/".join(root.parts[fixed:]))
    return sorted(path for path in paths if path.is_file() and format_of(path) and not _is_hidden(path, base))


def in_folder(folder: Path) -> list[Path]:
    """The data files of a folder; those of its subfolders if it has none itself, as clones of the hub have them."""
    for paths in (folder.iterdir(), folder.rglob("*")):
        visible = [path for path in paths if path.is_file() and not _is_hidden(path, folder)]
        data = [path for path in visible if format_of(path) not in (None, "text") and path.name not in _NO_DATA]
        if data:
            return sorted(data)
    return []


def _is_hidden(path: Path, root: Path) -> bool:
    """Whether other programs put it there: macOS, editors, office programs, Spark."""
    return any(part.startswith((".", "_", "~$")) for part in path.relative_to(root).parts)


def parts(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Group files into parts, each named after its files or their folder.

    Raises:
        InputError: two files have one name and different endings, so that they may hold the same rows.
    """
    names: dict[tuple[Path, str], Path] = {}
    groups: dict[str, list[Path]] = {}
    for file in files:
        stem = _bare(file)[0]
        twin = names.setdefault((file.parent, stem), file)
        if twin is not file:
            raise InputError(
                f"data.source: {twin} and {file.name} have the same name and may hold the same rows; remove one, or "
                f"name the files: data.source: {{{stem}: {twin}, ...}}"
            )
        groups.setdefault(_part(file, stem, root), []).append(file)
    return groups


def _part(file: Path, stem: str, root: Path) -> str:
    own = _split_name(stem)
    if own not in SPLIT_NAMES and file.parent != root and file.parent.name in SPLIT_NAMES:
        return file.parent.name
    return own


def _split_name(stem: str) -> str:
    """A file's name without the number of a shard."""
    name = _SHARD.sub("", stem)
    shorter = _NUMBER.sub("", name)
    return shorter if shorter.lower() in SPLIT_NAMES else name


def open_bytes(path: Path) -> BinaryIO:
    """A file's bytes, decompressed as its ending says."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if suffix == ".bz2":
        return cast(BinaryIO, bz2.open(path))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if suffix == ".zst":
        import pyarrow as pa

        return cast(BinaryIO, pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def open_text(path: Path, encoding: str) -> TextIO:
    """A file's text, with its line ends unchanged."""
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, newline="")


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with open_bytes(path) as file:
            while piece := file.read(PIECE):
                yield piece
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cannot be decompressed: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{path}: cannot be decompressed: {error}") from None


def encoding_of(path: Path, encoding: str | None = None) -> tuple[str, str | None]:
    """How a file's bytes become text: by its byte order mark, as UTF-8, or as Windows-1252 where that is plausible.

    Args:
        path: the file.
        encoding: the recipe's `data.encoding`, which is only checked.

    Returns:
        Python's name of the encoding, and what to say of it if it was guessed.

    Raises:
        InputError: the file is empty, or its bytes are not text in any of these; with the line.
    """
    start = next(_pieces(path), b"")
    if not start:
        raise InputError(f"{path}: the file is empty")
    if start.startswith(_POINTER):
        raise InputError(f"{path}: this is a Git LFS pointer, not the file; fetch it with: git lfs pull")
    if encoding is not None:
        _check(path, encoding, f"not {encoding} text (data.encoding)")
        return encoding, None
    marked = next((name for mark, name in _MARKS if start.startswith(mark)), None) or _unmarked_utf16(start)
    if marked is not None:
        _check(path, marked, f"not {_SHOWN.get(marked, 'UTF-8')} text, though it begins like it")
        return marked, f"{path}: read as {_SHOWN[marked]}" if marked in _SHOWN else None
    bad = _first_bad_line(path, "utf-8")
    if bad is None:
        return "utf-8", None
    if not _is_western(path):
        raise InputError(f"{path}:{bad}: not UTF-8 text; save the file as UTF-8, or name its encoding in data.encoding")
    return "cp1252", (
        f"{path}: read as Windows-1252, since line {bad} is not UTF-8; if that is wrong, name the encoding in "
        "data.encoding"
    )


def _unmarked_utf16(start: bytes) -> str | None:
    """UTF-16 without a byte order mark: in most texts every other byte is zero."""
    sample = start[:4096]
    for offset, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros = sample[offset::2].count(0)
        if zeros > 0.3 * len(sample) / 2 and sample[1 - offset :: 2].count(0) == 0:
            return name
    return None


def _check(path: Path, encoding: str, fault: str) -> None:
    bad = _first_bad_line(path, encoding)
    if bad is not None:
        raise InputError(f"{path}:{bad}: {fault}")


def _first_bad_line(path: Path, encoding: str) -> int | None:
    """The first line that is not text in an encoding; readers decode late and lose it."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    try:
        for piece in _pieces(path):
            line += decoder.decode(piece).count("\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(encoding, "replace")
        return line + before.count("\n")
    return None


def _is_western(path: Path) -> bool:
    """Whether bytes that are not UTF-8 can be Windows-1252: no sign of UTF-8, and letters with accents stand apart."""
    high = adjacent = 0
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for piece in _pieces(path):
        text = decoder.decode(piece)
        raw = _RAW.findall(text)
        if sum(map(len, raw)) < sum(char > "\x7f" for char in text):
            return False  # valid UTF-8 as well: a damaged file
        if any(char in _UNDEFINED for run in raw for char in run):
            return False
        high += sum(map(len, raw))
        adjacent += sum(len(run) - 1 for run in raw)
    return adjacent <= WESTERN * high
