"""What a run will need, estimated before any weight is read: rows, steps, parameters, memory and disk.

Parameters come from safetensors headers, rows from the data; memory is arithmetic on them:
weights + 4 bytes of gradient and 8 of AdamW per trainable weight + activations (a rule of thumb, below).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft import __version__
from distilpeft.data import data_sources
from distilpeft.plan import CE_ONLY, STUDENT, Plan
from distilpeft.recipe import CausalLM, Fit, Lora, Recipe, Student, TextClassification
from distilpeft.sources import Source, model_config, num_layers, num_parameters, resolve, weight_shapes
from distilpeft.tasks import read_task_splits

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "nf4": 0.53}
"""Bytes per weight; nf4 with double quantization: 4 bits and 0.127 bits of scales (arXiv:2305.14314)."""
ACTIVATIONS_PER_LAYER = 34
"""Bytes kept per token and hidden unit in a transformer layer at 2 bytes each (arXiv:2205.05198, eq. 1)."""


@dataclass(frozen=True)
class Size:
    """Weights of a model: all, those in linear layers of the body (which are quantized), and its shape."""

    total: int
    linear: Mapping[str, tuple[int, ...]]
    layers: int
    hidden: int

    @property
    def num_linear(self) -> int:
        """Weights in linear layers."""
        return sum(math.prod(shape) for shape in self.linear.values())


def size_of(source: Source) -> Size | None:
    """Read a model's size from the headers of its files, or None if they are not on this machine."""
    shapes, config = weight_shapes(source), model_config(source)
    if shapes is None or config is None:
        return None
    linear = {name: shape for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name}
    hidden = next((int(config[name]) for name in ("hidden_size", "dim", "d_model") if name in config), 0)
    return Size(num_parameters(shapes), linear, num_layers(config) or 0, hidden)


def cut(size: Size, layers: tuple[int, ...]) -> Size:
    """The size left when only these layers are kept: layer weights scale with their number."""
    in_layers = {
        name: shape for name, shape in size.linear.items() if any(part.isdecimal() for part in name.split("."))
    }
    lost = sum(math.prod(shape) for shape in in_layers.values()) * (1 - len(layers) / max(size.layers, 1))
    kept = {
        name: shape
        for name, shape in size.linear.items()
        if name not in in_layers or int(next(part for part in name.split(".") if part.isdecimal())) in layers
    }
    return Size(size.total - round(lost), kept, len(layers), size.hidden)


def lora_weights(size: Size, lora: Lora) -> int:
    """Trainable weights of an adapter: rank · (in + out) for every matrix it sits on."""
    targets = lora.target_modules
    chosen = [
        shape
        for name, shape in size.linear.items()
        if isinstance(targets, str) or any(f".{name}".endswith(f".{target}.weight") for target in targets)
    ]
    return sum(lora.rank * sum(shape) for shape in chosen)


def training_bytes(size: Size, *, weights: float, trainable: int, fit: Fit, max_tokens: int) -> float:
    """Peak memory of training: weights, gradients and AdamW's moments in fp32, activations of one micro-batch."""
    tokens = min(fit.micro_batch_size, fit.batch_size) * max_tokens
    activations = ACTIVATIONS_PER_LAYER * (1 if fit.precision == "bf16" else 2) * tokens * size.hidden * size.layers
    return weights + 12 * trainable + activations


def show(plan: Plan, console: Console) -> None:
    """Print the resolved recipe, then a line per stage: done or not, and what it needs.

    Raises:
        InputError: the data cannot be used.
    """
    import yaml

    splits = _count_rows(plan.recipe)
    resolved = plan.recipe.model_dump(mode="json", exclude_none=True)
    console.print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).strip(), highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("stage", "done", "rows", "steps", "weights (trained)", "memory", "disk"):
        table.add_column(column, justify="left" if column in ("stage", "done") else "right", no_wrap=True)
    for row in stage_rows(plan, splits):
        table.add_row(*row)
    console.print(table)
    every = len(plan.steps())
    done = every - len(plan.missing())
    checked = "the recipe and its data are good" if splits else "the recipe is good (a run reads or cuts the rows)"
    console.print(
        f"distilpeft {__version__}: {checked}; {done} of {every} steps are done. "
        f"Results: {plan.folder}. Memory and disk are estimates; ? = not on this machine yet.",
        highlight=False,
    )


def _count_rows(recipe: Recipe) -> dict[str, int] | None:
    """Rows of each split, checked; None for a data set on the hub, which only a run may download."""
    if any(source.path is None for source in data_sources(recipe.data).values()):
        return None
    splits = {name: len(rows) for name, rows in read_task_splits(recipe).items()}
    # Documents and packed rows become another number of rows, which takes a tokenizer to find out.
    reshaped = isinstance(recipe.task, CausalLM) and (recipe.task.pack or recipe.task.text is not None)
    return None if reshaped else splits


