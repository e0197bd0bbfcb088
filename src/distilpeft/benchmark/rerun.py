"""`distilpeft benchmark`: measure finished runs and exported folders again, side by side, as often as asked.

The models of all targets take turns in one measurement, so runs and bundles can be compared with each other. With
`repeats` all of it is done again in fresh processes, and how far the ratios of the repeats are apart is reported.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft.benchmark import measure, subjects
from distilpeft.benchmark import subjects as subjects_
from distilpeft.benchmark.measure import Subject
from distilpeft.benchmark.model_process import write_words
from distilpeft.errors import InputError
from distilpeft.export.bundle import TOKENIZER, Bundle
from distilpeft.export.manifest import MANIFEST, read_manifest
from distilpeft.machine.files import write_json
from distilpeft.machine.locks import in_use
from distilpeft.machine.runtime import Runtime
from distilpeft.models.checks import check_lengths
from distilpeft.models.context import pair_of
from distilpeft.planning.plan import Plan, make_plan
from distilpeft.planning.roles import STUDENT
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import Embedding, Texts
from distilpeft.recipe.yaml_file import with_benchmark
from distilpeft.report import build
from distilpeft.report.figures import Benchmark
from distilpeft.report.timing_notes import timing_notes
from distilpeft.tasks.rows import TaskData

NUM_TEXTS, FILLER_ROWS, WIDE = 512, 64, 120


class Target:
    """A run's folder or an exported one.

    Attributes:
        recipe: whose settings it is measured with.
        scores: role → value of the main metric.
    """

    def __init__(self, path: Path, overrides: Sequence[str], label: str) -> None:
        self.path, self._label = path, label
        self.plan: Plan | None = None
        if (path / build.REPORT).is_file():
            report = build.load(path)
            self.recipe = with_benchmark(report.given, overrides)
            self.plan = make_plan(self.recipe, path.resolve().parent)
            self._check_finished(self.plan)
            self.scores = {self._name(model.role): model.scores[report.metric].value for model in report.models}
        elif (path / MANIFEST).is_file():
            manifest = read_manifest(path)
            if "provenance" not in manifest:
                raise InputError(f"{path}: not a complete bundle; give a folder such as runs/NAME/exports/FORM")
            self.recipe = with_benchmark(manifest["provenance"]["given"], overrides)
            name = manifest["format"]
            self.scores = {self._name(name): manifest["scores"][self.recipe.kind.main]["value"]}
        else:
            raise InputError(f"{path}: neither a finished run nor an exported folder (no report.json, no {MANIFEST})")

    def _check_finished(self, plan: Plan) -> None:
        lacking = [step for step in map(plan.weights_of, plan.timed()) if not step.artifact.done]
        if lacking:
            raise InputError(f"{self.path}: {lacking[0].name} is not done; run the recipe again")

    def _name(self, role: str) -> str:
        return f"{self._label}/{role}" if self._label else role

    def subjects(self, scratch: Path, texts: Sequence[str] | None) -> list[Subject]:
        """What is to be timed of it."""
        if self.plan is None:
            return [self._bundle(scratch, texts)]
        steps = {role: self.plan.weights_of(role) for role in self.plan.timed()}
        for step in steps.values():
            step.artifact.verify()
        data = TaskData(self.recipe, self.plan.data_digest, self.plan.cache)
        pair = pair_of(self.recipe, data)
        check_lengths(pair)
        folders = {role: step.artifact.path for role, step in steps.items()}
        return [
            replace(subject, label=self._name(subject.role), twin=self._name(subject.twin) if subject.twin else None)
            for subject in subjects.subjects(pair, data, folders, scratch)
        ]

    def _bundle(self, scratch: Path, texts: Sequence[str] | None) -> Subject:
        deployed = Bundle(self.path)
        if texts is not None:
            rows = [np.asarray(ids, np.int64) for ids in deployed.encode(texts)]
        else:
            words = deployed.vocabulary_size
            rows = list(np.random.default_rng(0).integers(0, words, (FILLER_ROWS, 64)))
        (name,) = self.scores
        file = scratch / f"{len(list(scratch.iterdir()))}.npz"
        subjects.save_rows(file, rows, deployed.manifest["pad_token_id"])
        manifest = deployed.manifest
        if texts is not None and isinstance(self.recipe.task, Texts | Embedding):
            tokenizer = (self.path / TOKENIZER).read_text(encoding="utf-8")
            write_words(file, texts, tokenizer, manifest["max_tokens"], typed=manifest.get("typed", False))
        return Subject(deployed.manifest["format"], self.path.resolve(), None, file, label=name)


def run(
    paths: Sequence[Path], overrides: Sequence[str], *, repeats: int, texts: Path | None, out: Path | None,
    console: Console,
) -> None:  # fmt: skip
    """Measure all targets and print the table.

    Args:
        paths: finished runs and exported folders.
        overrides: of `benchmark`.
        repeats: how often.
        texts: lines of text that bundles are timed on; without them, random tokens of fixed lengths.
        out: where the figures go as JSON; default: `benchmark.json` in the folder of the first run.
        console: where the table goes.

    Raises:
        InputError: a path is neither, the targets are of different tasks, or a setting is wrong.
    """
    labels = [path.name if len(paths) > 1 else "" for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    targets = [Target(path, overrides, label) for path, label in zip(paths, labels, strict=True)]
    recipe = _settings(targets, texts)
    lines = _lines(texts) if texts is not None else None
    runtime = Runtime()
    scores = {name: value for target in targets for name, value in target.scores.items()}
    measurements = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as locks:
        for folder in {target.plan.folder for target in targets if target.plan is not None}:
            locks.enter_context(in_use(folder))
        subjects = [subject for target in targets for subject in target.subjects(Path(scratch), lines)]
        names = [subject.name for subject in subjects]
        reference = next((subject.name for subject in subjects if subject.role == STUDENT), names[0])
        settings = subjects_.wanted(recipe, runtime.device.type)
        for repeat in range(repeats):
            if repeats > 1:
                runtime.say(f"repeat {repeat + 1} of {repeats}")
            measurements.append(measure.measure(subjects, settings, reference, runtime.say, runtime.bar))
    result = {"targets": [str(path) for path in paths], "scores": scores, "agreement": agreement(measurements),
              "settings": recipe.benchmark.model_dump(mode="json"), "environment": runtime.environment(),
              "repeats": measurements}  # fmt: skip
    show(result, console)
    place = out or next((target.path / "benchmark.json" for target in targets if target.plan is not None), None)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, result)
        console.print(f"Figures: {place}", highlight=False)


def _settings(targets: Sequence[Target], texts: Path | None) -> Recipe:
    """The recipe whose `benchmark` section counts: the first one's."""
    recipe = targets[0].recipe
    for target in targets[1:]:
        if target.recipe.task.kind != recipe.task.kind:
            raise InputError(f"{target.path}: its task is {target.recipe.task.kind}, of {targets[0].path} it is "
                             f"{recipe.task.kind}; measure them apart")  # fmt: skip
    bare = [target for target in targets if target.plan is None]
    if bare and texts is None and "data" in recipe.benchmark.lengths:
        lengths = tuple(length for length in recipe.benchmark.lengths if length != "data") or (recipe.data.max_tokens,)
        settings = recipe.benchmark.model_copy(update={"lengths": lengths})
        return recipe.model_copy(update={"benchmark": settings})
    return recipe


