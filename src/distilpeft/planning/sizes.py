"""Weights and bytes of a recipe's models, from configurations and file headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from distilpeft.data.model_files.gguf import gguf_config
from distilpeft.data.model_files.quantized import logical_shapes, packed_bytes
from distilpeft.data.model_files.recipe_models import student_of, teacher_of
from distilpeft.data.model_files.tokens import Words, embedding_units
from distilpeft.data.model_files.widths import Widths, axes, narrowed
from distilpeft.data.published import SHAPES, known_model, shapes_of
from distilpeft.data.sources import Source, is_gguf, model_config, num_layers, num_parameters
from distilpeft.machine.files import JsonObject
from distilpeft.machine.host import cpu_has_bf16
from distilpeft.planning.memory import BYTES, Machine, MemoryModel, Placement, Shape
from distilpeft.planning.text_profile import LETTERS_PER_TOKEN
from distilpeft.recipe import Recipe
from distilpeft.recipe.student import STATIC_TYPE, FromTeacher, Static, Student
from distilpeft.recipe.training import Fit, Lora
from distilpeft.tasks.prompts.prompt import prompt_of


@dataclass(frozen=True)
class Size:
    """Weights of a model: all, those in linear layers of the body (which are quantized), and its configuration.

    `packed_bytes` is what one of these takes, where the files hold them quantized and they stay so.
    """

    total: int
    linear: Mapping[str, tuple[int, ...]]
    layers: int
    config: Mapping[str, Any]
    packed_bytes: float | None = None

    @property
    def num_linear(self) -> int:
        """Weights in linear layers."""
        return sum(math.prod(shape) for shape in self.linear.values())

    @property
    def shape(self) -> Shape:
        """What its memory depends on."""
        return Shape.of(self.config, self.total, self.num_linear, self.layers)


def teacher_size(recipe: Recipe) -> Size | None:
    """The teacher's size."""
    return size_of(teacher_of(recipe))


def size_of(source: Source) -> Size | None:
    """A model's size from the headers of its files, or as it was published; None if neither is known here."""
    shapes, config = logical_shapes(source), model_config(source)
    if shapes is None or config is None:
        known = _in_gguf(source.path) if source.path is not None and is_gguf(source) else known_model(source)
        if known is None:
            return None
        config, shapes = known
    linear = {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 2 and "embed" not in name and not name.startswith("lm_head")
    }
    size = Size(num_parameters(shapes), linear, num_layers(config) or 0, config, packed_bytes(source))
    return size if size.shape.hidden or size.shape.maps else None


def _in_gguf(path: Path) -> tuple[JsonObject, dict[str, tuple[int, ...]]] | None:
    """Configuration and shapes of a GGUF file that no run has converted yet."""
    config = gguf_config(path)
    return (config, shapes_of(config)) if config is not None and config["model_type"] in SHAPES else None


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
    return Size(size.total - round(lost), kept, len(layers), size.config)


def narrower(size: Size, chosen: FromTeacher) -> Size:
    """The size of a narrower student; weights outside linear layers are taken to scale with the hidden units."""
    if not chosen.is_narrower:
        return size
    old, new = Widths.of(size.config), narrowed(chosen, size.config)
    linear = {
        name: tuple(
            length if axis is None else length * new.size(axis) // old.size(axis)
            for length, axis in zip(shape, axes(name, shape, old, has_inner=False) or (None, None), strict=True)
        )
        for name, shape in size.linear.items()
    }
    rest = (size.total - size.num_linear) * new.hidden // old.hidden
    settings = {**size.config, **new.settings(size.config)}
    return Size(rest + sum(math.prod(shape) for shape in linear.values()), linear, size.layers, settings)


def _adapted(size: Size, lora: Lora) -> list[tuple[int, ...]]:
    """Shapes of the matrices that an adapter sits on: (out, in)."""
    targets = lora.target_modules
    return [
        shape
        for name, shape in size.linear.items()
        if isinstance(targets, str) or any(f".{name}".endswith(f".{target}.weight") for target in targets)
    ]


def lora_weights(size: Size, lora: Lora) -> int:
    """Trainable weights of an adapter: rank · (in + out) for every matrix it sits on."""
    return sum(lora.rank * sum(shape) for shape in _adapted(size, lora))


def _inputs(size: Size, lora: Lora | None) -> int:
    return sum(shape[1] for shape in _adapted(size, lora)) if lora else 0


def weight_bytes(recipe: Recipe, size: Size) -> tuple[float, float]:
    """Bytes of the teacher's base: all, and those in its layers."""
    teacher = recipe.teacher
    body = size.packed_bytes or BYTES[teacher.dtype if teacher.quantize == "none" else teacher.quantize]
    inside = size.num_linear * body
    return inside + (size.total - size.num_linear) * BYTES[teacher.dtype], inside


def teacher_load(recipe: Recipe, size: Size, kind: str) -> MemoryModel:
    """The tuning of the teacher."""
    teacher = recipe.teacher
    assert teacher.fit is not None, "a teacher that is used as it is has no such load"
    tuned = lora_weights(size, teacher.lora) if teacher.lora else size.total
    whole, _ = weight_bytes(recipe, size)
    return MemoryModel(
        size.shape, whole + 4 * tuned if teacher.lora else whole, tuned, _teacher_tokens(recipe, size),
        teacher.fit.batch_size, _is_half(teacher.fit, kind), recipe.kind.is_language_model,
        adapted=_inputs(size, teacher.lora), adapter_dropout=bool(teacher.lora and teacher.lora.dropout),
    )  # fmt: skip


