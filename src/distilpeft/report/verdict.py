"""What follows from a run's figures; torch-free, see docs/report.md.

Differences and whether they are significant, over seeds too; how training went; what was not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

from distilpeft.machine.artifact import LOG, Artifact
from distilpeft.metrics import significance
from distilpeft.planning.plan import Plan
from distilpeft.planning.roles import CE_LONG, CE_ONLY, COMPARED, STUDENT, TEACHER
from distilpeft.recipe.task import KINDS, LOWER_IS_BETTER, gap, gap_unit
from distilpeft.report.figures import Figure
from distilpeft.report.schema import (
    Comparison,
    Curve,
    Groups,
    Report,
    SeedComparison,
    SeedModel,
    Seeds,
)

SIGNIFICANT = 0.05
"""The p-value below which a difference is called significant."""
CURVE_POINTS = 200
SEED_PAIRS = tuple((role, other) for role, others in COMPARED.items() for other in others)
ROWS = "rows.npz"


def kept(kind: str, value: float, teacher: float) -> float | None:
    """The share of the teacher's score that a model keeps; None of a teacher that scores nothing.

    Of a language model: the probability of the right token over the teacher's, as a geometric mean.
    """
    if KINDS[kind].is_language_model:
        return math.exp(teacher - value)
    return value / teacher if teacher else None


def curves(plan: Plan) -> dict[str, Curve]:
    """Loss, grad_norm and lr over the steps of each training, as means over at most `CURVE_POINTS` stretches."""
    by_step = {}
    for step, artifact in plan.artifacts.items():
        if (artifact.path / LOG).is_file():
            read = [json.loads(line) for line in artifact.file(LOG).read_text(encoding="utf-8").splitlines()]
            lines = [line for line in read if None not in line.values()]  # but for steps that were left out
            parts = [part for part in np.array_split(np.arange(len(lines)), min(CURVE_POINTS, len(lines))) if len(part)]
            means = {
                name: tuple(float(f"{mean(lines[at][name] for at in part):.6g}") for part in parts)
                for name in ("loss", "grad_norm", "lr")
            }
            by_step[step] = Curve(step=tuple(lines[part[-1]]["step"] for part in parts), **means)
    return by_step


def over_seeds(plan: Plan) -> Seeds | None:
    """Scores and differences of every seed; None for a run with one seed."""
    if not plan.repeats:
        return None
    plans = {plan.recipe.seed: plan, **plan.repeats}
    metric = plan.recipe.kind.main
    first = next(iter(plan.repeats.values()))
    models = []
    for role in first.roles():
        values = tuple(_score(seed_plan, role, metric) for seed_plan in plans.values())
        models.append(SeedModel(role=role, values=values, mean=mean(values), sd=stdev(values)))
    artifacts = [seed_plan.artifact("compare") for seed_plan in plans.values()]
    pairs = [pair for pair in SEED_PAIRS if set(pair) <= set(first.roles())]
    return Seeds(
        seeds=tuple(plans),
        metric=metric,
        models=tuple(models),
        comparisons=tuple(_pair_over_seeds(role, against, artifacts) for role, against in pairs),
    )


def _score(plan: Plan, role: str, metric: str) -> float:
    return float(plan.artifact("evaluate", role).figures()["scores"][metric]["value"])


def _pair_over_seeds(role: str, against: str, artifacts: Sequence[Artifact]) -> SeedComparison:
    """One comparison of all seeds."""
    entries = [
        next(pair for pair in artifact.figures()["pairs"] if (pair["role"], pair["against"]) == (role, against))
        for artifact in artifacts
    ]
    pairs = []
    for artifact in artifacts:
        with np.load(artifact.file(ROWS), allow_pickle=False) as rows:
            of_role, of_other = (significance.Added(rows[name], rows[f"{name} weight"]) for name in (role, against))
            pairs.append((of_role, of_other))
    return SeedComparison(
        role=role,
        against=against,
        differences=tuple(pair["difference"] for pair in entries),
        p_values=tuple(pair["p_value"] for pair in entries),
        **significance.over_seeds(pairs),
    )


def groups(plan: Plan, figures: Mapping[str, Any]) -> Groups | None:
    """Scores of every model in each of `evaluate.groups`; None for a recipe without groups."""
    settings = plan.recipe.evaluate
    if settings.groups is None:
        return None
    return Groups(
        column=settings.groups,
        margin=settings.group_margin,
        scores={role: figures[f"evaluate/{role}"]["groups"] for role in plan.roles()},
        gaps=figures["compare"]["groups"],
    )


def losing(report: Report) -> list[str]:
    """The groups that lose more by distilling than all rows do, in words."""
    figures = report.groups
    if figures is None:
        return []
    sign = -1 if report.metric in LOWER_IS_BETTER else 1
    judged = {STUDENT, *(model.role for model in report.models if model.is_export)}
    worse = [loss for loss in figures.gaps if sign * loss.beyond < -figures.margin and loss.role in judged]
    alike: dict[tuple[str, str], list[str]] = {}
    for loss in worse:
        lost = (
            f"{interval(report.metric, loss.difference, loss.low, loss.high)}, on its {loss.num_rows} rows; "
            f"{amount(report.metric, loss.difference - loss.beyond)} on all"
        )
        alike.setdefault((loss.group, lost), []).append(loss.role)
    lines = [
        f"Warning: {figures.column} {group} loses more than the rest: {', '.join(roles)} less teacher {lost}."
        for (group, lost), roles in alike.items()
    ]
    even = f"No {figures.column} loses more than {figures.margin * 100:g} points beyond what all rows lose."
    return lines or [even]


@dataclass(frozen=True)
class Lead:
    """How far one model is ahead of another, with a 95 % interval over rows, and over seeds if there are several."""

    value: Figure
    low: Figure
    high: Figure
    metric: str
    seeds: int

    @property
    def amount(self) -> str:
        """How large it is, whichever model leads: in points, or in what the metric is counted in."""
        return amount(self.metric, abs(self.value)).removeprefix("+")

    @property
    def words(self) -> str:
        """The lead with its sign and interval."""
        over = f" over {self.seeds} seeds" if self.seeds > 1 else ""
        between = f"{gap(self.metric, self.low)} to {gap(self.metric, self.high)}"
        return f"{amount(self.metric, self.value)} (95 % {between}{over})"


def lead(report: Report, role: str, against: str) -> Lead | None:
    """How much better one model is than another; positive is better, whatever the metric. None if not compared."""
    sign = -1 if report.metric in LOWER_IS_BETTER else 1
    turn = {(role, against): sign, (against, role): -sign}
    seeds = 1 if report.seeds is None else len(report.seeds.seeds)
    many = () if report.seeds is None else report.seeds.comparisons
    figures = [(pair.mean, pair.low, pair.high, turn.get((pair.role, pair.against))) for pair in many]
    if seeds == 1:
        pairs = report.comparisons
        figures = [(pair.difference, pair.low, pair.high, turn.get((pair.role, pair.against))) for pair in pairs]
    for value, low, high, turned in figures:
        if turned is not None:
            worse, better = sorted((turned * low, turned * high))
            return Lead(turned * value, worse, better, report.metric, seeds)
    return None


def on_labels(report: Report) -> str:
    """The better student of those that learnt from labels alone: for its own epochs, or for as long as the student."""
    sign = -1 if report.metric in LOWER_IS_BETTER else 1
    many = () if report.seeds is None else report.seeds.models
    scores = {model.role: model.mean for model in many} or {
        model.role: model.scores[report.metric].value for model in report.models
    }
    return max(
        (role for role in (CE_ONLY, CE_LONG) if role in scores), key=lambda role: sign * scores[role], default=""
    )


def gap_closed(report: Report) -> float | None:
    """The share of the teacher's lead over labels alone that distilling gained; None where the lead may be chance."""
    gap, gain = (lead(report, role, on_labels(report)) for role in (TEACHER, STUDENT))
    if gap is None or gain is None or gap.low <= 0:
        return None
    return gain.value / gap.value