def _lines(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"--input {file}: {error.strerror or error}") from None
    if not lines:
        raise InputError(f"{file}: holds no text")
    return lines[:NUM_TEXTS]


def agreement(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How far the repeats are apart: per arm and cell the largest over the smallest ratio, minus 1."""
    if len(repeats) < 2:
        return None
    apart: dict[str, float] = {}
    for name in _cells(repeats[0]):
        ratios = [cells[name]["ratio"]["value"] for repeat in repeats if name in (cells := _cells(repeat))]
        apart[name] = round(max(ratios) / min(ratios) - 1, 4)
    worst = max(apart, key=lambda name: apart[name])
    return {
        "apart": apart,
        "worst": worst,
        "largest": apart[worst],
        "median": round(float(np.median(list(apart.values()))), 4),
    }


def _cells(measurement: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The cells that have a ratio, by a name that tells their setting."""
    return {
        f"{_setting(arm)} {cell['batch_size']}x{cell['length']}": cell
        for arm in measurement["arms"]
        for cell in arm["cells"]
        if cell["ratio"] is not None
    }


def _setting(arm: Mapping[str, Any]) -> str:
    return f"{arm['role']} {arm['device']}/{arm['threads']}" + (" compiled" if arm["compiled"] else "")


def rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The table of the last repeat, cell by cell; the first row holds the titles."""
    measurement = result["repeats"][-1]
    language = measurement["new_tokens"] is not None
    more = ("ms/token",) if language else ()
    several = len({(arm["device"], arm["threads"]) for arm in measurement["arms"]}) > 1
    encoded = any(cell.get("from_text") for arm in measurement["arms"] for cell in arm["cells"])
    text_titles = ("ms from text", "rows/s from text") if encoded else ()
    yield ("model", "rows", "ms p50/p95", *more, "rows/s", *text_titles, "x (95 %)", "memory", "load", "score")
    for arm in measurement["arms"]:
        score = result["scores"].get(arm["role"])
        for cell in arm["cells"]:
            ratio, decode = cell["ratio"], cell["decode"]
            yield (
                _setting(arm) if several or arm["compiled"] else arm["role"],
                f"{cell['batch_size']}x{cell['length']}",
                f"{cell['latency_ms']['p50']:.1f}/{cell['latency_ms']['p95']:.1f}",
                *([f"{decode['ms_per_token']['p50']:.2f}"] if decode else []),
                f"{cell['rows_per_s']:.3g}",
                *(_from_text(cell.get("from_text")) if encoded else ()),
                f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "1",
                f"{arm['memory_bytes'] / 1e6:.0f}MB",
                f"{arm['load_s']:.1f}s",
                f"{score:.4f}" if score is not None else "-",
            )


def _from_text(figures: Mapping[str, Any] | None) -> tuple[str, str]:
    """Latency and throughput of rows that begin as text."""
    if figures is None:
        return "-", "-"
    return f"{figures['latency_ms']['p50']:.2f}", f"{figures['rows_per_s']:.3g}"


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the table, and what speaks against it."""
    titles, *body = rows(result)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < 2 else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    wide = Console(file=console.file, width=max(console.width, WIDE))  # a narrow one would cut figures off
    wide.print(table)
    for line in timing_notes(Benchmark.model_validate(result["repeats"][-1])):
        console.print(line, highlight=False)
    apart = result["agreement"]
    if apart is not None:
        console.print(
            f"Over {len(result['repeats'])} repeats, the ratios differ by {apart['largest']:.1%} at most "
            f"({apart['worst']}), by {apart['median']:.1%} in the median.",
            highlight=False,
        )
