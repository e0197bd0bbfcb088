"""The page's tables: models, comparisons, seeds, exports and the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distilpeft.planning.roles import export_role
from distilpeft.recipe.task import KINDS, LOWER_IS_BETTER
from distilpeft.report import text
from distilpeft.report.charts import Model, Report, number, spoken
from distilpeft.report.markers import mark
from distilpeft.report.page.markup import Cell, Column, plain, table
from distilpeft.report.page.svg import swatch

MEGA = 1e6
Made = tuple[Column, Callable[[Model], Cell]]


def named(role: str, prefix: str = "", run: int = 0, badges: tuple[str, ...] = ()) -> Cell:
    """A model's name beside its marker."""
    return Cell(prefix + role, lead=swatch(mark(role, run)), badges=badges)


def figure(value: float | None, scale: float = 1.0, signs: int = 4) -> Cell:
    """A figure, or a dash."""
    return Cell("–") if value is None else Cell(number(value / scale, signs), value / scale)


def share(value: float | None) -> Cell:
    """A share in per cent."""
    return Cell("–") if value is None else Cell(f"{value:.1%}", value)


def interval(found: dict[str, Any] | None, digits: int = 4) -> Cell:
    """A figure with its interval below it."""
    if not found or found.get("value") is None:
        return Cell("–")
    low, high = found.get("low"), found.get("high")
    span = f"{low:.{digits - 1}f} to {high:.{digits - 1}f}" if low is not None and high is not None else ""
    return Cell(f"{found['value']:.{digits}f}", found["value"], span)


def models(runs: Sequence[tuple[int, str, Report]], caption: str) -> str:
    """All models of reports of one task.

    Args:
        runs: of each report its place, what its models' names begin with, and the report.
        caption: what the table is.
    """
    first = runs[0][2]
    every = [model for _, _, report in runs for model in report["models"]]
    made = [(column, cell) for column, cell in _model_columns(first) if any(cell(model).text != "–" for model in every)]
    rows = [
        [named(model["role"], prefix, run, _badges(model["role"], report)), *(cell(model) for _, cell in made)]
        for run, prefix, report in runs
        for model in report["models"]
    ]
    return table([Column("model", numeric=False), *(column for column, _ in made)], rows, caption, kind="models")


def _badges(role: str, report: Report) -> tuple[str, ...]:
    verdict = report.get("verdict") or {}
    return tuple(title for title in ("fastest", "smallest", "best") if verdict.get(title) == role)


def _model_columns(report: Report) -> list[Made]:
    main = report["metric"]
    others = [name for name in KINDS[report["task"]].scored if name != main]
    first = "time to first token" if KINDS[report["task"]].language else "latency"
    columns: list[Made] = [
        (Column(spoken(main), "with its 95 % interval"), lambda model: interval(model["scores"].get(main))),
        (Column("kept", "share of the teacher's score"), lambda model: share(model.get("kept"))),
    ]
    columns += [
        (Column(f"{name} ms", f"{first} at batch 1"), _timed(name)) for name in ("p50", "p95", "p99")
    ]  # fmt: skip
    columns += [
        (Column("ms/token", "decoding, p50"), lambda model: figure(_inner(model, "decode", "ms_per_token", "p50"))),
        (Column("rows/s", "largest batch"), lambda model: figure(model.get("throughput_rows_per_s"))),
        (Column("tokens/s", "largest batch"), lambda model: figure(model.get("tokens_per_s"))),
        (Column("size MB"), lambda model: figure(model.get("size_bytes") or None, MEGA)),
        (Column("memory MB", "the most that a fresh process held"), _bytes("memory_bytes")),
        (Column("GPU MB"), _bytes("gpu_memory_bytes")),
        (Column("load s"), lambda model: figure(model.get("load_s"), signs=3)),
        (Column("params M"), lambda model: figure(model.get("num_parameters") or None, MEGA)),
        (Column("KL", "nats from the teacher"), lambda model: figure(_inner(model, "against_teacher", "kl"), signs=3)),
        (
            Column("same answer", "as the teacher"),
            lambda model: share(_inner(model, "against_teacher", "top1_agreement")),
        ),
    ]
    return columns + [(Column(spoken(name), _sense(name)), _scored(name)) for name in others]


def _sense(metric: str) -> str:
    return "lower is better" if metric in LOWER_IS_BETTER else "higher is better"


def _inner(found: Any, *path: str) -> Any:
    """What lies along the path, or None."""
    for name in path:
        found = (found or {}).get(name)
    return found


def _timed(name: str) -> Callable[[Model], Cell]:
    return lambda model: figure(_inner(model, "latency_ms", name))


def _bytes(name: str) -> Callable[[Model], Cell]:
    return lambda model: figure(model.get(name), MEGA)


def _scored(name: str) -> Callable[[Model], Cell]:
    return lambda model: figure(_inner(model, "scores", name, "value"))


def comparisons(report: Report) -> str:
    """Differences of two models on the same rows."""
    columns = [
        Column("pair", "the first less the second", numeric=False), Column("difference"), Column("95 % low"),
        Column("95 % high"), Column("p"), Column("reading", numeric=False), Column("only first right"),
        Column("only second right"), Column("rows"), Column("test", numeric=False),
    ]  # fmt: skip
    rows = [_comparison(pair) for pair in report.get("comparisons") or ()]
    return table(columns, rows, f"Differences in {spoken(report['metric'])}") if rows else ""


