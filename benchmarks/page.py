"""Put a benchmark's table between its marks in a page."""

from __future__ import annotations

from pathlib import Path


def insert(page: Path, name: str, text: str, script: str | None = None) -> None:
    """Replace what stands between the marks of a table; its script is NAME.py unless it is called otherwise."""
    begin, end = f"<!-- {name}: written by benchmarks/{script or name}.py -->", f"<!-- /{name} -->"
    whole = page.read_text(encoding="utf-8")
    for mark in (begin, end):
        assert mark in whole, f"{page} has no {mark}"
    page.write_text(f"{whole.partition(begin)[0]}{begin}\n{text}\n{end}{whole.partition(end)[2]}", encoding="utf-8")
