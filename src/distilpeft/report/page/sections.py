"""The page's sections that are not tables: the verdict, key figures, plots, samples, provenance."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from distilpeft.planning.roles import format_of
from distilpeft.recipe.task import KINDS
from distilpeft.report import text, timing_notes
from distilpeft.report.page import tables
from distilpeft.report.page.markup import details, listed, notes, plain
from distilpeft.report.page.svg import Paper, draw, swatch
from distilpeft.report.plots import training_charts
from distilpeft.report.plots.charts import Chart, number, spoken
from distilpeft.report.schema import Model, Report

WIDE, TALL = Paper(1000, 500, 14, labels=True), Paper(380, 400, 13)
MIDDLE, SMALL = Paper(520, 380, 13.5), Paper(380, 270, 13)


def verdict(report: Report) -> str:
    """What to deploy, in large letters."""
    lines = report.verdict.sentences or ["Nothing was timed, so this report names no model to deploy."]
    return f'<div class="verdict">{"".join(_sentence(line) for line in lines)}</div>'


def _sentence(line: str) -> str:
    """`Deploy name: the rest` or `Title: name, the rest` as a card; anything else as a statement."""
    match = re.fullmatch(r"(Deploy)( )(\S+)(: )(.+)", line) or re.fullmatch(
        r"(Smallest|Best score)(: )(\S+)(, )(.+)", line
    )
    if match is None:
        return f'<p class="statement">{escape(line)}</p>'
    title, first, name, second, rest = map(escape, match.groups())
    return (
        f'<p class="card"><span class="kicker">{title}<span class="gone">{first}</span></span>'
        f'<strong>{name}</strong><span class="gone">{second}</span><span class="rest">{rest}</span></p>'
    )


def chosen(report: Report) -> Model | None:
    """The model that key figures are of: what the verdict names first, else the student."""
    verdict = report.verdict
    models = (report.model(role) for role in (verdict.deploy, "student") if role)
    return next((model for model in models if model is not None), None)


def key_figures(report: Report) -> str:
    """The chosen model next to its teacher, and what was found, in words."""
    model, teacher = chosen(report), report.model("teacher")
    tiles = "".join(_tiles(model, teacher, report)) if model and teacher else ""
    title = f'<p class="lead">{escape(model.role)} compared with its teacher</p>' if model else ""
    lines = [line for line in text.findings(report) if line not in report.verdict.sentences]
    findings = f"<h3>What we found</h3>{notes(lines)}" if lines else ""
    return f'{title}<div class="tiles">{tiles}</div>{doubts(report)}{findings}'


def deploying(report: Report) -> str:
    """How to run the export that the verdict names."""
    role = report.verdict.deploy
    form = format_of(role) if role else None
    if form is None:
        return ""
    folder, kind = f"exports/{form}", KINDS[report.task]
    inputs = _inputs(report)
    first = f"({', '.join(inputs)})" if len(inputs) > 1 else inputs[0]
    call = f"complete({first}, 50)" if kind.is_language_model else f"answers([{first}])"
    code = (
        f"distilpeft predict {folder} {' '.join(inputs)}\n\n"
        f'# from Python\nimport distilpeft\n\nmodel = distilpeft.Bundle("{folder}")\nprint(model.{call})'
    )
    lead = f"In the folder of this page. {folder}/README.md shows how to run it without distilpeft."
    return f'<p class="lead">{escape(lead)}</p><pre class="code">{escape(code)}</pre>'


def _inputs(report: Report) -> list[str]:
    """What the models read at once, in quotes."""
    if report.task == "question_answering":
        return ['"a question"', '"a text"']
    if KINDS[report.task].reads_images:
        return ['"picture.png"']
    if KINDS[report.task].is_language_model:
        return ['"a prompt"']
    return ['"a text"', '"a second text"'] if report.settings.get("task", {}).get("pair") else ['"a text"']


def doubts(report: Report) -> str:
    """What speaks against the latencies, next to them."""
    return notes(timing_notes.doubts(report.benchmark), "notes warn")


def _tiles(model: Model, teacher: Model, report: Report) -> list[str]:
    metric, sides = report.metric, (model, teacher)
    own, theirs = (side.scores[metric].value if metric in side.scores else None for side in sides)
    tiles = [_tile(f"{spoken(metric)} ({report.split})", own, theirs, "", 4)]
    if model.kept is not None:
        tiles.append(_tile("kept of the teacher's score", model.kept * 100, None, "%", 3))
    own, theirs = (side.latency_ms.p50 if side.latency_ms else None for side in sides)
    if own is not None:
        first = "first token, p50" if KINDS[report.task].is_language_model else "latency, p50"
        tiles.append(_tile(first, own, theirs, "ms", 3))
    for title, pair in (
        ("size", (model.size_bytes, teacher.size_bytes)),
        ("peak memory", (model.memory_bytes, teacher.memory_bytes)),
    ):
        own, theirs = ((size or 0) / 1e6 or None for size in pair)
        if own is not None:
            tiles.append(_tile(title, own, theirs, "MB", 3))
    return tiles


def _tile(title: str, own: float | None, theirs: float | None, unit: str, signs: int) -> str:
    """One key figure, and the teacher's under it."""
    caption = f"<small>teacher {number(theirs, signs)} {unit}</small>" if theirs is not None else ""
    return (
        f'<div class="tile"><span class="kicker">{escape(title)}</span> '
        f"<strong>{number(own, signs)}<i>{unit}</i></strong> {caption}</div>"
    )