def stage_rows(plan: Plan, splits: Mapping[str, int] | None) -> list[tuple[str, ...]]:
    """The table of `check`, cell by cell: a row per stage, and one per student to be trained."""
    recipe = plan.recipe
    source = resolve(recipe.teacher.model, "teacher.model", recipe.teacher.revision)
    teacher, student = size_of(source), student_size(recipe)
    train = splits["train"] if splits else None
    scored = splits[recipe.evaluate.split] if splits else None
    # Bytes kept per row: all logits of a class; for tokens six sums, and never their logits.
    per_row = 4 * len(recipe.task.labels) if isinstance(recipe.task, TextClassification) else 24
    kept = None if train is None else train * _target_bytes(recipe)
    exported = sum(student.total * _export_bytes(recipe, form) for form in recipe.export.formats) if student else None
    needs = {
        "teacher": _teacher_needs(recipe, teacher, train),
        "targets": (_known(train), "-", _count(teacher), "as above", _bytes(kept)),
        f"distil/{CE_ONLY}": _student_needs(recipe, student, train),
        f"distil/{STUDENT}": _student_needs(recipe, student, train),
        "audit": ("-", "-", _count(student), "-", "-"),
        "evaluate": (_known(scored), "-", "-", "-", _bytes(scored and len(plan.roles()) * scored * per_row)),
        "export": (str(recipe.export.gate_rows), "-", _count(student), "-", _bytes(exported)),
        "compare": ("-", "-", "-", "-", "-"),
        "benchmark": ("-", str(recipe.benchmark.rounds), "-", "-", "-"),
        "bundle": ("-", "-", "-", "-", "-"),
    }
    rows = []
    for label, cells in needs.items():
        steps = [made.done for step, made in plan.artifacts.items() if step == label or step.startswith(f"{label}/")]
        if steps:
            rows.append((label, f"{sum(steps)}/{len(steps)}", *cells))
    return rows


def _target_bytes(recipe: Recipe) -> float:
    """Bytes of a row's soft targets; of tokens at most, for a vocabulary of 2^17."""
    if isinstance(recipe.task, TextClassification):
        return 4.0 * len(recipe.task.labels)
    targets, form = recipe.targets, recipe.targets.format
    if form == "full":
        return recipe.data.max_tokens * 2**17 * (targets.value_bits or 32) / 8
    count = targets.k if form == "top_k" else targets.draws
    return recipe.data.max_tokens * (8 + count * (17 + 6 + (targets.value_bits or 12)) / 8)


def _export_bytes(recipe: Recipe, form: str) -> float:
    """Bytes per weight of an export."""
    return {"exact": 4.0, "half": 2.0, "int8": 1.06, "int4": 0.6}[recipe.exactness(form)]


def student_size(recipe: Recipe) -> Size | None:
    """The student's size, if the files that tell are on this machine."""
    student: Student = recipe.student
    if student.from_config is not None:
        return None
    if student.from_teacher is not None:
        size = size_of(resolve(recipe.teacher.model, "teacher.model", recipe.teacher.revision))
        return cut(size, student.from_teacher.layers) if size else None
    assert student.model is not None
    return size_of(resolve(student.model, "student.model", student.revision))


def _teacher_needs(recipe: Recipe, size: Size | None, rows: int | None) -> tuple[str, ...]:
    teacher = recipe.teacher
    steps = _steps(rows, teacher.fit)
    if size is None:
        return (_known(rows), steps, "?", "?", "?")
    trained = lora_weights(size, teacher.lora) if teacher.lora else size.total
    body = BYTES[teacher.dtype if teacher.quantize == "none" else teacher.quantize]
    weights = (size.total - size.num_linear) * BYTES[teacher.dtype] + size.num_linear * body + trained * 4
    memory = training_bytes(
        size, weights=weights, trainable=trained, fit=teacher.fit, max_tokens=recipe.data.max_tokens
    )
    return (_known(rows), steps, _count(size, trained), _bytes(memory), _bytes(trained * 4))


def _student_needs(recipe: Recipe, size: Size | None, rows: int | None) -> tuple[str, ...]:
    fit = recipe.distil.fit
    steps = _steps(rows, fit)
    if size is None:
        return (_known(rows), steps, "?", "?", "?")
    lora = recipe.student.lora
    trained = lora_weights(size, lora) if lora else size.total
    memory = training_bytes(
        size, weights=size.total * 4.0, trainable=trained, fit=fit, max_tokens=recipe.data.max_tokens
    )
    return (_known(rows), steps, _count(size, trained), _bytes(memory), _bytes(size.total * 4))


def _steps(rows: int | None, fit: Fit) -> str:
    if rows is None:
        return _known(fit.max_steps)
    steps = fit.epochs * math.ceil(rows / fit.batch_size)
    return str(min(steps, fit.max_steps) if fit.max_steps else steps)


def _known(count: int | None) -> str:
    return "?" if count is None else str(count)


def _count(size: Size | None, trained: int | None = None) -> str:
    if size is None:
        return "?"
    return f"{size.total / 1e6:.1f}M" + (f" ({trained / 1e6:.2f}M)" if trained is not None else "")


def _bytes(count: Any) -> str:
    if count is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
