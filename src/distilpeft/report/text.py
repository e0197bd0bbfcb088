"""The report as text: tables for the terminal and Markdown, and its sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft.data.reading import skipped_lines
from distilpeft.machine import markdown as md
from distilpeft.planning.roles import CE_ONLY, IN_WORDS, STUDENT, TEACHER, UNTRAINED
from distilpeft.recipe.export import conditions
from distilpeft.recipe.task import KINDS, gap, gap_unit
from distilpeft.report import verdict
from distilpeft.report.figures import Latency, Score
from distilpeft.report.schema import AgainstTeacher, AuditForm, QuantizationCost, Report
from distilpeft.report.timing_notes import counted, doubts, how_timed, untimed

TITLES = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "mcc": "MCC", "ece": "ECE", "log_loss": "log-loss",
    "nats_per_token": "nats/token", "perplexity": "perplexity", "bits_per_byte": "bits/byte",
    "samples_f1": "F1 by row", "micro_f1": "micro-F1", "exact_match": "exact", "r2": "R²", "pearson": "Pearson",
    "spearman": "Spearman", "rmse": "RMSE", "mae": "MAE",
    "f1": "F1", "entity_f1": "entity F1", "entity_precision": "precision", "entity_recall": "recall",
    "neighbours": "neighbours", "similarity": "similarity", "cosine": "cosine",
    "bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
}  # fmt: skip
OVER_SEEDS = (
    "Differences, in points for scores that are shares: of each seed with the p-value of its paired test; then their "
    "mean with a 95 % interval over rows and seeds."
)
ON_TERMINAL = 6  # columns that fit into 80 characters


def columns(report: Report) -> tuple[str, ...]:
    """The titles of the report's table."""
    main, *others = KINDS[report.task].scored
    kl = ("KL",) if KINDS[report.task].is_language_model else ()
    titles = tuple(TITLES[name] for name in others)
    text = ("ms from text",) if _begins_as_text(report) else ()
    return ("model", f"{TITLES[main]} (95 %)", *kl, "params", "size", "ms p50/p95", "memory", "rows/s", *text, *titles)


def _begins_as_text(report: Report) -> bool:
    """Whether rows were also timed with the encoding of their texts."""
    return any(model.text_latency_ms for model in report.models)


def table_rows(report: Report) -> list[tuple[str, ...]]:
    """The report's table, cell by cell, in the order of `columns`."""
    main, *others = KINDS[report.task].scored
    return [
        (
            model.role,
            _interval(model.scores[main]),
            *([_against(model.against_teacher)] if KINDS[report.task].is_language_model else []),
            f"{model.num_parameters / 1e6:.1f}M" if model.num_parameters else "-",
            f"{_short(model.size_bytes / 1e6)}MB" if model.size_bytes else "-",
            _pair(model.latency_ms),
            f"{_short(model.memory_bytes / 1e6)}MB" if model.memory_bytes else "-",
            f"{model.throughput_rows_per_s:.0f}" if model.throughput_rows_per_s else "-",
            *([_pair(model.text_latency_ms)] if _begins_as_text(report) else []),
            *(_value(model.scores.get(name)) for name in others),
        )
        for model in report.models
    ]


def findings(report: Report) -> list[str]:
    """What a run found out about its models."""
    lines = [*report.verdict.sentences, *_retention(report), *_gap(report), *_compared(report)]
    return [*lines, *verdict.losing(report)]


def remarks(report: Report) -> list[str]:
    """What was done with the models and the rows, and what it cost."""
    lines = []
    cost = report.quantization_cost
    if cost is not None:
        lost = -cost.lost(report.metric)
        change = (
            f"nats per token by {gap(report.metric, lost)}"
            if KINDS[report.task].is_language_model
            else f"{TITLES[report.metric]} by {verdict.amount(report.metric, lost)}"
        )
        lines.append(f"Quantizing the teacher to {cost.quantize} changed its {change} ({_apart(cost, report)}).")
    merging = report.merging_cost
    if merging is not None:
        lines.append(
            f"Merging its adapter into the dequantized base, which the student is cut from: {_apart(merging, report)}."
        )
    cut = [] if report.vocabulary is None else report.vocabulary.sentences(report.split)
    return [*lines, *cut, *_soft_targets(report), *_int8(report), *_trained(report)]


