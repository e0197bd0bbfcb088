"""The tables of docs/report.md, written from the schema itself so that they cannot drift from it.

`python -m distilpeft.report.reference docs/report.md` puts them between the marks in a file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from distilpeft.machine.files import write_text
from distilpeft.report.figures import Benchmark, Decode, Latency, Part, Ratio, Score
from distilpeft.report.schema import Report

BEGIN, END = "<!-- schema -->", "<!-- /schema -->"
ELSEWHERE = {Benchmark, Decode, Latency, Ratio, Score}
"""Parts that are described where they are used, or in docs/benchmark.md."""


def markdown() -> str:
    """A table for the report and one for each of its parts, in the order of report.json."""
    blocks = [_table(Report)]
    blocks += [f"### {path}\n\n{' '.join((part.__doc__ or '').split())}\n\n{_table(part)}" for path, part in _parts()]
    return "\n".join(blocks)


def filled(text: str) -> str:
    """A text with the current tables between its marks."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{markdown()}\n{END}{after}"


def _parts() -> Iterator[tuple[str, type[Part]]]:
    """Every part below the report once, under the first place where it is found."""
    seen = set(ELSEWHERE)
    waiting: list[tuple[str, type[Part]]] = [("", Report)]
    while waiting:
        path, part = waiting.pop(0)
        if path:
            yield path, part
        below = []
        for key, field in part.model_fields.items():
            for child in _children(field.annotation):
                if child not in seen:
                    seen.add(child)
                    below.append((f"{path}.{key}".strip("."), child))
        waiting = [*below, *waiting]


def _children(annotation: object) -> Iterator[type[Part]]:
    """The parts in a type."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for inner in get_args(annotation):
        yield from _children(inner)


def _table(part: type[Part]) -> str:
    rows = [f"| `{key}` | {field.description} |" for key, field in part.model_fields.items()]
    return "\n".join(["| key | meaning |", "| --- | --- |", *rows]) + "\n"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    write_text(page, filled(page.read_text(encoding="utf-8")))
