"""The report: what every model scores, weighs and costs, as JSON, Markdown and a table on the terminal.

Torch-free; it only joins the figures in the manifests. `report.json` is described in docs/report.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distilpeft.errors import InputError
from distilpeft.machine.files import read_sealed, replace_link, sealed, write_json, write_text
from distilpeft.machine.locks import Lock
from distilpeft.metrics.timings import summary
from distilpeft.planning.plan import Plan
from distilpeft.planning.roles import CE_ONLY, FULL, MAJORITY, MERGED, STUDENT, TEACHER, UNTRAINED
from distilpeft.recipe.task import KINDS, LOWER_IS_BETTER
from distilpeft.report import verdict
from distilpeft.report.text import markdown

ORDER = (MAJORITY, UNTRAINED, CE_ONLY, STUDENT, TEACHER, FULL, MERGED)
EXPORTS = "exports"
TIMED = ("throughput_rows_per_s", "tokens_per_s", "decode", "memory_bytes", "gpu_memory_bytes", "load_s")
TRAINING = ("steps", "rows", "seconds", "rows_per_s", "precision", "kept_step", "validations", "skipped_steps",
            "loss_spikes")  # fmt: skip


def build(plan: Plan) -> dict[str, Any]:
    """Join the figures of a finished run."""
    figures = {step: made.figures() for step, made in plan.artifacts.items()}
    roles = sorted(plan.roles(), key=lambda role: ORDER.index(role) if role in ORDER else len(ORDER))
    models = [_model(role, figures) for role in roles]
    exports = {form: _export(form, figures) for form in plan.recipe.export.formats}
    kind = plan.recipe.task.kind
    main = KINDS[kind].main
    score = {model["role"]: model["scores"][main]["value"] for model in models}
    for model in models:
        model["kept"] = verdict.kept(kind, score[model["role"]], score[TEACHER])
    teacher, student, ce_only = score[TEACHER], score[STUDENT], score.get(CE_ONLY)
    sign = -1 if main in LOWER_IS_BETTER else 1
    gap = sign * (teacher - ce_only) if ce_only is not None else 0.0
    tuned = figures["teacher"]
    report = {
        "recipe": plan.recipe.name,
        "seed": plan.recipe.seed,
        "split": plan.recipe.evaluate.split,
        "models": models,
        "exports": exports,
        "task": kind,
        "metric": main,
        "student_vs_teacher": verdict.kept(kind, student, teacher),
        "ce_gap_closed": sign * (student - ce_only) / gap if ce_only is not None and gap > 0 else None,
        "quantization_cost": _quantization_cost(plan, figures, main),
        "merging_cost": figures[f"evaluate/{MERGED}"]["against_teacher"] if f"evaluate/{MERGED}" in figures else None,
        "rows": {
            "train": tuned["train_rows"],
            "truncated": tuned["truncated_rows"],
            "duplicates": tuned["duplicates"],
            "skipped": tuned["skipped_rows"],
        },
        "benchmark": figures["benchmark"],
        "comparisons": figures["compare"]["pairs"],
        "seeds": verdict.over_seeds(plan),
        "groups": verdict.groups(plan, figures),
        "curves": verdict.curves(plan),
        "samples": _samples(figures),
        "soft_targets": _soft_targets(figures),
        "training": {
            step: {name: made[name] for name in TRAINING} for step, made in figures.items() if "rows_per_s" in made
        },
        "settings": plan.recipe.model_dump(mode="json"),
        "given": plan.recipe.model_dump(mode="json", exclude_unset=True),
        "environment": plan.artifacts[f"distil/{STUDENT}"].manifest()["environment"],
        "artifacts": {step: made.path.name for step, made in plan.steps().items()},
    }
    return {**report, "verdict": verdict.verdict(report), "not_measured": verdict.not_measured(report)}


def _model(role: str, figures: dict[str, Any]) -> dict[str, Any]:
    scored = figures[f"evaluate/{role}"]
    timed, student = (summary(figures["benchmark"], name) or {} for name in (role, STUDENT))
    exported = figures[role.replace(":", "/")] if role.startswith("export:") else {}
    weights = student if exported or role == UNTRAINED else timed
    return {
        "role": role,
        "scores": scored["scores"],
        "against_teacher": scored.get("against_teacher"),
        "num_parameters": weights.get("num_parameters", 0),
        "size_bytes": exported.get("size_bytes", weights.get("size_bytes", 0)),
        "calibration": figures["compare"]["calibration"].get(role),
        "latency_ms": timed.get("latency_ms"),
        **{name: timed.get(name) for name in TIMED},
    }


def _export(form: str, figures: dict[str, Any]) -> dict[str, Any]:
    """What one form's gate found, how large it is, and how much faster than the student."""
    made = figures[f"export/{form}"]
    timed = summary(figures["benchmark"], f"export:{form}")
    kept = ("parity", "limits", "worst", "size_bytes", "way", "tried")
    return {**{name: made[name] for name in kept if name in made}, "speedup": timed["ratio"] if timed else None}