def _gap(report: Report) -> list[str]:
    """How much of the teacher's lead over labels alone the student gained."""
    closed, gap = report.ce_gap_closed, verdict.lead(report, TEACHER, verdict.on_labels(report))
    if gap is None:
        return []
    if closed is None:
        return [f"No gap to close: the teacher's lead over labels alone is not significant, {gap.words}."]
    if closed < 0:
        return ["Distilling widened the gap to the teacher compared with training on labels alone."]
    return [f"Distilling closed {closed:.0%} of the teacher's lead over labels alone, {gap.words}."]


def _trained(report: Report) -> list[str]:
    """What became of the training rows, and of the steps on them."""
    lines, rows = [], report.rows
    if not KINDS[report.task].reads_images:
        lines.append(f"{rows.truncated} of {rows.train} training rows were cut to {report.max_tokens} tokens.")
    if rows.unlabelled:
        lines.append(f"Besides {rows.train} rows with a label, the student learnt from {rows.unlabelled} without one.")
    if rows.views:
        lines.append(f"It also learnt from {rows.views} changed copies of these rows, each labelled by the teacher.")
    if rows.held_out:
        lines.append(f"{rows.held_out} rows without a label were left out: they are also in validation or test.")
    lines += [*skipped_lines(rows.skipped), *_disturbed(report)]
    shared = {pair: count for pair, count in rows.duplicates.items() if count}
    if shared:
        lines.append(
            "Texts that are in two splits: " + ", ".join(f"{pair} {count}" for pair, count in shared.items()) + "."
        )
    return lines


def _disturbed(report: Report) -> list[str]:
    """Steps of trainings that were left out or whose loss jumped."""
    lines = []
    for step, trained in report.training.items():
        if trained.skipped_steps:
            lines.append(f"{step}: {trained.skipped_steps} of {trained.steps} steps were not finite and were left out.")
        jumps = trained.loss_spikes
        if jumps:
            steps = ", ".join(map(str, jumps[:5])) + (", ..." if len(jumps) > 5 else "")
            lines.append(f"{step}: the loss jumped at step {steps} ({len(jumps)} in all); see its curve.")
    return lines


def _compared(report: Report) -> list[str]:
    """How the student differs from its teacher and from the controls: over the seeds, if there are several."""
    if report.seeds is None:
        return [
            f"The student less {IN_WORDS[pair.against]}, on the same rows: {verdict.difference(report, pair)}."
            for pair in report.comparisons
            if pair.role == STUDENT
        ]
    return [
        f"The student less {IN_WORDS[pair.against]}, over {len(report.seeds.seeds)} seeds: "
        f"{verdict.interval(report.metric, pair.mean, pair.low, pair.high)}"
        f"{', not significant' * (pair.low <= 0 <= pair.high)}."
        for pair in report.seeds.comparisons
        if pair.role == STUDENT
    ]


def seed_rows(report: Report) -> list[tuple[str, ...]]:
    """The main score of every seed, cell by cell; the first row holds the titles."""
    seeds = report.seeds
    if seeds is None:
        return []
    metric, unit = seeds.metric, gap_unit(seeds.metric)
    titles: tuple[str, ...] = ("model", *(f"seed {seed}" for seed in seeds.seeds), "mean ± sd")
    rows = [
        (model.role, *(f"{value:.4f}" for value in model.values), f"{model.mean:.4f} ± {model.sd:.4f}")
        for model in seeds.models
    ]
    gaps = [
        (
            f"{pair.role} − {pair.against}{',' * bool(unit)}{unit}",
            *(f"{gap(metric, delta)} (p {p:.2g})" for delta, p in zip(pair.differences, pair.p_values, strict=True)),
            f"{gap(metric, pair.mean)} ({gap(metric, pair.low)} to {gap(metric, pair.high)})",
        )
        for pair in seeds.comparisons
    ]
    return [titles, *rows, *gaps]


def group_rows(report: Report) -> list[tuple[str, ...]]:
    """The main score in each group, cell by cell; the first row holds the titles."""
    groups, metric = report.groups, report.metric
    if groups is None:
        return []
    roles = [role for role in (TEACHER, CE_ONLY, STUDENT) if role in groups.scores]
    unit = gap_unit(metric)
    titles = (groups.column, "rows", *roles, f"{STUDENT} − {TEACHER}{',' * bool(unit)}{unit}", "more than on all rows")
    return [titles] + [
        (
            row.group,
            str(row.num_rows),
            *(_interval(groups.scores[role][row.group][metric]) for role in roles),
            f"{gap(metric, row.difference)} ({gap(metric, row.low)} to {gap(metric, row.high)})",
            gap(metric, row.beyond),
        )
        for row in groups.gaps
        if row.role == STUDENT
    ]


