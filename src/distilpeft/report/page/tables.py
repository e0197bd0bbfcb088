"""The page's tables: models, comparisons, seeds, exports and the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distilpeft.planning.roles import STUDENT, export_role
from distilpeft.recipe.task import KINDS, LOWER_IS_BETTER, gap, gap_unit
from distilpeft.report import text
from distilpeft.report.figures import Arm, Benchmark, Decode, Figure, Latency, Ratio, Score
from distilpeft.report.figures import Cell as Timed
from distilpeft.report.page.markup import Cell, Column, details, plain, table
from distilpeft.report.page.svg import swatch
from distilpeft.report.plots.charts import number, spoken
from distilpeft.report.plots.markers import mark
from distilpeft.report.schema import Comparison, Model, Report
from distilpeft.report.verdict import SIGNIFICANT, is_identical, no_difference

MEGA = 1e6
Made = tuple[Column, Callable[[Model], Cell]]


def named(role: str, prefix: str = "", run: int = 0, badges: tuple[str, ...] = ()) -> Cell:
    """A model's name next to its marker."""
    return Cell(prefix + role, lead=swatch(mark(role, run)), badges=badges)


def figure(value: float | None, scale: float = 1.0, signs: int = 4) -> Cell:
    """A figure, or a dash."""
    return Cell("–") if value is None else Cell(number(value / scale, signs), value / scale)


def share(value: float | None) -> Cell:
    """A share in per cent."""
    return Cell("–") if value is None else Cell(f"{value:.1%}", value)


def interval(score: Score | Ratio | None, digits: int = 4) -> Cell:
    """A figure with its interval below it."""
    if not score:
        return Cell("–")
    low, high = score.low, score.high
    span = f"{low:.{digits - 1}f} to {high:.{digits - 1}f}" if low is not None and high is not None else ""
    return Cell(f"{score.value:.{digits}f}", score.value, span)


def models(runs: Sequence[tuple[int, str, Report]], caption: str) -> str:
    """All models of reports of one task.

    Args:
        runs: of each report its place, what its models' names begin with, and the report.
        caption: what the table is.
    """
    first = runs[0][2]
    every = [model for _, _, report in runs for model in report.models]
    used = [(column, cell) for column, cell in _model_columns(first) if any(cell(model).text != "–" for model in every)]
    rows = [
        [named(model.role, prefix, run, _badges(model.role, report)), *(cell(model) for _, cell in used)]
        for run, prefix, report in runs
        for model in report.models
    ]
    return table([Column("model", numeric=False), *(column for column, _ in used)], rows, caption, kind="models")


def _badges(role: str, report: Report) -> tuple[str, ...]:
    chosen = report.verdict.model_dump(include={"deploy", "fastest", "smallest", "best"})
    return tuple(title for title, model in chosen.items() if model == role)


def _model_columns(report: Report) -> list[Made]:
    main = report.metric
    others = [name for name in KINDS[report.task].scored if name != main]
    first = "time to first token" if KINDS[report.task].is_language_model else "latency"
    columns: list[Made] = [
        (Column(spoken(main), "with its 95 % interval"), lambda model: interval(model.scores.get(main))),
        (Column("kept", "share of the teacher's score"), lambda model: share(model.kept)),
    ]
    columns += [
        (Column(f"{name} ms", f"{first} at batch 1"), _timed(of))
        for name, of in QUANTILES.items()
        if name in ("p50", "p95", "p99")
    ]
    columns += [
        (Column("ms/token", "decoding, p50"), lambda model: figure(_per_token(model.decode))),
        (Column("rows/s", "largest batch"), lambda model: figure(model.throughput_rows_per_s)),
        (
            Column("ms from text", "p50 with encoding, at batch 1"),
            lambda model: figure(model.text_latency_ms.p50 if model.text_latency_ms else None),
        ),
        (Column("rows/s from text", "largest batch, with encoding"), lambda model: figure(model.text_rows_per_s)),
        (Column("tokens/s", "largest batch"), lambda model: figure(model.tokens_per_s)),
        (Column("size MB"), lambda model: figure(model.size_bytes or None, MEGA)),
        (Column("memory MB", "the most that a fresh process held"), lambda model: figure(model.memory_bytes, MEGA)),
        (Column("GPU MB"), lambda model: figure(model.gpu_memory_bytes, MEGA)),
        (Column("load s"), lambda model: figure(model.load_s, signs=3)),
        (Column("params M"), lambda model: figure(model.num_parameters or None, MEGA)),
        (Column("KL", "nats from the teacher"), lambda model: figure(_kl(model), signs=3)),
        (Column("same answer", "as the teacher"), lambda model: share(_same(model))),
    ]
    return columns + [(Column(spoken(name), _sense(name)), _scored(name)) for name in others]