def difference(report: Report, pair: Comparison) -> str:
    """A comparison in words: shares in points, anything else unchanged, and whether it is significant."""
    if is_identical(pair):
        return no_difference(report, pair)
    sure = "significant" if pair.p_value < SIGNIFICANT else "not significant"
    return f"{interval(pair.metric, pair.difference, pair.low, pair.high)}, p = {pair.p_value:.2g}, {sure}"


def amount(metric: str, value: Figure) -> str:
    """A difference with its unit."""
    return f"{gap(metric, value)}{gap_unit(metric)}"


def interval(metric: str, value: Figure, low: Figure, high: Figure) -> str:
    """A difference with its unit and its 95 % interval."""
    return f"{amount(metric, value)}, 95 % {gap(metric, low)} to {gap(metric, high)}"


def is_identical(pair: Comparison) -> bool:
    """Whether two models do not differ in the score of any row that was compared."""
    return not (pair.wins or pair.losses or pair.difference or pair.low or pair.high)


def no_difference(report: Report, pair: Comparison) -> str:
    """Two models whose rows score the same, in words. Of more than two classes, two wrong answers may still differ."""
    rows = f"all {pair.num_rows} rows" if pair.num_rows else "all rows"
    if pair.test == "bootstrap":
        return f"identical scores on {rows}"
    labels = report.settings.get("task", {}).get("labels", ())
    return f"identical answers on {rows}" if len(labels) == 2 else f"right and wrong on the same rows, of {rows}"


def not_measured(report: Report) -> list[str]:
    """What the report is silent about, and why."""
    lines: list[str] = []
    if report.benchmark is not None:
        if not report.benchmark.energy:
            lines.append("energy: no counters available on this machine")
        if not any(arm.device == "cuda" for arm in report.benchmark.arms):
            lines.append("latency and memory on a GPU")
        lines += [f"latency of {entry.role}: {entry.why}" for entry in report.benchmark.skipped]
    if report.seeds is None:
        lines.append("how much another seed changes (evaluate.seeds)")
    if all(model.calibration is None for model in report.models):
        lines.append("calibration curves of tokens (their ECE is in the table)")
    return lines
