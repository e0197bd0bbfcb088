"""The report as text: nobody's names, labels or groups turn into markup, in Markdown or on the terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from support import reports

from distilpeft.report import text, timing_notes

NASTY = "<img src=x> | [/red] [bold]\n# north `|` **b**"
BAR = re.compile(r"(?<!\\)(?:\\\\)*\|")


def shape(markdown: str) -> list[tuple[str, int]]:
    """Of each line how it begins, and how many cells it has."""
    return [(re.match(r"#+ |- |\| |$|", line)[0], len(BAR.findall(line))) for line in markdown.splitlines()]


@pytest.mark.parametrize("column", ["place", NASTY])
def test_the_name_of_a_group_cannot_break_the_markdown(column):
    harmless = text.markdown(reports.grouped("north", "south"))
    nasty = text.markdown(reports.grouped(NASTY, f"south{NASTY}", column=column))
    assert shape(nasty) == shape(harmless)
    assert "<img" not in nasty
    assert "&lt;img src=x>" in nasty


def test_names_of_the_machine_and_reasons_cannot_break_the_markdown():
    report = reports.classifier().as_json()
    report["not_measured"] = [NASTY]
    report["environment"]["device"] = NASTY
    report["benchmark"]["skipped"] = [{"role": "export:onnx", "why": NASTY}]
    report["benchmark"]["noise"]["why"] = [NASTY]
    report["exports"]["onnx"]["tried"] = [{"way": NASTY, "faults": [NASTY]}]
    harmless = {**report, "not_measured": ["a"]}
    assert "<img" not in text.markdown(reports.Report.model_validate(report))
    assert len(shape(text.markdown(reports.Report.model_validate(report)))) == len(
        shape(text.markdown(reports.Report.model_validate(harmless)))
    )


def test_the_terminal_shows_the_name_of_a_group_as_it_is():
    console = Console(file=io.StringIO(), width=300)
    text.show(reports.grouped("north", "[/red] [bold]"), console)
    assert "place [/red] [bold] loses more than the rest" in console.file.getvalue()


def test_the_doubts_about_latencies_follow_the_table_that_shows_them():
    report = reports.classifier()
    (noise,) = [line for line in timing_notes.doubts(report.benchmark) if "noisy" in line]
    lines = text.markdown(report).splitlines()
    last = max(at for at, line in enumerate(lines) if line.startswith("| export:bnb-nf4 |"))
    assert lines[last + 1] == ""
    assert f"- {noise}" in lines[last + 2 : last + 4]
    console = Console(file=io.StringIO(), width=300)
    text.show(report, console)
    shown = console.file.getvalue()
    assert shown.index("export:bnb-nf4") < shown.index(noise) < shown.index("The student keeps")
    quiet = report.benchmark.model_copy(
        update={"noise": report.benchmark.noise.model_copy(update={"noisy": False, "disturbed": 0.0})}
    )
    assert timing_notes.doubts(quiet) == timing_notes.doubts(None) == []


def test_what_was_found_is_apart_from_what_is_said_about_the_run():
    console = Console(file=io.StringIO(), width=300)
    text.show(reports.classifier(), console)
    found, _, about = console.file.getvalue().partition("About this run:")
    assert "The student keeps" in found
    assert "training rows were cut" in about
    assert "training rows were cut" not in found