def audit_rows(report: Report) -> list[tuple[str, ...]]:
    """What forms of soft targets cost, cell by cell; the first row holds the titles."""
    audit = report.soft_targets.audit if report.soft_targets else None
    if audit is None:
        return []
    titles: tuple[str, ...] = ("soft targets", "bytes/token", "bias", "spread", "cosine per token", "cosine of sum")
    return [titles] + [
        (
            form_name(form) + (" (in use)" if form.in_use else ""),
            f"{form.bytes_per_token:.1f}",
            f"{form.bias:+.4f} ± {form.standard_error:.4f}",
            f"{form.spread:.3f}",
            f"{form.cosine_per_token:.4f}",
            f"{form.cosine_of_sum:.4f}",
        )
        for form in audit.forms
    ]


def form_name(form: AuditForm) -> str:
    """A form of soft targets in two words."""
    return form.kind if form.kind == "full" else f"{form.kind} {form.count}"


def _apart(distance: AgainstTeacher | QuantizationCost, report: Report) -> str:
    """How far a model is from the teacher, in words."""
    if distance.similarity is not None:
        return (
            f"similarity {distance.similarity:.4f}, {distance.neighbours or 0:.2%} of the nearest neighbours the same"
        )
    if distance.kl is None:
        return f"its numbers are {distance.rmse:.2g} apart (RMSE), correlation {distance.pearson:.6f}"
    unit = KINDS[report.task].unit
    return f"KL {max(distance.kl, 0):.2g} nats, same answer on {distance.top1_agreement:.2%} of {unit}"


def _few(amount: float | None) -> str:
    """With a decimal only where it says something."""
    return "-" if amount is None else f"{amount:.1f}" if amount < 100 else f"{amount:,.0f}"


def _soft_targets(report: Report) -> list[str]:
    """What was kept of the teacher's distributions."""
    targets = report.soft_targets
    if targets is None or not KINDS[report.task].is_language_model:
        return []
    cost = targets.measured
    return [
        f"Soft targets on disk ({targets.why}): {_few(cost.bytes_per_token)} bytes per token, "
        f"{cost.bytes / 1e6:.1f} MB; {_few(cost.ids_per_token)} ids hold "
        f"{cost.captured_mass:.1%} of the teacher's probability."
    ]


def _int8(report: Report) -> list[str]:
    """How int8 was made, and what did not hold."""
    lines = []
    for form, export in report.exports.items():
        if export.way is not None:
            failed = ", then ".join(attempt.way for attempt in export.tried)
            rest = f"; tried before, and too far off: {failed}." if failed else ", the first way tried."
            lines.append(" ".join([f"{form}: {export.way} holds{rest}", *conditions(export.as_json())]))
    return lines


def export_rows(report: Report) -> list[tuple[str, ...]]:
    """What each export holds, cell by cell; the first row holds the titles."""
    titles: tuple[str, ...] = (
        "export",
        "size",
        "largest logit difference",
        "KL",
        "same answer",
        "score kept",
        "x student",
    )
    return [titles] + [
        (
            form,
            f"{export.size_bytes / 1e6:.1f}MB",
            f"{export.parity.max_abs_diff:.2g}",
            f"{export.parity.kl:.2g}",
            f"{export.parity.top1_agreement:.2%}" if export.parity.top1_agreement is not None else "-",
            f"{export.parity.metric_kept:.2%}",
            f"{export.speedup.value:.2f} ({export.speedup.low:.2f}-{export.speedup.high:.2f})"
            if export.speedup
            else "-",
        )
        for form, export in report.exports.items()
    ]


def _retention(report: Report) -> list[str]:
    """How near the student came to the teacher."""
    student, untrained = report.model(STUDENT), report.model(UNTRAINED)
    assert student is not None, "every run has a student"
    scored = f"{student.scores[report.metric].num_rows} {report.split}"
    share = report.student_vs_teacher
    if share is None:
        return [f"The teacher scores 0 ({scored} rows): there is nothing to keep."]
    kind = KINDS[report.task]
    if not kind.has_labels:
        return [f"Of the texts nearest to one by the teacher, {share:.1%} are so by the student too ({scored} rows)."]
    if not kind.is_language_model:
        title = TITLES[report.metric]
        return [f"The student keeps {share:.1%} of the teacher's {title} ({scored} {kind.unit})."]
    lines = [
        f"On average the student gives the right token {share:.1%} of the probability that the "
        f"teacher gives it ({scored} tokens, geometric mean)."
    ]
    before, after = (
        model.against_teacher.kl if model and model.against_teacher else None for model in (untrained, student)
    )
    if before is not None and after is not None:
        factor = f", {before / after:.1f} x less" if after > 0 else ""
        lines.append(f"KL to the teacher: {before:.3f} nats per token untrained, {after:.3f} distilled{factor}.")
    return lines


