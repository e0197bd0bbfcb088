"""`distilpeft tune-lr`: a learning-rate range test of one stage, with a plot and a suggestion.

The stage is trained for some steps while the rate rises from `low` to `high` by the same factor each (Smith 2015,
arXiv:1506.01186), by the ordinary loop on the recipe's own rows, loss and batches. Where the loss is lowest, the rate
is too high already to train long with; the one where it falls most steeply is suggested. The weights are thrown away,
the teacher and its soft targets are kept for the run.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilpeft.errors import GateError, InputError
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.files import write_json
from distilpeft.machine.host import num_launched
from distilpeft.pipeline import launch
from distilpeft.planning.plan import make_plan
from distilpeft.planning.roles import STUDENT, TEACHER
from distilpeft.recipe import Recipe
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.report.plots import plot_files
from distilpeft.report.plots.charts import Axis, Chart, Point, Series, number
from distilpeft.report.plots.markers import mark

WINDOW = 20
"""A twentieth of the steps on either side is averaged over."""
SPENT = 4.0
"""Where the loss is this many times its lowest, it has burst: what comes later is not looked at."""
ADAPTER, WHOLE = (1e-5, 1e-1), (1e-6, 1e-2)


@dataclass(frozen=True)
class Found:
    """What a range test shows.

    Attributes:
        rates: of each step.
        losses: of each step.
        smooth: the losses, averaged over their neighbours.
        steepest: the step where that falls most, for the same factor of the rate.
        lowest: the step where it is lowest.
        suggestion: a rate to train with; None if the loss never fell.
        words: what it means.
    """

    rates: Sequence[float]
    losses: Sequence[float]
    smooth: Sequence[float]
    steepest: int
    lowest: int
    suggestion: float | None
    words: str


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean over as many steps before as after: a running mean would lag, and show the lowest loss too late."""
    wide = len(losses) // WINDOW
    means = []
    for step in range(len(losses)):
        around = min(wide, step, len(losses) - 1 - step)
        part = losses[step - around : step + around + 1]
        means.append(sum(part) / len(part))
    return means


def read(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """Find the rate of the lowest loss, and what follows."""
    smooth = smoothed(losses)
    end, least = len(smooth), math.inf
    for step, value in enumerate(smooth):
        least = min(least, value)
        if value > SPENT * least:
            end = step
            break
    lowest = min(range(end), key=smooth.__getitem__)
    few = max(1, len(losses) // WINDOW)
    falls = [smooth[min(step + few, lowest)] - smooth[max(step - few, 0)] for step in range(lowest + 1)]
    steepest = min(range(lowest + 1), key=falls.__getitem__)
    if lowest < few:
        return Found(rates, losses, smooth, steepest, lowest, None, "the loss never fell: begin lower, with --low")
    words = f"steepest at lr {rates[steepest]:.2g}, lowest loss {smooth[lowest]:.4g} at {rates[lowest]:.2g}"
    if lowest >= len(losses) - few:
        words += ", the end: a higher --high may show more"
    return Found(rates, losses, smooth, steepest, lowest, float(f"{rates[steepest]:.1g}"), words)


def bounds(recipe: Recipe, stage: str) -> tuple[float, float]:
    """Rates to look at: adapters take about ten times those of whole models."""
    lora = recipe.teacher.adapter if stage == "teacher" else recipe.student.lora
    return WHOLE if lora is None else ADAPTER


def run(
    path: Path, overrides: Sequence[str], runs: Path, *, stage: str, steps: int, low: float | None, high: float | None
) -> tuple[Found, list[Path]]:
    """Test the rates of a recipe's stage.

    Args:
        path: the recipe.
        overrides: of its keys.
        runs: the folder of all runs.
        stage: `teacher` or `distil`.
        steps: optimizer steps of the test.
        low: the first rate; default by what is trained.
        high: the last.

    Returns:
        What was found, and the files that show it.

    Raises:
        InputError: the rates are the wrong way round, or another launcher has started the processes.
        GateError: the first steps fail already.
    """
    if num_launched() > 1:  # each would read and clear away for itself
        raise InputError("tune-lr: start it without torchrun; it takes the recipe's devices by itself")
    recipe = load_recipe(path, overrides)
    if stage == "teacher" and recipe.teacher.fit is None:
        raise InputError("teacher.fit: null uses the teacher without tuning: there is no rate to find")
    least, most = bounds(recipe, stage)
    least, most = low or least, high or most
    if least >= most:
        raise InputError(f"--low {least:g} --high {most:g}: the test needs to rise")
    optim, fit = f"{stage}.optim", f"{stage}.fit"
    changes = [
        f"{optim}.lr={least!r}", f"{optim}.schedule=exponential", f"{optim}.final_ratio={most / least!r}",
        f"{optim}.warmup_ratio=0", f"{fit}.max_steps={steps}", f"{fit}.epochs={steps}", f"{fit}.keep=last",
        f"{fit}.validate_every=null", f"{fit}.early_stopping_patience=null", "tracking=[]",
        "distil.gate=warn", *(["teacher.gate=warn"] if stage == "teacher" else []),  # it need not be a good one
    ]  # fmt: skip
    plan = make_plan(load_recipe(path, [*overrides, *changes]), runs)
    step = plan.weights_of(TEACHER if stage == "teacher" else STUDENT)
    before = plan.needs(step)
    artifact = step.artifact
    try:
        if not artifact.done:
            launch.on_devices(plan.recipe.devices, launch.make, (plan, [*before, step]), plan.folder)
    except GateError:
        # of this stage, after some steps: the loss was no number at last, the test's natural end
        if not all(need.artifact.done for need in before) or not _log(artifact):
            raise
    lines = _log(artifact)
    finding = read([line["lr"] for line in lines], [line["loss"] for line in lines])
    for folder in (artifact.path, artifact.partial):
        shutil.rmtree(folder, ignore_errors=True)
    return finding, save(finding, stage, plan.folder)


def _log(artifact: Artifact) -> list[dict[str, Any]]:
    for folder in (artifact.path, artifact.partial):
        file = folder / "train_log.jsonl"
        if file.is_file():
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            return [line for line in lines if math.isfinite(line["loss"])]
    return []


def save(finding: Found, stage: str, folder: Path) -> list[Path]:
    """Write the figures, and a plot where matplotlib is installed."""
    file = folder / f"tune-lr-{stage}.json"
    write_json(file, {"lr": list(finding.rates), "loss": list(finding.losses), "smooth": list(finding.smooth),
                      "suggestion": finding.suggestion, "words": finding.words})  # fmt: skip
    points = tuple(Point(rate, loss) for rate, loss in zip(finding.rates, finding.smooth, strict=True))
    raw = tuple(Point(rate, loss) for rate, loss in zip(finding.rates, finding.losses, strict=True))
    best = (Point(finding.rates[finding.steepest], finding.smooth[finding.steepest]),)
    chart = Chart(
        f"tune-lr-{stage}", f"{stage}: loss while the learning rate rises", Axis("learning rate", log=True),
        Axis("loss"), (Series("each step", raw, None, "guide"), Series(stage, points, mark(stage), "line"),
                       Series("suggested", best, None, "ring")),
        ("lr", "loss"), tuple((number(point.x), number(point.y)) for point in points),
    )  # fmt: skip
    return [*plot_files.draw([chart], folder), file]
