"""What follows from a run's figures; torch-free, see docs/report.md.

Differences and whether they may be chance, over seeds too; what to deploy; how training went; what was not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

from distilpeft.machine.artifact import LOG, Artifact
from distilpeft.metrics import significance
from distilpeft.planning.plan import Plan
from distilpeft.planning.roles import CE_ONLY, FULL, STUDENT, TEACHER, format_of, short_name
from distilpeft.recipe.task import KINDS, LOWER_IS_BETTER

WITHIN = 0.01
CURVE_POINTS = 200
SEED_PAIRS = ((STUDENT, CE_ONLY), (STUDENT, TEACHER), (CE_ONLY, TEACHER), (TEACHER, FULL))
ROWS = "rows.npz"


def kept(kind: str, value: float, teacher: float) -> float | None:
    """The share of the teacher's score that a model keeps; None of a teacher that scores nothing.

    Of a language model: the probability of the right token over the teacher's, as a geometric mean.
    """
    if KINDS[kind].language:
        return math.exp(teacher - value)
    return value / teacher if teacher else None


def curves(plan: Plan) -> dict[str, dict[str, list[float]]]:
    """Loss, grad_norm and lr over the steps of each training, as means over at most `CURVE_POINTS` stretches."""
    found = {}
    for step, made in plan.artifacts.items():
        if (made.path / LOG).is_file():
            read = [json.loads(line) for line in made.file(LOG).read_text(encoding="utf-8").splitlines()]
            lines = [line for line in read if None not in line.values()]  # but for steps that were left out
            parts = [part for part in np.array_split(np.arange(len(lines)), min(CURVE_POINTS, len(lines))) if len(part)]
            found[step] = {"step": [lines[part[-1]]["step"] for part in parts]} | {
                name: [float(f"{mean(lines[at][name] for at in part):.6g}") for part in parts]
                for name in ("loss", "grad_norm", "lr")
            }
    return found


def over_seeds(plan: Plan) -> dict[str, Any] | None:
    """Scores and differences of every seed; None of a run with one.

    Returns:
        `seeds`, `metric`, `models` (`role`, `values` by seed, `mean`, `sd`), `comparisons` (`role`, `against`,
        `differences` and `p_values` by seed; `mean`, `low`, `high`, see `paired.over_seeds`).
    """
    if not plan.repeats:
        return None
    plans = {plan.recipe.seed: plan, **plan.repeats}
    metric = plan.recipe.kind.main
    first = next(iter(plan.repeats.values()))
    models = []
    for role in first.roles():
        values = [_score(one, role, metric) for one in plans.values()]
        models.append({"role": role, "values": values, "mean": mean(values), "sd": stdev(values)})
    made = [one.artifact("compare") for one in plans.values()]
    pairs = [pair for pair in SEED_PAIRS if set(pair) <= set(first.roles())]
    return {
        "seeds": list(plans),
        "metric": metric,
        "models": models,
        "comparisons": [_pair_over_seeds(role, against, made) for role, against in pairs],
    }


def _score(plan: Plan, role: str, metric: str) -> float:
    return float(plan.artifact("evaluate", role).figures()["scores"][metric]["value"])


def _pair_over_seeds(role: str, against: str, made: Sequence[Artifact]) -> dict[str, Any]:
    """One comparison of all seeds."""
    found = [
        next(pair for pair in one.figures()["pairs"] if (pair["role"], pair["against"]) == (role, against))
        for one in made
    ]
    pairs = []
    for one in made:
        with np.load(one.file(ROWS), allow_pickle=False) as rows:
            of_role, of_other = (significance.Added(rows[name], rows[f"{name} weight"]) for name in (role, against))
            pairs.append((of_role, of_other))
    return {
        "role": role,
        "against": against,
        "differences": [pair["difference"] for pair in found],
        "p_values": [pair["p_value"] for pair in found],
        **significance.over_seeds(pairs),
    }


def groups(plan: Plan, figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """How models fare on each of `evaluate.groups`; None of a recipe without.

    Returns:
        `column`, `margin`, `scores` (role → group → metric → score), `gaps` (`role`, `group`, `num_rows`, the paired
        comparison with the teacher there, and `beyond`, how much more than on all rows).
    """
    settings = plan.recipe.evaluate
    if settings.groups is None:
        return None
    return {
        "column": settings.groups,
        "margin": settings.group_margin,
        "scores": {role: figures[f"evaluate/{role}"]["groups"] for role in plan.roles()},
        "gaps": figures["compare"]["groups"],
    }


def losing(report: Mapping[str, Any]) -> list[str]:
    """The groups that lose more by distilling than all rows do, in words."""
    found = report.get("groups")
    if found is None:
        return []
    sign = -1 if report["metric"] in LOWER_IS_BETTER else 1
    worse = [gap for gap in found["gaps"] if sign * gap["beyond"] < -found["margin"] and gap["role"] in _judged(report)]
    lines = [
        f"Warning: {found['column']} {gap['group']} loses more than the rest: {gap['role']} less teacher "
        f"{_points(gap['difference'])} on its {gap['num_rows']} rows (95 % {_points(gap['low'])} to "
        f"{_points(gap['high'])}), {_points(gap['difference'] - gap['beyond'])} on all."
        for gap in worse
    ]
    even = f"No {found['column']} loses more than {found['margin'] * 100:g} points beyond what all rows lose."
    return lines or [even]


def _judged(report: Mapping[str, Any]) -> set[str]:
    return {STUDENT, *(model["role"] for model in report["models"] if format_of(model["role"]) is not None)}


def _points(difference: float) -> str:
    return f"{difference * 100:+.2f}"


def verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """What to deploy, of the exports: the fastest that keeps 99 % of the teacher's score, the smallest, the best.

    Returns:
        `within`, the roles `fastest` (None if none is that good), `smallest` and `best`, and `sentences`.
    """
    exports = [one for one in report["models"] if format_of(one["role"]) is not None and one["latency_ms"]]
    metric = report["metric"]
    if not exports:
        return {"within": WITHIN, "fastest": None, "smallest": None, "best": None, "sentences": []}
    sign = -1 if metric in LOWER_IS_BETTER else 1

    def quick(model: Mapping[str, Any]) -> float:
        return float(model["latency_ms"]["p50"])

    good = [model for model in exports if (model["kept"] or 0) >= 1 - WITHIN]
    chosen = {
        "fastest": min(good, key=quick) if good else None,
        "smallest": min(exports, key=lambda model: (model["size_bytes"], quick(model))),
        "best": min(exports, key=lambda model: (-sign * model["scores"][metric]["value"], quick(model))),
    }
    titles = {
        "fastest": f"Fastest within {WITHIN:.0%} of the teacher",
        "smallest": "Smallest",
        "best": "Best score",
    }
    lines = []
    if not good:
        near = max(exports, key=lambda model: model["kept"] or 0)
        share = f" ({near['kept']:.2%} of its {_what(metric)})" if near["kept"] else ""
        lines.append(f"No export is within {WITHIN:.0%} of the teacher; {_name(near)} comes nearest{share}.")
    told: dict[str, list[str]] = {}
    for title, model in chosen.items():
        if model is not None:
            told.setdefault(model["role"], []).append(titles[title])
    by_role = {model["role"]: model for model in exports}
    lines += [f"{_joined(words)}: {_described(by_role[role], report)}" for role, words in told.items()]
    roles = {title: model["role"] if model else None for title, model in chosen.items()}
    return {"within": WITHIN, **roles, "sentences": lines}


def _joined(words: Sequence[str]) -> str:
    """Several titles as one."""
    first, *rest = words
    more = [word[0].lower() + word[1:] for word in rest]
    return " and ".join([", ".join([first, *more[:-1]]), *more[-1:]])


def _name(model: Mapping[str, Any]) -> str:
    return short_name(model["role"])


def _what(metric: str) -> str:
    """What a share of the teacher is a share of."""
    return "probability of the right token" if metric in LOWER_IS_BETTER else "score"


def _described(model: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What an export costs and gives, and how sure that is."""
    metric = report["metric"]
    share = f", {model['kept']:.1%} of the teacher's {_what(metric)}" if model["kept"] else ""
    pairs = [one for one in report["comparisons"] if (one["role"], one["against"]) == (model["role"], TEACHER)]
    sure = f" ({difference(pairs[0])})" if pairs else ""
    memory = f", {model['memory_bytes'] / 1e6:.0f} MB of memory" if model["memory_bytes"] else ""
    return (
        f"{_name(model)}, {model['latency_ms']['p50']:.1f} ms, {model['size_bytes'] / 1e6:.1f} MB{memory}, "
        f"{metric} {model['scores'][metric]['value']:.4f}{share}{sure}."
    )