def _quantization_cost(plan: Plan, figures: dict[str, Any], main: str) -> dict[str, Any] | None:
    """What the quantized teacher loses against the same adapter on the full-precision base."""
    if f"evaluate/{FULL}" not in figures:
        return None
    full, quantized = (figures[f"evaluate/{role}"]["scores"] for role in (FULL, TEACHER))
    return {
        "quantize": plan.recipe.teacher.quantize,
        **{
            f"{name}_lost": full[name]["value"] - quantized[name]["value"]
            for name in dict.fromkeys((main, "accuracy"))
            if name in full
        },
        **figures[f"evaluate/{FULL}"]["against_teacher"],
    }


def _soft_targets(figures: dict[str, Any]) -> dict[str, Any] | None:
    """What is kept of the teacher's distributions, and what that costs."""
    if "targets" not in figures:
        return None
    made = figures["targets"]
    return {"layout": made["layout"], "why": made["why"], "measured": made["measured"], "audit": figures.get("audit")}


def _samples(figures: dict[str, Any]) -> list[dict[str, str]]:
    """What teacher and student make of the same beginnings, side by side."""
    told = {role: figures[f"evaluate/{role}"].get("samples", []) for role in (TEACHER, STUDENT)}
    return [
        {"prompt": one["prompt"], TEACHER: one["completion"], STUDENT: two["completion"]}
        for one, two in zip(told[TEACHER], told[STUDENT], strict=False)
    ]


def finish(plan: Plan) -> None:
    """Write the report, and point `runs/<name>/exports/<format>` at the bundles, `student` at the first of them."""
    forms = plan.recipe.export.formats
    with Lock(plan.folder, "report").held():
        save(plan, build(plan))
        (plan.folder / EXPORTS).mkdir(exist_ok=True)
        for form in forms:
            replace_link(plan.folder / EXPORTS / form, f"../{plan.artifacts[f'bundle/{form}'].path.name}/model")
        replace_link(plan.folder / "student", f"{EXPORTS}/{forms[0]}")


def save(plan: Plan, report: dict[str, Any]) -> None:
    """Write report.json and report.md into the run's folder."""
    write_json(plan.folder / "report.json", sealed(report))
    write_text(plan.folder / "report.md", markdown(report))


def load(run: Path) -> dict[str, Any]:
    """Read a run's report.

    Raises:
        InputError: there is none.
    """
    if not (run / "report.json").is_file():
        raise InputError(
            f"{run}: no report.json here; give a run's folder, such as runs/quickstart, once it is finished"
        )
    found = read_sealed(run / "report.json", "run the recipe again")
    if "verdict" not in found:
        raise InputError(f"{run / 'report.json'}: written by another version of distilpeft; run the recipe again")
    return found


def as_json(report: dict[str, Any] | list[dict[str, Any]]) -> str:
    """One report, or several, as JSON text."""
    return json.dumps(report, indent=2, ensure_ascii=False)
