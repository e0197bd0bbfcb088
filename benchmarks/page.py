"""Put a benchmark's table between its marks in a page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def insert(page: Path, name: str, text: str, script: str | None = None) -> None:
    """Replace what stands between the marks of a table; its script is NAME.py unless it is called otherwise."""
    begin, end = f"<!-- {name}: written by benchmarks/{script or name}.py -->", f"<!-- /{name} -->"
    whole = page.read_text(encoding="utf-8")
    for mark in (begin, end):
        assert mark in whole, f"{page} has no {mark}"
    page.write_text(f"{whole.partition(begin)[0]}{begin}\n{text}\n{end}{whole.partition(end)[2]}", encoding="utf-8")


def show(page: Path, name: str, table: str) -> None:
    """Put a table into a page, and print it."""
    insert(page, name, table)
    print(table)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line described by the script's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_or_show(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], object], show: Callable[[], None]
) -> None:
    """Measure, or with --table put the measured results into the pages."""
    parser.add_argument("--table", action="store_true", help="put the measured results into the pages")
    options = parser.parse_args()
    if options.table:
        show()
    else:
        run(options)