def _comparison(pair: dict[str, Any]) -> list[Cell]:
    p_value = pair.get("p_value")
    reading = "–" if p_value is None else "more than chance" if p_value < 0.05 else "may be chance"
    signed = [Cell("–") if pair.get(name) is None else Cell(f"{pair[name]:+.4f}", pair[name])
              for name in ("difference", "low", "high")]  # fmt: skip
    return [
        Cell(f"{pair['role']} − {pair['against']}"), *signed, figure(p_value, signs=2), Cell(reading),
        figure(pair.get("wins")), figure(pair.get("losses")), figure(pair.get("num_rows")),
        Cell({"mcnemar": "McNemar, exact", "bootstrap": "paired bootstrap"}.get(pair.get("test", ""), "–")),
    ]  # fmt: skip


def seeds(report: Report) -> str:
    """The main score of every seed."""
    if not report.get("seeds"):
        return ""
    titles, *rows = text.seed_rows(dict(report))
    return plain(titles, rows, f"{spoken(report['metric'])} of every seed")


def groups(report: Report) -> str:
    """The main score in each group of rows."""
    if not report.get("groups"):
        return ""
    titles, *rows = text.group_rows(dict(report))
    return plain(titles, rows, f"{spoken(report['metric'])} by {report['groups']['column']}")


def exports(report: Report) -> str:
    """How near each export stays to the student."""
    columns = [
        Column("export", numeric=False), Column("size MB"), Column("largest logit difference"), Column("KL", "nats"),
        Column("same answer"), Column("score kept"), Column("× student", "latency at batch 1 against PyTorch's"),
        Column("rows"), Column("way", numeric=False),
    ]  # fmt: skip
    rows = []
    for form, made in (report.get("exports") or {}).items():
        parity = made.get("parity") or {}
        rows.append([
            named(export_role(form)), figure(made.get("size_bytes"), MEGA), figure(parity.get("max_abs_diff"), signs=2),
            figure(parity.get("kl"), signs=2), share(parity.get("top1_agreement")), share(parity.get("metric_kept")),
            interval(made.get("speedup"), 2), figure(parity.get("rows")), Cell(made.get("way") or "–"),
        ])  # fmt: skip
    return table(columns, rows, "Exports held against the student") if rows else ""


def cells(found: dict[str, Any]) -> str:
    """Every model on every device with every number of threads, batch size and length."""
    timed = [(arm, cell) for arm in found.get("arms") or () for cell in arm.get("cells") or ()]
    columns: list[tuple[Column, Callable[[dict[str, Any], dict[str, Any]], Cell]]] = [
        (Column("model", numeric=False), lambda arm, _: _arm(arm)),
        (Column("device", numeric=False), lambda arm, _: Cell(arm.get("device") or "–")),
        (Column("threads"), lambda arm, _: figure(arm.get("threads"))),
        (Column("batch"), lambda _, cell: figure(cell.get("batch_size"))),
        (
            Column("length", "tokens; data: as the rows are", numeric=False),
            lambda _, cell: Cell(str(cell.get("length", "–"))),
        ),
        *((Column(f"{name} ms"), _cell_of("latency_ms", name)) for name in ("p50", "p90", "p95", "p99", "max")),
        (Column("rows/s"), _cell_of("rows_per_s")),
        (Column("tokens/s"), _cell_of("tokens_per_s")),
        (Column("ms/token p50"), _cell_of("decode", "ms_per_token", "p50")),
        (Column("ms/token p95"), _cell_of("decode", "ms_per_token", "p95")),
        (Column(f"× {found.get('reference', 'reference')}"), lambda _, cell: interval(cell.get("ratio"), 3)),
        (Column("× decoding"), lambda _, cell: interval(cell.get("decode_ratio"), 3)),
        (Column("J/row"), _cell_of("joules_per_row")),
        (Column("tokens/row"), _cell_of("mean_tokens")),
        (Column("calls"), _cell_of("num_calls")),
        (Column("outliers"), _cell_of("outliers")),
        (Column("first call ms"), _cell_of("first_call_ms")),
    ]  # fmt: skip
    filled = [(column, of) for column, of in columns if any(of(*one).text != "–" for one in timed)]
    rows = [[of(arm, cell) for _, of in filled] for arm, cell in timed]
    return table([column for column, _ in filled], rows, "Latency and throughput") if rows else ""


def _arm(arm: dict[str, Any]) -> Cell:
    return named(arm["role"], badges=("compiled",) * bool(arm.get("compiled")))


def _cell_of(*path: str) -> Callable[[dict[str, Any], dict[str, Any]], Cell]:
    return lambda _, cell: figure(_inner(cell, *path))


def processes(found: dict[str, Any]) -> str:
    """What the process of each model held."""
    columns = [
        Column("model", numeric=False), Column("device", numeric=False), Column("threads"), Column("load s"),
        Column("start MB"), Column("loaded MB"), Column("peak MB"), Column("GPU peak MB"),
    ]  # fmt: skip
    held = ("rss_start_bytes", "rss_loaded_bytes", "memory_bytes", "gpu_memory_bytes")
    rows = [
        [
            _arm(arm), Cell(arm.get("device") or "–"),
            figure(arm.get("threads")), figure(arm.get("load_s"), signs=3),
            *(figure(arm.get(name), MEGA) for name in held),
        ]
        for arm in found.get("arms") or ()
    ]  # fmt: skip
    return table(columns, rows, "Processes and their memory") if rows else ""
