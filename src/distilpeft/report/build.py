"""The report: what every model scores, weighs and costs, as JSON, Markdown and a table on the terminal.

Torch-free; it only joins the figures in the manifests. `report.json` is described in docs/report.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distilpeft.errors import InputError
from distilpeft.machine.files import read_sealed, sealed, write_json, write_text
from distilpeft.metrics.timings import summary
from distilpeft.planning.plan import Plan
from distilpeft.planning.roles import (
    CE_LONG,
    CE_ONLY,
    FULL,
    HARD,
    LABELLED,
    MAJORITY,
    MERGED,
    STUDENT,
    TEACHER,
    UNTRAINED,
    export_role,
    format_of,
    step_name,
)
from distilpeft.report import advice, verdict
from distilpeft.report.figures import Export
from distilpeft.report.schema import Model, QuantizationCost, Report, Rows, Sample, SoftTargets
from distilpeft.report.text import markdown

REPORT = "report.json"
ORDER = (MAJORITY, UNTRAINED, CE_ONLY, CE_LONG, LABELLED, HARD, STUDENT, TEACHER, FULL, MERGED)
TIMED = ("throughput_rows_per_s", "tokens_per_s", "text_latency_ms", "text_rows_per_s", "decode", "memory_bytes",
         "gpu_memory_bytes", "load_s")  # fmt: skip
TRAINING = ("steps", "rows", "seconds", "rows_per_s", "precision", "kept_step", "validations", "skipped_steps",
            "loss_spikes")  # fmt: skip


def build(plan: Plan) -> Report:
    """Join the figures of a finished run."""
    figures = {step: artifact.figures() for step, artifact in plan.artifacts.items()}
    recipe, tuned, trained = plan.recipe, figures["teacher"], figures[step_name("distil", STUDENT)]
    views = trained.get("view_rows", 0)
    kind, main = recipe.task.kind, recipe.kind.main
    roles = sorted(plan.roles(), key=lambda role: ORDER.index(role) if role in ORDER else len(ORDER))
    score = {role: figures[f"evaluate/{role}"]["scores"][main]["value"] for role in roles}
    shares = {role: verdict.kept(kind, score[role], score[TEACHER]) for role in roles}
    report = Report(
        recipe=recipe.name,
        seed=recipe.seed,
        split=recipe.evaluate.split,
        models=tuple(_model(role, figures, shares[role]) for role in roles),
        exports={form: _export(form, figures) for form in recipe.export.formats},
        task=kind,
        metric=main,
        student_vs_teacher=shares[STUDENT],
        quantization_cost=_quantization_cost(plan, figures, main),
        merging_cost=figures[f"evaluate/{MERGED}"]["against_teacher"] if f"evaluate/{MERGED}" in figures else None,
        rows=Rows(
            train=tuned["train_rows"],
            unlabelled=trained["train_rows"] - trained.get("labelled_rows", trained["train_rows"]) - views,
            views=views,
            held_out=trained.get("held_out_rows", 0),
            truncated=tuned["truncated_rows"],
            duplicates=tuned["duplicates"],
            skipped=tuned["skipped_rows"],
        ),
        lead={"role": TEACHER, "against": CE_ONLY, **figures["lead"]} if "lead" in figures else None,
        benchmark=figures["benchmark"],
        comparisons=figures["compare"]["pairs"],
        answers=figures["compare"].get("answers"),
        seeds=verdict.over_seeds(plan),
        groups=verdict.groups(plan, figures),
        curves=verdict.curves(plan),
        samples=_samples(figures),
        soft_targets=_soft_targets(figures),
        **{name: trained[name] for name in ("vocabulary",) if name in trained},
        training={
            step: {name: result[name] for name in TRAINING}
            for step, result in figures.items()
            if "rows_per_s" in result
        },
        settings=recipe.model_dump(mode="json"),
        given=recipe.model_dump(mode="json", exclude_unset=True),
        environment=plan.artifacts[f"distil/{STUDENT}"].manifest()["environment"],
        artifacts={step: artifact.path.name for step, artifact in plan.steps().items()},
        seconds=_seconds(plan),
    )
    report = report.model_copy(update={"ce_gap_closed": verdict.gap_closed(report)})
    update = {"verdict": advice.verdict(report), "not_measured": tuple(verdict.not_measured(report))}
    return report.model_copy(update=update)


def _seconds(plan: Plan) -> dict[str, float]:
    """Stage → how long its steps took, of all seeds."""
    spent: dict[str, float] = {}
    for artifact in plan.steps().values():
        spent[artifact.stage] = round(spent.get(artifact.stage, 0.0) + artifact.manifest().get("seconds", 0.0), 2)
    return spent


def _model(role: str, figures: dict[str, Any], share: float | None) -> Model:
    scored = figures[f"evaluate/{role}"]
    timed, student = (summary(figures["benchmark"], name) or {} for name in (role, STUDENT))
    form = format_of(role)
    exported = {} if form is None else figures[step_name("export", form)]
    weights = student if exported or role == UNTRAINED else timed
    return Model(
        role=role,
        scores=scored["scores"],
        against_teacher=scored.get("against_teacher"),
        num_parameters=weights.get("num_parameters", 0),
        size_bytes=exported.get("size_bytes", weights.get("size_bytes", 0)),
        calibration=figures["compare"]["calibration"].get(role),
        latency_ms=timed.get("latency_ms"),
        **{name: timed.get(name) for name in TIMED},
        kept=share,
    )


def _export(form: str, figures: dict[str, Any]) -> Export:
    """What one form's gate found, how large it is, and how much faster than the student."""
    own = figures[step_name("export", form)]
    timed = summary(figures["benchmark"], export_role(form))
    names = ("parity", "limits", "worst", "size_bytes", "way", "tried", "processors", "batching", "exact_sums")
    return Export(**{name: own[name] for name in names if name in own}, speedup=timed["ratio"] if timed else None)


