"""Reports as ONE HTML page that needs nothing else: no network, no fonts, no library; it reads well without script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib import resources

from distilpeft.report import text
from distilpeft.report.page import answers, sections, tables
from distilpeft.report.page.markup import section
from distilpeft.report.plots import charts, training_charts
from distilpeft.report.schema import Report

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render(reports: Sequence[Report]) -> str:
    """Reports as a page.

    Args:
        reports: of finished runs, see docs/report.md; several are shown in joint plots and tables first.
    """
    assert reports, "a page is of at least one report"
    called = charts.names(reports)
    title = called[0] if len(reports) == 1 else f"{len(reports)} runs: {', '.join(called)}"
    body = "".join([_joint(reports, called), *(_own(at, reports, called) for at in range(len(reports)))])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)} – distilpeft</title>\n'
        f"<style>\n{_file('page.css')}</style>\n</head>\n<body>\n{_header(reports, called)}{_contents(body)}"
        f"<main>{body}</main>\n<footer>Made by distilpeft from report.json. All figures were measured; "
        f"intervals are 95 %.</footer>\n"
        f'<div id="tip" role="presentation" hidden></div>\n<script>\n{_file("page.js")}</script>\n</body>\n</html>\n'
    )


def _file(name: str) -> str:
    return resources.files("distilpeft.report.page").joinpath(name).read_text(encoding="utf-8")


def _header(reports: Sequence[Report], called: Sequence[str]) -> str:
    single = len(reports) == 1
    first = reports[0]
    about = f"{first.task.replace('_', ' ')} · judged on {first.split}" if single else "runs side by side"
    title = called[0] if single else ", ".join(called)
    verdicts = "".join(
        ("" if single else f'<h2 class="run">{escape(name)}</h2>') + sections.verdict(report)
        for name, report in zip(called, reports, strict=True)
    )
    return (
        f'<header><div class="top"><span class="kicker">distilpeft report · {escape(about)}</span>'
        f'<button id="theme" type="button" hidden>Dark</button></div><h1>{escape(title)}</h1>{verdicts}</header>'
    )


def _contents(body: str) -> str:
    """Links to the sections."""
    heads = re.findall(r'<section id="([^"]*)"><h2>([^<]*)</h2>', body)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in heads)
    return f'<nav aria-label="Sections">{links}</nav>'


def _joint(reports: Sequence[Report], called: Sequence[str]) -> str:
    """What all reports share a plot or a table for."""
    several = len(reports) > 1
    keys = "".join(
        (f'<h3 class="run">{escape(name)}</h3>' if several else "") + sections.key_figures(report)
        for name, report in zip(called, reports, strict=True)
    )
    joint = "".join(
        tables.models(
            [(at, f"{called[at]}/" if several else "", reports[at]) for at in group],
            f"All models, {charts.spoken(reports[group[0]].metric)}",
        )
        for group in charts.by_metric(reports)
    )
    parts = [
        section("key", "Key figures", keys),
        *([section("use", "Use it", sections.deploying(reports[0]))] if not several else []),
        section("latency", "Latency and score", *(sections.wide(chart) for chart in charts.latency(reports))),
        section("models", "Models", joint, lead="Choose a column's head to sort by it."),
    ]
    return "".join(parts)


def _costs(reports: Sequence[Report]) -> str:
    parts = [sections.middle(chart) for chart in (*charts.memory(reports), *charts.size(reports))]
    inner = f'<div class="halves">{"".join(parts)}</div>' if parts else ""
    return section("costs", "Memory and size", inner)


def _own(at: int, reports: Sequence[Report], called: Sequence[str]) -> str:
    """The sections of one report."""
    report, several = reports[at], len(reports) > 1
    prefix, more = (f"r{at + 1}-", f": {called[at]}") if several else ("", "")
    costs = "" if several else _costs(reports)

    def own(name: str, title: str, *parts: str, lead: str = "") -> str:
        return section(prefix + name, title + more, *parts, lead=lead)

    blocks = [
        own("comparisons", "Comparisons", tables.comparisons(report), lead="Paired on the same rows, so rows that are "
            "hard for both cancel."),
        own("answers", "Answers", answers.section(report.answers), lead="What the student answers on the rows that "
            "models are judged on."),
        own("seeds", "Seeds", tables.seeds(report), lead=text.OVER_SEEDS),
        own("groups", "Groups", tables.groups(report), lead="Paired on the same rows; last, by how much more than "
            "on all rows."),
        costs,
        own("training", "Training", sections.training(report, prefix)),
        own("calibration", "Calibration", sections.grid(training_charts.calibration(report, prefix)),
            lead="Whether answers "
            "given with a confidence are right as often as it says."),
        own("exports", "Exports", sections.exports(report), lead="Each was opened in its own runtime, in a process of "
            "its own, and compared with the student on validation rows."),
        own("targets", "Soft targets", sections.soft_targets(report)),
        own("benchmark", "Benchmark", sections.benchmark(report)),
        own("samples", "Samples", sections.samples(report)),
        own("provenance", "About this run", sections.provenance(report, charts.missing([report]))),
    ]  # fmt: skip
    return "".join(blocks)