def targets_load(recipe: Recipe, size: Size, machine: Machine) -> MemoryModel:
    """The frozen teacher while it gives soft targets to be kept."""
    whole = (size.shape, *weight_bytes(recipe, size))
    half = _is_half(recipe.teacher.fit or recipe.distil.fit, machine.kind)
    most = recipe.targets.micro_batch_size * machine.count  # larger ones gain nothing: no gradient waits for them
    language = recipe.kind.is_language_model
    return MemoryModel(size.shape, 0.0, 0, _teacher_tokens(recipe, size), most, half, language, whole)


def student_load(recipe: Recipe, student: Size, teacher: Size | None, kind: str) -> MemoryModel:
    """The training of the student, with the teacher that may run beside it."""
    fit, lora = recipe.distil.fit, recipe.student.lora
    tuned = lora_weights(student, lora) if lora else student.total
    beside = None if teacher is None else (teacher.shape, *weight_bytes(recipe, teacher))
    return MemoryModel(
        student.shape, 4.0 * student.total + (4 * tuned if lora else 0), tuned, row_tokens(recipe, student),
        fit.batch_size,
        _is_half(fit, kind), recipe.kind.is_language_model, beside,
        adapted=_inputs(student, lora), adapter_dropout=bool(lora and lora.dropout),
    )  # fmt: skip


def _teacher_tokens(recipe: Recipe, size: Size) -> int:
    """Tokens of the longest row as the teacher reads it."""
    return row_tokens(recipe, size) + int(prompt_tokens(recipe, recipe.data.max_tokens))


def row_tokens(recipe: Recipe, size: Size) -> int:
    """Tokens of the longest row; of a picture its patches, or 1 where convolutions read it."""
    if not recipe.kind.reads_images:
        return recipe.data.max_tokens
    side, patch = size.config.get("image_size"), size.config.get("patch_size")
    return (side // patch) ** 2 + 1 if isinstance(side, int) and isinstance(patch, int) and patch else 1


def prompt_tokens(recipe: Recipe, row: float) -> float:
    """Tokens that a prompted teacher reads besides those of a row, if the texts of its shots have `row` each."""
    prompt, words = prompt_of(recipe), Words.of(teacher_of(recipe).reader)
    if prompt is None:
        return 0

    def count(text: str) -> int:
        return len(text) // LETTERS_PER_TOKEN + 1 if words is None else len(words.core.encode(text).ids)

    asked, answer = count(prompt.template), max(map(count, prompt.answers))
    branches = len(prompt.endings) * len(prompt.answers) * answer + sum(map(count, prompt.labels))
    return asked + branches + recipe.teacher.shots * (asked + answer + row)


def _is_half(fit: Fit, kind: str) -> bool:
    return fit.precision in ("bf16", "fp16") or (fit.precision == "auto" and (kind == "GPU" or cpu_has_bf16()))


def own_ways(recipe: Recipe) -> tuple[Placement, Placement, Placement]:
    """How the recipe tunes the teacher, keeps its soft targets, and trains the student."""
    teacher, fit = recipe.teacher, recipe.distil.fit
    mode = recipe.targets.mode if recipe.distil.alpha > 0 else "cached"
    micro = [min(one.micro_batch_size, one.batch_size) for one in (teacher.fit or fit, fit)]
    quantized = teacher.quantize != "none"
    return (
        Placement(
            "tune", "ddp" if quantized else recipe.parallel, "replicated", teacher.gradient_checkpointing, micro[0]
        ),
        Placement("give", "ddp", teacher.place, checkpointing=False, micro_batch_size=recipe.targets.micro_batch_size),
        Placement(mode, recipe.parallel, teacher.place, recipe.student.gradient_checkpointing, micro[1]),
    )


def student_size(recipe: Recipe, kept: int | None = None) -> Size | None:
    """The student's size, if the files that tell are on this machine; `kept` tokens are left of its vocabulary."""
    size = _student_size(recipe)
    if size is None or kept is None:
        return size
    shape, width = size.shape, size.config.get("embedding_size")  # ALBERT's are narrower than its layers
    matrices = 2 if recipe.kind.is_language_model and not shape.tied else 1
    width = width if isinstance(width, int) else shape.hidden
    width += recipe.student.static is not None  # a weight for each token
    lost = max(shape.vocabulary - kept, 0) * matrices * width
    return replace(size, total=size.total - lost, config={**size.config, "vocab_size": kept})


def _student_size(recipe: Recipe) -> Size | None:
    student: Student = recipe.student
    if student.from_config is not None:
        return None
    if student.static is not None:
        return _static(recipe, student.static)
    if student.from_teacher is not None:
        size = teacher_size(recipe)
        return narrower(cut(size, student.from_teacher.of(size.layers)), student.from_teacher) if size else None
    assert student.model is not None
    return size_of(student_of(recipe))


def _static(recipe: Recipe, static: Static) -> Size | None:
    """The size of a static student: a vector and a weight for each of the teacher's tokens, and the head."""
    teacher = teacher_size(recipe)
    if teacher is None:
        return None
    tokens, width = teacher.shape.vocabulary, static.dim or embedding_units(teacher.config) or 0
    total = tokens * (width + 1)
    if recipe.kind.has_labels:
        sizes = [width * (4 if recipe.reads_pairs else 1), *([static.hidden] if static.hidden else [])]
        sizes.append(len(getattr(recipe.task, "labels", ())) or 1)
        total += sum((into + 1) * out for into, out in pairwise(sizes))
    shape = {"model_type": STATIC_TYPE, "vocab_size": tokens, "hidden_size": width}
    return Size(total, {}, 0, shape) if width and tokens else None