def markdown(report: Report) -> str:
    """The report as Markdown."""
    lines = [f"# {report.recipe}", "", "## What we found", "", *_listed(findings(report)), "", "## Models", ""]
    lines += md.table([columns(report), *table_rows(report)])
    lines += ["", *_listed(noise)] if (noise := doubts(report.benchmark)) else []
    seeds = seed_rows(report)
    if seeds:
        lines += ["", f"## {report.metric} over seeds", "", OVER_SEEDS, "", *md.table(seeds)]
    if report.groups is not None:
        title = f"## {report.metric} by {md.plain(report.groups.column)}"
        lines += ["", title, "", *md.table(group_rows(report))]
    audit = report.soft_targets.audit if report.soft_targets else None
    if audit is not None:
        lines += ["", "## What soft targets on disk cost", ""]
        lines += [f"Against the full distribution on {audit.positions} validation tokens, where the divergence is "
                  f"{audit.loss_per_token:.4f} nats per token. Bias and spread (standard deviation) are per token; "
                  "cosines are between gradients for the student's logits.", ""]  # fmt: skip
        lines += md.table(audit_rows(report))
    lines += ["", "## Exports", "", "Each was opened in its own runtime, in a process of its own, and compared with "
              "the student on validation rows; x: latency of the student in PyTorch at batch 1 over "
              "its own, with a 95 % interval.", ""]  # fmt: skip
    lines += md.table(export_rows(report))
    tried = [(form, one) for form, export in report.exports.items() for one in export.tried]
    lines += ["", *_listed([f"{form}, {one.way}: {'; '.join(one.faults)}" for form, one in tried])] if tried else []
    for sample in report.samples:
        lines += ["", "### Sample", "", *(f"- {role}: {md.code(text)}" for role, text in sample.lines())]
    lines += ["", "## About this run", "", *_listed(remarks(report)), "", *_measurement(report)]
    return "\n".join(lines) + "\n"


def _listed(lines: Sequence[str]) -> list[str]:
    """Sentences as a list in Markdown."""
    return [f"- {md.plain(line)}" for line in lines]


def _measurement(report: Report) -> list[str]:
    """Where the figures were measured, and which were not."""
    environment = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    where = f"{environment.device}, {counted(environment.threads, 'thread')}"
    notes = [how_timed(report.benchmark), *untimed(report.benchmark)] if report.benchmark else []
    lines = [f"Measured on {where}; Python {environment.python}, {versions}.", "", *notes, ""]
    return [md.plain(line) for line in (*lines, f"Not measured: {'; '.join(report.not_measured)}.")]


def show(report: Report, console: Console) -> None:
    """Print the table and what it means."""
    layout: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(title=report.recipe, title_justify="left", **layout)
    width = ON_TERMINAL
    for index, column in enumerate(columns(report)[:width]):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in table_rows(report):
        table.add_row(*row[:width], style="bold" if row[0] == STUDENT else None)
    console.print(table)
    lines = [*doubts(report.benchmark), *findings(report)]
    # how latencies were measured is in the files
    for line in [*lines, "", "About this run:", *remarks(report), *untimed(report.benchmark)]:
        console.print(line, highlight=False, markup=False)


def _interval(score: Score) -> str:
    digits = 2 if score.value < 10 else 1  # as wide, whatever the unit
    value = f"{score.value:.{digits + 2}f}"
    return value if score.low is None else f"{value} ({score.low:.{digits}f}-{score.high:.{digits}f})"


def _against(distance: AgainstTeacher | None) -> str:
    if distance is None or distance.kl is None:
        return "-"
    return f"{distance.kl:.4f}" if distance.kl < 10 else f"{distance.kl:.3f}"


def _value(score: Score | None) -> str:
    return f"{score.value:.4f}" if score else "-"


def _pair(latency: Latency | None) -> str:
    return f"{_short(latency.p50)}/{_short(latency.p95)}" if latency else "-"


def _short(value: float) -> str:
    """One decimal, or none where the number is long enough without."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
