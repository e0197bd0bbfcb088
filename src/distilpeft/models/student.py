"""The student: built, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distilpeft.data.sources import Source
from distilpeft.machine.runtime import Runtime
from distilpeft.models import cutting, loading, lora, weights
from distilpeft.models.pair import Loaded, architecture, load_reader, student_source, tokenizer_digest, tokenizer_source
from distilpeft.models.teacher import _start_head, load_teacher
from distilpeft.recipe import Recipe
from distilpeft.tasks.rows import TaskData, task_of


def new_student(runtime: Runtime, recipe: Recipe, data: TaskData, teacher: Path | None) -> Loaded:
    """The untrained student with all its weights trainable, or its LoRA adapter.

    Args:
        runtime: the device.
        recipe: its `student` section.
        data: the rows.
        teacher: the teacher's artifact; needed by `from_teacher`.
    """
    student, source = recipe.student, student_source(recipe)
    tokens = tokenizer_source(recipe)
    tokenizer = load_reader(recipe, tokens)
    runtime.seed(recipe.seed)  # the head, or everything, may be random: the same for every run of this recipe
    if student.from_teacher is not None:
        assert teacher is not None
        model = load_teacher(runtime, recipe, teacher, "fp32", merged=True).model.float()
        cutting.keep_layers(model, student.from_teacher)
    elif student.from_config is not None:
        overrides = student.from_config.overrides
        model = loading.from_config(source, architecture(recipe), overrides, tokenizer.pad_token_id)
    else:
        model, _ = loading.load_base(
            source, architecture(recipe), quantize="none", dtype="fp32",
            device=runtime.device, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    if student.from_teacher is None:
        _start_head(recipe, data, model, tokens)
    model = model.to(runtime.device)
    weights.unfreeze(model, architecture(recipe))
    if student.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if student.lora is not None:
        heads = loading.head_modules(architecture(recipe), model.config)
        model = lora.add_lora(model, student.lora, architecture(recipe), heads, "student.lora")
    task_of(recipe).prepare(model)
    return Loaded(model, tokenizer, tokenizer_digest(tokens))


def save_student(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save an ordinary transformers model (an adapter is merged) with its tokenizer."""
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    model.to(dtype).save_pretrained(str(folder))
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer, or what reads pictures, without the length that rows were last cut to.

    Its files would otherwise tell of what this process has done before.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        core.no_truncation()
        core.no_padding()
    tokenizer.save_pretrained(str(folder))


def load_student(runtime: Runtime, recipe: Recipe, folder: Path) -> Loaded:
    """A saved student or export, frozen, loaded as any user of transformers would."""
    model = architecture(recipe).auto_class.from_pretrained(str(folder), dtype="auto")
    tokenizer = load_reader(recipe, Source(str(folder), folder))
    digest = tokenizer_digest(tokenizer_source(recipe))
    task_of(recipe).prepare(model)
    return Loaded(model.to(runtime.device).requires_grad_(False).eval(), tokenizer, digest)