QUANTILES: dict[str, Callable[[Latency], Figure | None]] = {
    "p50": lambda latency: latency.p50,
    "p90": lambda latency: latency.p90,
    "p95": lambda latency: latency.p95,
    "p99": lambda latency: latency.p99,
    "max": lambda latency: latency.max,
}


def _sense(metric: str) -> str:
    return "lower is better" if metric in LOWER_IS_BETTER else "higher is better"


def _timed(of: Callable[[Latency], Figure | None]) -> Callable[[Model | Timed], Cell]:
    return lambda entry: figure(of(entry.latency_ms) if entry.latency_ms else None)


def _per_token(decode: Decode | None) -> Figure | None:
    return decode.ms_per_token.p50 if decode else None


def _kl(model: Model) -> Figure | None:
    return model.against_teacher.kl if model.against_teacher else None


def _same(model: Model) -> Figure | None:
    return model.against_teacher.top1_agreement if model.against_teacher else None


def _scored(name: str) -> Callable[[Model], Cell]:
    return lambda model: figure(model.scores[name].value if name in model.scores else None)


def comparisons(report: Report) -> str:
    """Differences of two models on the same rows: of the student and the export to deploy; others on demand."""
    unit = gap_unit(report.metric)
    columns = [
        Column("pair", "the first less the second", numeric=False), Column(f"difference{',' * bool(unit)}{unit}"),
        Column("95 % low"), Column("95 % high"), Column("p"), Column("reading", numeric=False),
        Column("only first right"), Column("only second right"), Column("rows"), Column("test", numeric=False),
    ]  # fmt: skip
    shown = {STUDENT, report.verdict.deploy}
    first = [pair for pair in report.comparisons if pair.role in shown and not is_identical(pair)]
    rest = [pair for pair in report.comparisons if pair not in first]
    caption = f"Differences in {spoken(report.metric)}"
    front = table(columns, [_comparison(report, pair) for pair in first], caption) if first else ""
    if not rest:
        return front
    others = table(columns, [_comparison(report, pair) for pair in rest], f"{caption}, other pairs")
    return front + details("Other pairs", others, opened=not first)


def _comparison(report: Report, pair: Comparison) -> list[Cell]:
    reading = "significant" if pair.p_value < SIGNIFICANT else "not significant"
    if is_identical(pair):
        reading = no_difference(report, pair)
    return [
        Cell(f"{pair.role} − {pair.against}"),
        *(Cell(gap(pair.metric, value), value) for value in (pair.difference, pair.low, pair.high)),
        figure(pair.p_value, signs=2), Cell(reading), figure(pair.wins), figure(pair.losses), figure(pair.num_rows),
        Cell({"mcnemar": "McNemar, exact", "bootstrap": "paired bootstrap"}.get(pair.test or "", "–")),
    ]  # fmt: skip


def seeds(report: Report) -> str:
    """The main score of every seed."""
    if not report.seeds:
        return ""
    titles, *rows = text.seed_rows(report)
    return plain(titles, rows, f"{spoken(report.metric)} of every seed")


def groups(report: Report) -> str:
    """The main score in each group of rows."""
    if not report.groups:
        return ""
    titles, *rows = text.group_rows(report)
    return plain(titles, rows, f"{spoken(report.metric)} by {report.groups.column}")