def _quantization_cost(plan: Plan, figures: dict[str, Any], main: str) -> QuantizationCost | None:
    """What the quantized teacher loses against the same adapter on the full-precision base."""
    if f"evaluate/{FULL}" not in figures:
        return None
    full, quantized = (figures[f"evaluate/{role}"]["scores"] for role in (FULL, TEACHER))
    lost = {
        f"{name}_lost": full[name]["value"] - quantized[name]["value"]
        for name in dict.fromkeys((main, "accuracy"))
        if name in full
    }
    return QuantizationCost(
        quantize=plan.recipe.teacher.quantize, **lost, **figures[f"evaluate/{FULL}"]["against_teacher"]
    )


def _soft_targets(figures: dict[str, Any]) -> SoftTargets | None:
    """What is kept of the teacher's distributions, and what that costs."""
    if "targets" not in figures:
        return None
    targets = figures["targets"]
    return SoftTargets(
        layout=targets["layout"], why=targets["why"], measured=targets["measured"], audit=figures.get("audit")
    )


def _samples(figures: dict[str, Any]) -> tuple[Sample, ...]:
    """What teacher and student make of the same beginnings, side by side."""
    samples = {role: figures[f"evaluate/{role}"].get("samples", []) for role in (TEACHER, STUDENT)}
    return tuple(
        Sample(prompt=teacher["prompt"], teacher=teacher["completion"], student=student["completion"])
        for teacher, student in zip(samples[TEACHER], samples[STUDENT], strict=False)
    )


def save(plan: Plan, report: Report) -> None:
    """Write report.json and report.md into the run's folder."""
    write_json(plan.folder / REPORT, sealed(report.as_json()))
    write_text(plan.folder / "report.md", markdown(report))


def load(run: Path) -> Report:
    """Read a run's report.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    file = run / REPORT
    if not file.is_file():
        raise InputError(f"{run}: no {REPORT} here; give a run's folder, such as runs/quickstart, once it is finished")
    content = read_sealed(file, "run the recipe again")
    try:
        report = Report.model_validate(content)
    except ValidationError:
        report = None
    if report is None or "verdict" not in content:
        raise InputError(f"{file}: written by another version of distilpeft; run the recipe again")
    return report


def as_json(reports: Sequence[Report]) -> str:
    """One report, or several, as JSON text."""
    contents = [report.as_json() for report in reports]
    return json.dumps(contents[0] if len(contents) == 1 else contents, indent=2, ensure_ascii=False)
