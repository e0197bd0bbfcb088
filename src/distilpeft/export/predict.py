"""`distilpeft predict`: texts from the command line, lines or JSONL in, one answer per text out.

A line of input that is a JSON object keeps its keys, and gets the answer beside them. A classifier of pairs takes two
texts on the command line, or JSON objects with `text` and `pair`. An image model takes files' paths for texts, or JSON
objects with `image`. What goes to a file appears there whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from distilpeft.errors import InputError
from distilpeft.export.bundle import Bundle, Text
from distilpeft.recipe.task import KINDS

TEXT, PROMPT, IMAGE, PAIR = "text", "prompt", "image", "pair"
MOST_TOKENS = 64


def run(
    folder: Path,
    texts: Sequence[str],
    source: TextIO | None,
    out: Path | None,
    *,
    batch_size: int,
    max_new_tokens: int | None,
) -> Iterator[str]:
    """Answer every text.

    Args:
        folder: an exported folder.
        texts: given on the command line.
        source: lines to read instead.
        out: a file for the answers.
        batch_size: texts that go through a classifier at once.
        max_new_tokens: of a language model's continuation; None: an encoder-decoder's own, else `MOST_TOKENS`.

    Yields:
        An answer as a line of JSON, unless it went to the file.

    Raises:
        InputError: the folder is no export, or a line cannot be answered; the line is named.
    """
    deployed = Bundle(folder)
    pairs = bool(deployed.manifest.get(PAIR))
    if source is None:
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise InputError(f"text {number}: is empty")
        if pairs and len(texts) != 2:
            raise InputError(f"{folder}: reads pairs of texts; give two, or a file of JSON lines with text and pair")
        rows: Iterator[dict[str, Any]] = iter(
            [dict(zip((TEXT, PAIR), texts, strict=True))] if pairs else [{TEXT: text} for text in texts]
        )
    else:
        rows = read(source, getattr(source, "name", "input"), pairs=pairs)
    lines = (
        json.dumps(row | answer, ensure_ascii=False)
        for row, answer in answered(deployed, rows, batch_size, max_new_tokens)
    )
    if out is None:
        yield from lines
    else:
        _write(out, lines)


def read(source: Iterable[str], name: str, *, pairs: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of text lines or JSON objects, each with a text under `text` or `prompt`; empty lines are left out.

    Of `pairs` each is a JSON object that also has a text under `pair`.

    Raises:
        InputError: a line is not as it should be.
    """
    for number, line in enumerate(source, 1):
        if not line.strip():
            continue
        here = f"{name}:{number}"
        if not line.lstrip().startswith("{") and pairs:
            raise InputError(f"{here}: the model reads pairs of texts: wants a JSON object with {TEXT!r} and {PAIR!r}")
        if not line.lstrip().startswith("{"):
            yield {TEXT: line.rstrip("\r\n")}
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{here}: not valid JSON: {error}") from None
        if not isinstance(_text(row), str) or not str(_text(row)).strip():
            has = ", ".join(row)
            raise InputError(f"{here}: wants a text under {TEXT!r} or {PROMPT!r}; its keys are {has}")
        if pairs and (not isinstance(row.get(PAIR), str) or not row[PAIR].strip()):
            raise InputError(f"{here}: wants a second text under {PAIR!r}; its keys are {', '.join(row)}")
        yield row


def answered(
    deployed: Bundle, rows: Iterator[dict[str, Any]], batch_size: int, max_new_tokens: int | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row with its answer: see `deployed.answer`; of a language model `completion` or `output`."""
    if KINDS[deployed.manifest["task"]].is_language_model:
        told = "output" if KINDS[deployed.manifest["task"]].reads_first else "completion"
        most = max_new_tokens or deployed.manifest.get("max_new_tokens") or MOST_TOKENS
        for row in rows:
            yield row, {told: deployed.complete(str(_text(row)), most)}
        return
    while batch := list(islice(rows, batch_size)):
        yield from zip(batch, deployed.answers([_given(deployed, row) for row in batch]), strict=True)


def _given(deployed: Bundle, row: dict[str, Any]) -> Text:
    text = str(_text(row))
    return (text, row[PAIR]) if deployed.manifest.get(PAIR) else text


def _text(row: dict[str, Any]) -> Any:
    return row.get(TEXT, row.get(PROMPT, row.get(IMAGE)))


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