def exports(report: Report) -> str:
    """How near each export stays to the student."""
    columns = [
        Column("export", numeric=False), Column("size MB"), Column("largest logit difference"), Column("KL", "nats"),
        Column("same answer"), Column("score kept"), Column("× student", "latency at batch 1 against PyTorch's"),
        Column("rows"), Column("way", numeric=False),
    ]  # fmt: skip
    rows = []
    for form, export in report.exports.items():
        parity = export.parity
        rows.append([
            named(export_role(form)), figure(export.size_bytes, MEGA), figure(parity.max_abs_diff, signs=2),
            figure(parity.kl, signs=2), share(parity.top1_agreement), share(parity.metric_kept),
            interval(export.speedup, 2), figure(parity.rows), Cell(export.way or "–"),
        ])  # fmt: skip
    return table(columns, rows, "Exports compared with the student") if rows else ""


def cells(benchmark: Benchmark) -> str:
    """Every model on every device with every number of threads, batch size and length."""
    timed = [(arm, cell) for arm in benchmark.arms for cell in arm.cells]
    columns: list[tuple[Column, Callable[[Arm, Timed], Cell]]] = [
        (Column("model", numeric=False), lambda arm, _: _arm(arm)),
        (Column("device", numeric=False), lambda arm, _: Cell(arm.device)),
        (Column("threads"), lambda arm, _: figure(arm.threads)),
        (Column("batch"), lambda _, cell: figure(cell.batch_size)),
        (Column("length", "tokens; data: as the rows are", numeric=False), lambda _, cell: Cell(str(cell.length))),
        *((Column(f"{name} ms"), _latency_of(of)) for name, of in QUANTILES.items()),
        (Column("rows/s"), lambda _, cell: figure(cell.rows_per_s)),
        (Column("tokens/s"), lambda _, cell: figure(cell.tokens_per_s)),
        (Column("ms/token p50"), lambda _, cell: figure(_per_token(cell.decode))),
        (Column("ms/token p95"), lambda _, cell: figure(cell.decode.ms_per_token.p95 if cell.decode else None)),
        (Column(f"× {benchmark.reference}"), lambda _, cell: interval(cell.ratio, 3)),
        (Column("× decoding"), lambda _, cell: interval(cell.decode_ratio, 3)),
        (Column("J/row"), lambda _, cell: figure(cell.joules_per_row)),
        (Column("tokens/row"), lambda _, cell: figure(cell.mean_tokens)),
        (Column("calls"), lambda _, cell: figure(cell.num_calls)),
        (Column("outliers"), lambda _, cell: figure(cell.outliers)),
        (Column("first call ms"), lambda _, cell: figure(cell.first_call_ms)),
    ]
    filled = [(column, of) for column, of in columns if any(of(*pair).text != "–" for pair in timed)]
    rows = [[of(arm, cell) for _, of in filled] for arm, cell in timed]
    return table([column for column, _ in filled], rows, "Latency and throughput") if rows else ""


def _arm(arm: Arm) -> Cell:
    return named(arm.role, badges=("compiled",) * arm.compiled)


def _latency_of(of: Callable[[Latency], Figure | None]) -> Callable[[Arm, Timed], Cell]:
    return lambda _, cell: _timed(of)(cell)


def processes(benchmark: Benchmark) -> str:
    """What the process of each model held."""
    columns = [
        Column("model", numeric=False), Column("device", numeric=False), Column("threads"), Column("load s"),
        Column("start MB"), Column("loaded MB"), Column("peak MB"), Column("GPU peak MB"),
    ]  # fmt: skip
    rows = [
        [
            _arm(arm), Cell(arm.device), figure(arm.threads), figure(arm.load_s, signs=3),
            figure(arm.rss_start_bytes, MEGA), figure(arm.rss_loaded_bytes, MEGA), figure(arm.memory_bytes, MEGA),
            figure(arm.gpu_memory_bytes, MEGA),
        ]
        for arm in benchmark.arms
    ]  # fmt: skip
    return table(columns, rows, "Processes and their memory") if rows else ""
