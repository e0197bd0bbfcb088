"""The end of a run: its report, its page with the plots as files, its links; and several runs on one page.

The page needs nothing but a browser; the plots need matplotlib (extra `report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft.machine.files import replace_link, write_json, write_text
from distilpeft.machine.locks import Lock
from distilpeft.planning.plan import Plan
from distilpeft.report import build, text
from distilpeft.report.page import page
from distilpeft.report.plots import charts, plot_files
from distilpeft.report.schema import Report

PAGE, PLOTS, EXPORTS = "report.html", "plots", "exports"
Reports = Sequence[Report]


def finish(plan: Plan) -> Report:
    """Write everything that a finished run shows; of all processes, the first one calls this.

    The report and its page; links from `exports/FORM` to the bundles (`exports/hub` to the one of several forms), and
    from `student` to the first of them.
    """
    with Lock(plan.folder, "report").held():
        report = build.build(plan)
        build.save(plan, report)
        (plan.folder / EXPORTS).mkdir(exist_ok=True)
        for step in plan.own:
            if step.stage == "bundle":
                replace_link(plan.folder / EXPORTS / step.role, f"../{step.artifact.path.name}/model")
        replace_link(plan.folder / "student", f"{EXPORTS}/{plan.recipe.export.formats[0]}")
    pages(plan.folder, [report])
    return report


def refresh(plan: Plan) -> Report:
    """Write the report and the page of a finished run again; plots and links stay as they are."""
    report = build.build(plan)
    build.save(plan, report)
    pages(plan.folder, [report], drawn=False)
    return report


def pages(folder: Path, reports: Reports, *, drawn: bool = True) -> Path:
    """Write report.html, and unless `drawn` is false the plots; returns the page's path."""
    write_text(folder / PAGE, page.render(reports))
    if drawn:
        (folder / PLOTS).mkdir(exist_ok=True)
        plot_files.write(reports, folder / PLOTS)
    return folder / PAGE


def joint(reports: Reports, out: Path, console: Console) -> None:
    """Several runs on one page, and in one table on the terminal for each metric that they are judged by.

    Args:
        reports: of the runs.
        out: the folder for report.html, report.json and the plots.
        console: where the tables go.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / build.REPORT, {"reports": [report.as_json() for report in reports]})
    where = pages(out, reports)
    called = charts.names(reports)
    for group in charts.by_metric(reports):
        console.print(_table([(called[at], reports[at]) for at in group]))
    for name, one in zip(called, reports, strict=True):
        for line in one.verdict.sentences:
            console.print(f"{name}: {line}", highlight=False, markup=False)
    console.print(f"Page: {where}", highlight=False)


def _table(reports: Sequence[tuple[str, Report]]) -> Table:
    """Every model of every run."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    first = reports[0][1]
    titles = text.columns(first)[: text.ON_TERMINAL]
    for index, title in enumerate(("run", *titles)):
        table.add_column(title, justify="left" if index < 2 else "right", no_wrap=True)
    for name, one in reports:
        for row in text.table_rows(one):
            table.add_row(name, *row[: len(titles)])
    return table