def difference(pair: Mapping[str, Any]) -> str:
    """A comparison in words: shares in points, anything else as it is, and whether it may be chance."""
    points = pair["metric"] not in LOWER_IS_BETTER
    scale, unit = (100, " points") if points else (1, " nats" if pair["metric"] == "nats_per_token" else "")
    value, low, high = (pair[name] * scale for name in ("difference", "low", "high"))
    digits = 2 if points else 4
    p_value = pair["p_value"]
    chance = "may be chance" if p_value >= 0.05 else "more than chance"
    return f"{value:+.{digits}f}{unit}, 95 % {low:+.{digits}f} to {high:+.{digits}f}, p = {p_value:.2g}: {chance}"


def not_measured(report: Mapping[str, Any]) -> list[str]:
    """What the report is silent about, and why."""
    found, timed = [], report["benchmark"]
    if not timed["energy"]:
        found.append("energy: the machine does not tell it")
    if not any(arm["device"] == "cuda" for arm in timed["arms"]):
        found.append("latency and memory on a GPU")
    found += [f"latency of {one['role']}: {one['why']}" for one in timed["skipped"]]
    if report["seeds"] is None:
        found.append("how much another seed changes (evaluate.seeds)")
    if all(model["calibration"] is None for model in report["models"]):
        found.append("calibration curves of tokens (their ECE is in the table)")
    return found
