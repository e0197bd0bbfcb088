"""Hypothesis strategies of input that makes no sense: recipes, overrides, data files, and what is in a run's folder.

Most of what they make has to be refused; some of it happens to be good. Whatever it is, it may never end in a
traceback, and a refusal is one line that names the place.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

ODD = [
    "", " ", "\x00", "\ufeff", "é" * 3, "🙂👩\u200d👩", "שלום עולם", "\u202eabc", "a\tb", "x" * 5000, "-1", "1e999",
    "NaN", ".inf", "null", "~", "yes", "../../etc", "/", "C:\\x", "%s%n", "{{7*7}}", "$(id)", "`id`",
    "'; DROP TABLE rows; --", "<script>alert(1)</script>", "!!python/none",
]  # fmt: skip
PIECES = [b"\x00", b"\xff\xfe", b"\t", b"[", "\u2028".encode(), b"&a [*a]", b"!!set {", b'"', b": ", b"\n- "]
SCALARS = st.one_of(
    st.sampled_from(ODD), st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def keys_of(tree: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key path of a recipe, sections as well."""
    found = []
    for key, value in tree.items():
        found.append((*at, key))
        if isinstance(value, dict):
            found += keys_of(value, (*at, key))
    return found


@st.composite
def recipes(draw: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """A good recipe with one to three changes: values of other kinds, keys gone, keys nobody knows."""
    made = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(keys_of(made)))
        node = made
        for key in path[:-1]:
            node = node[key]
        change = draw(st.sampled_from(["value", "value", "value", "gone", "new", "double"]))
        if change == "value":
            node[path[-1]] = draw(VALUES)
        elif change == "gone":
            del node[path[-1]]
        elif change == "new":
            node[draw(st.text(min_size=1, max_size=12))] = draw(SCALARS)
        else:
            node[f"{path[-1]}s"] = node.pop(path[-1])
        if not keys_of(made):
            break
    return made


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Bytes with pieces cut out, put in, doubled, or flipped."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(made) - 1)))
        kind = draw(st.sampled_from(["cut", "put", "flip", "end", "double"]))
        if kind == "cut":
            del made[at : at + draw(st.integers(1, 40))]
        elif kind == "put":
            made[at:at] = draw(st.sampled_from(PIECES) | st.binary(min_size=1, max_size=8))
        elif kind == "flip" and made:
            made[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "end":
            del made[at:]
        else:
            made[at:at] = made[at : at + 200]
    return bytes(made)


KEYS = ["distil.alpha", "data.source", "teacher.fit", "seed", "name", "x.y", ""]
OVERRIDES = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(ODD) | st.text(max_size=20)),
    st.text(max_size=30),
    st.sampled_from(["=", "==", "a=b=c", ".=1", "seed", "distil..alpha=1", "data.where={a: [}", "teacher=&a [*a]"]),
)  # fmt: skip

TEXTS = st.one_of(st.just("a good film"), st.just("a bad film"), st.text(max_size=30), st.sampled_from(ODD))
LABELS = st.one_of(
    st.sampled_from(["good", "bad"]),
    st.sampled_from(["ugly", "", " ", "good ", "GOOD", "0", "1", "2", "-1", "1.0", "nan", "None"]),
)
CELLS: dict[str, st.SearchStrategy[Any]] = {
    "as told": TEXTS,
    "numbers": st.integers(-5, 5) | st.floats(),
    "holes": st.none() | TEXTS,
    "lists": st.lists(TEXTS, max_size=2),
    "objects": st.dictionaries(st.text(max_size=3), TEXTS, max_size=2),
    "anything": VALUES,
}


@st.composite
def tables(draw: Any) -> list[dict[str, Any]]:
    """Rows of `text` and `label`, of which something may be wrong."""
    texts = CELLS[draw(st.sampled_from(list(CELLS)))]
    labels = draw(st.sampled_from(["as told", "one class", "anything"]))
    cells = {"as told": LABELS, "one class": st.just("good"), "anything": VALUES}[labels]
    rows = [{"text": draw(texts), "label": draw(cells)} for _ in range(draw(st.sampled_from([0, 1, 2, 5, 20])))]
    rename = draw(st.sampled_from(["", "", "", "text", "label"]))
    if rename:
        rows = [{(f"{key} " if key == rename else key): cell for key, cell in row.items()} for row in rows]
    return rows


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]) if rows else ["text", "label"])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def as_parquet(rows: list[dict[str, Any]]) -> bytes | None:
    """None of rows that Arrow has no type for."""
    file = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), file)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, UnicodeError):
        return None
    return file.getvalue()


WRITERS = {"csv": as_csv, "tsv": as_csv, "jsonl": as_jsonl, "json": as_jsonl, "parquet": as_parquet}


@st.composite
def data_files(draw: Any) -> tuple[str, bytes]:
    """(ending, content) of a data file."""
    ending = draw(st.sampled_from(sorted(WRITERS)))
    content = WRITERS[draw(st.just(ending) if draw(st.integers(0, 9)) else st.sampled_from(sorted(WRITERS)))](
        draw(tables())
    )
    if content is None:
        content = b"PAR1"
    if draw(st.booleans()):
        content = draw(damaged(content))
    return ending, content


@st.composite
def spoilt_rows(draw: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Good rows of which some cells are other things, or not there."""
    made = [dict(row) for row in rows]
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.sampled_from(made))
        column = draw(st.sampled_from(sorted(rows[0])))
        row[column] = draw(VALUES | st.lists(TEXTS, max_size=3))
        if draw(st.integers(0, 9)) == 0:
            del row[column]
    return made


@st.composite
def spoilt_folders(draw: Any, names: list[str]) -> tuple[str, bytes | None]:
    """(file of a run's folder, what it is to hold instead; None: it is gone)."""
    name = draw(st.sampled_from(names))
    content = draw(
        st.none() | st.binary(max_size=40)
        | VALUES.map(lambda value: json.dumps(value, default=str).encode("utf-8", "surrogatepass"))
        | st.sampled_from([b"", b"{}", b"[]", b"null", b"{" * 3000, b'{"checksum": ""}', b"\xff" * 10])
    )  # fmt: skip
    return name, content


def put(path: Path, content: bytes | None) -> None:
    """Replace a file, or take it away."""
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