def wide(chart: Chart) -> str:
    """A chart over the full width; narrow screens get a taller drawing, with a legend in place of names."""
    plots = f'<div class="on-wide">{draw(chart, WIDE)}</div><div class="on-narrow">{draw(chart, TALL)}</div>'
    return _figure(chart, plots + _legend(chart), "wide")


def middle(chart: Chart) -> str:
    """A chart over half the width, with a legend."""
    return _figure(chart, draw(chart, MIDDLE) + _legend(chart), "middle")


def small(chart: Chart) -> str:
    """One of many charts side by side."""
    return _figure(chart, draw(chart, SMALL), "small")


def _figure(chart: Chart, inner: str, kind: str) -> str:
    note = f"<span>{escape(chart.note)}</span>" if chart.note else ""
    shown = details("Figures as a table", plain(chart.titles, chart.rows, chart.title))
    return (
        f'<figure class="{kind}" data-chart="{escape(chart.name)}"><figcaption><strong>{escape(chart.title)}</strong>'
        f"{note}</figcaption>{inner}{shown}</figure>"
    )


def _legend(chart: Chart) -> str:
    items = "".join(
        f"<li>{swatch(series.mark)}{escape(series.label)}</li>"
        for series in chart.series
        if series.kind == "points" and series.mark
    )
    return f'<ul class="legend">{items}</ul>'


def grid(charts: Sequence[Chart]) -> str:
    """Small charts in rows."""
    return f'<div class="grid">{"".join(small(chart) for chart in charts)}</div>' if charts else ""


def training(report: Report, prefix: str) -> str:
    """How each training went; gradient norms on demand."""
    norms = grid(training_charts.gradients(report, prefix))
    return grid(training_charts.training(report, prefix)) + (details("Gradient norms", norms) if norms else "")


def exports(report: Report) -> str:
    """Parity of the exports, and which ways of making them did not hold."""
    tried = [
        f"{form}, {attempt.way}, was tried and did not hold: {'; '.join(attempt.faults)}"
        for form, export in report.exports.items()
        for attempt in export.tried
    ]
    return tables.exports(report) + notes(tried)


def soft_targets(report: Report) -> str:
    """What soft targets on disk cost compared with the whole distribution."""
    titles, *rows = text.audit_rows(report) or [()]
    return plain(titles, rows, "What soft targets on disk cost") if rows else ""


def benchmark(report: Report) -> str:
    """Every cell of the benchmark, and what speaks against the figures."""
    figures = report.benchmark
    if not figures or not figures.arms:
        return ""
    quiet = ", ".join(figures.noise.unsteady)
    lines = [*timing_notes.timing_notes(figures), *([f"Not steady when measuring began: {quiet}."] if quiet else [])]
    kind = "notes warn" if figures.noise.noisy else "notes"
    return notes(lines, kind) + tables.cells(figures) + tables.processes(figures)


def samples(report: Report) -> str:
    """What teacher and student make of the same beginnings."""
    return "".join(
        f'<div class="sample">{"".join(_turn(role, text) for role, text in sample.lines())}</div>'
        for sample in report.samples
    )


def _turn(role: str, text: str) -> str:
    return f'<div><span class="kicker">{escape(role)}</span><pre>{escape(text)}</pre></div>'


def provenance(report: Report, missing: Sequence[str]) -> str:
    """Where the figures come from, and what they are silent about."""
    environment, timed = report.environment, report.benchmark
    seeds = report.seeds.seeds if report.seeds else (report.seed,)
    facts = [
        ("seeds", ", ".join(_fact(seed) for seed in seeds)),
        ("trained on", f"{_fact(environment.device)}, {timing_notes.counted(environment.threads, 'thread')}, "
                       f"{timing_notes.counted(environment.num_processes, 'process', 'processes')}"),
        ("timed on", _fact(timed.machine if timed else None)),
        ("Python", _fact(environment.python)),
        *environment.versions.items(),
    ]  # fmt: skip
    silent = [*report.not_measured, *missing]
    recipe = yaml.safe_dump(_plain(report.given), sort_keys=False, allow_unicode=True, width=100)
    artifacts = list(report.artifacts.items())
    return (
        notes(text.remarks(report))
        + (f"<h3>Not measured</h3>{notes(silent)}" if silent else "")
        + f"<h3>Versions and hardware</h3>{listed(facts)}"
        + details("Where the time went", _times(report))
        + details("Recipe as given", f'<pre class="code">{escape(recipe)}</pre>')
        + (details("Artifacts", plain(("step", "folder"), artifacts, "Artifacts of the run")) if artifacts else "")
    )


def _times(report: Report) -> str:
    """Seconds of each stage."""
    spent = report.seconds
    total = sum(spent.values())
    rows = [(stage, f"{seconds:.1f}", f"{seconds / total:.1%}") for stage, seconds in spent.items() if total]
    return plain(("stage", "seconds", "share"), rows, "Where the time went") if rows else ""


def _fact(fact: object) -> str:
    return "–" if fact is None else str(fact)


def _plain(node: object) -> Any:
    """What YAML can say, whatever it was."""
    if isinstance(node, Mapping):
        return {str(name): _plain(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    simple = node is None or isinstance(node, bool | int | str) or (isinstance(node, float) and math.isfinite(node))
    return node if simple else str(node)
