"""What to deploy, what distilling gave, and what to try next: the first lines of a report. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from distilpeft.planning.roles import STUDENT, TEACHER
from distilpeft.recipe.task import KINDS, LOWER_IS_BETTER
from distilpeft.report.figures import Figure
from distilpeft.report.schema import Model, Report, Verdict
from distilpeft.report.verdict import SIGNIFICANT, difference, lead, on_labels

WITHIN = 0.01
NAMES = {"ece": "ECE", "log_loss": "log-loss"}
"""Scores of probabilities, which distilling changes even where it changes no answer; lower is better."""


@dataclass(frozen=True)
class _Candidate:
    """An export that was timed."""

    model: Model
    p50: Figure

    @property
    def size_bytes(self) -> Figure:
        return self.model.size_bytes or 0

    @property
    def cost(self) -> tuple[Figure, Figure]:
        """Ties are broken by speed, then by size."""
        return self.p50, self.size_bytes


def verdict(report: Report) -> Verdict:
    """The export to deploy, and those that are the fastest within 1 % of the teacher, the smallest, and the best.

    To deploy is the fastest that keeps 99 % of the teacher's score; if none does, the fastest of those that are not
    significantly worse than the student that they are made from; else the best.
    """
    exports = [_Candidate(one, one.latency_ms.p50) for one in report.models if one.is_export and one.latency_ms]
    gave, following = gain(report), next_steps(report)
    if not exports:
        return Verdict(within=WITHIN, sentences=(*gave, *following))
    sign = -1 if report.metric in LOWER_IS_BETTER else 1
    good = [export for export in exports if (export.model.kept or 0) >= 1 - WITHIN]
    fastest = min(good, key=lambda export: export.cost) if good else None
    smallest = min(exports, key=lambda export: (export.size_bytes, export.p50))
    best = min(exports, key=lambda export: (-sign * export.model.scores[report.metric].value, *export.cost))
    equal = [export for export in exports if not _is_worse(export, report)]
    chosen = fastest or (min(equal, key=lambda export: export.cost) if equal else best)
    deployed = _deployed(chosen, report)
    # A student on labels alone that is better comes before any export of the other one.
    lines = [*gave, deployed, *following] if _better_on_labels(report) else [deployed, *gave, *following]
    for title, export in (("Smallest", smallest), ("Best score", best)):
        if export is not chosen:
            lines.append(f"{title}: {_described(export, report)}")
    return Verdict(
        within=WITHIN,
        deploy=chosen.model.role,
        fastest=fastest.model.role if fastest else None,
        smallest=smallest.model.role,
        best=best.model.role,
        sentences=tuple(lines),
    )


def _exported(report: Report) -> str:
    """The student that the exports are of."""
    return str(report.given.get("export", {}).get("of", STUDENT))


def _better_on_labels(report: Report) -> str | None:
    """The student on labels alone that is significantly better than the one that is exported, if there is one."""
    role = on_labels(report)
    gap = lead(report, STUDENT, role)
    return role if gap is not None and gap.high < 0 and _exported(report) != role else None


def _is_worse(export: _Candidate, report: Report) -> bool:
    """Whether an export is significantly worse than its student; if that was not compared, any loss counts."""
    sign = -1 if report.metric in LOWER_IS_BETTER else 1
    for pair in report.comparisons:
        if (pair.role, pair.against) == (export.model.role, _exported(report)):
            return sign * pair.difference < 0 and pair.p_value < SIGNIFICANT
    scores = [sign * model.scores[report.metric].value for model in report.models if model.is_export]
    return sign * export.model.scores[report.metric].value < max(scores)


def _deployed(export: _Candidate, report: Report) -> str:
    """One positive sentence, and its price."""
    model, teacher, metric = export.model, report.model(TEACHER), report.metric
    parts = [f"{metric} {model.scores[metric].value:.4f}"]
    if teacher is not None and teacher.latency_ms is not None:
        ratio = teacher.latency_ms.p50 / max(export.p50, 1e-9)
        parts.append(f"{_times(ratio)} as fast as the teacher{_doubt(report)}")
    if teacher is not None and teacher.size_bytes and export.size_bytes:
        ratio = teacher.size_bytes / export.size_bytes
        parts.append(f"{_times(ratio)} smaller" if ratio >= 1 else f"{_times(1 / ratio)} larger")
    if model.kept:
        parts.append(f"{model.kept:.1%} of its {_what(metric)}{_sure(export, report)}")
    first = "The best of this run's exports is" if _better_on_labels(report) else "Deploy"
    return f"{first} {model.name}: {', '.join(parts)}."


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _described(export: _Candidate, report: Report) -> str:
    """What another export costs and gives."""
    model, metric = export.model, report.metric
    share = f", {model.kept:.1%} of the teacher's {_what(metric)}" if model.kept else ""
    memory = f", {model.memory_bytes / 1e6:.0f} MB of memory" if model.memory_bytes else ""
    return (
        f"{model.name}, {export.p50:.1f} ms{_doubt(report)}, {export.size_bytes / 1e6:.1f} MB{memory}, "
        f"{metric} {model.scores[metric].value:.4f}{share}{_sure(export, report)}."
    )


def _doubt(report: Report) -> str:
    """What speaks against a latency, in brackets."""
    return " (on a noisy machine)" if report.benchmark is not None and report.benchmark.noise.noisy else ""


def _sure(export: _Candidate, report: Report) -> str:
    """How sure the distance from the teacher is, in brackets."""
    pairs = [pair for pair in report.comparisons if (pair.role, pair.against) == (export.model.role, TEACHER)]
    return f" ({difference(report, pairs[0])})" if pairs else ""


def _what(metric: str) -> str:
    """What a share of the teacher is a share of."""
    return "probability of the right token" if metric in LOWER_IS_BETTER else metric.replace("_", " ")


def gain(report: Report) -> list[str]:
    """What distilling gave over the same student trained on labels alone, in score and in calibration."""
    role = on_labels(report)
    gap = lead(report, STUDENT, role)
    if gap is None:
        return []
    if gap.low > 0:
        line = f"Distilling gained {gap.words} over the same student trained on labels alone."
    elif gap.high < 0:
        way = f"Deploy {role}: export.of: {role} exports it" if _better_on_labels(report) else "It is exported"
        line = (
            f"Labels alone train a better student here: distilling changed its {report.metric} by {gap.words}. {way}."
        )
    else:
        line = (
            f"Distilling gained nothing significant: {gap.words} compared with the same student trained on labels "
            "alone."
        )
    student, alone = report.model(STUDENT), report.model(role)
    changes = []
    if student is not None and alone is not None:
        for metric, name in NAMES.items():
            if metric in student.scores and metric in alone.scores:
                now, before = (f"{model.scores[metric].value:.3f}" for model in (student, alone))
                changes += [f"{name} is {now} instead of {before}"] if now != before else []
    return [line, *([f"{' and '.join(changes)} on labels alone."] if changes else [])]


def next_steps(report: Report) -> list[str]:
    """What is most likely to help, judged by the figures; nothing without labels to compare with."""
    gap, behind = lead(report, TEACHER, on_labels(report)), lead(report, STUDENT, TEACHER)
    if gap is None or behind is None:
        return []
    text = "text without labels (data.unlabelled)" if not report.rows.unlabelled else "more text without labels"
    text = text if not KINDS[report.task].reads_images else text.replace("text", "pictures")
    if _is_perfect(report, STUDENT) and _is_perfect(report, on_labels(report)):
        return ["Next: more or harder test rows. On these, the student is perfect with labels alone, too."]
    if gap.low <= 0:
        return [
            "Next: a better teacher (more epochs, all of its weights, a larger base). This one is not significantly "
            "ahead of the student trained on labels alone."
        ]
    if behind.high < 0:
        return [f"Next: {text}, more epochs or more layers. The teacher is still ahead by {behind.amount}."]
    if not report.rows.unlabelled:
        return [f"Next: {text}. It is what distilling gains most from."]
    return ["Next: a better teacher. The student has reached this one, as far as these rows show."]


def _is_perfect(report: Report, role: str) -> bool:
    """Whether no model could score better on the test rows, with any seed."""
    many = () if report.seeds is None else report.seeds.models
    values = [value for entry in many if entry.role == role for value in entry.values]
    model = report.model(role)
    if not values and model is not None:
        values = [model.scores[report.metric].value]
    best = 0.0 if report.metric in LOWER_IS_BETTER else 1.0
    return bool(values) and all(value == best for value in values)
