"""The student: built, saved and loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distilpeft.data.sources import Source
from distilpeft.machine.runtime import Runtime
from distilpeft.models import loading, lora, vocabulary, weights
from distilpeft.models.bases.embeddings import cut_embeddings
from distilpeft.models.context import Context
from distilpeft.models.cutting.importance import importance_of
from distilpeft.models.cutting.layers import keep_layers
from distilpeft.models.cutting.widths import narrow
from distilpeft.models.pair import Loaded, Pair
from distilpeft.models.static import start
from distilpeft.models.teacher import load_teacher_merged, start_head
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import QuestionAnswering
from distilpeft.tasks.rows import RowReader
from distilpeft.tasks.task import InputReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CUTTING = ("max_length", "stride", "truncation_strategy")
"""What transformers notes of a tokenizer.json that cuts texts, and would write a second time, for nobody to read."""


def new_student(context: Context, teacher: Path | None) -> Loaded:
    """The untrained student with all its weights trainable, or its LoRA adapter.

    Args:
        context: the run.
        teacher: the teacher's artifact; needed by `from_teacher` and `static`.
    """
    runtime, pair, student = context.runtime, context.pair, context.recipe.student
    reader = pair.student_reader
    runtime.seed(context.recipe.seed)  # the head, or everything, may be random: the same for every run of this recipe
    model = _untrained(context, teacher)
    if pair.cut is not None and student.static is None:  # which is made of the kept tokens' embeddings
        cut_embeddings(model, pair.cut.kept_K)
    if student.from_teacher is None:
        start_head(context, model, reader)
    model = model.to(runtime.device)
    weights.unfreeze(model, pair.architecture)
    if student.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if student.lora is not None:
        heads = loading.head_modules(pair.architecture, model.config)
        model = lora.add_lora(model, student.lora, pair.architecture, heads, "student.lora")
    pair.task.prepare(model)
    return Loaded(model, reader)


def _untrained(context: Context, teacher: Path | None) -> PreTrainedModel:
    """Layers or word embeddings of the teacher, random weights, or pretrained ones."""
    runtime, pair, student = context.runtime, context.pair, context.recipe.student
    reader = pair.student_reader if pair.cut is None else pair.cut.before
    pad = reader.tokenizer.pad_token_id
    if student.is_of_teacher:
        assert teacher is not None
        merged = load_teacher_merged(runtime, pair, teacher, "fp32").model.float()
        return _of_teacher(context, teacher.name, merged)
    if student.from_config is not None:
        return loading.from_config(pair.student, pair.architecture, student.from_config.overrides, pad)
    model, _ = loading.load_base(
        pair.student, pair.architecture, quantize="none", dtype="fp32", device=runtime.device, pad_token_id=pad
    )
    return model


def _of_teacher(context: Context, name: str, teacher: PreTrainedModel) -> PreTrainedModel:
    """A student made of the merged teacher's weights; `name` is the teacher's, different for every other one."""
    student, reader, architecture = context.recipe.student, context.pair.student_reader, context.pair.architecture
    if student.from_teacher is not None:
        narrower = narrow(teacher, student.from_teacher, partial(importance_of, context, name, teacher))
        keep_layers(narrower, student.from_teacher)
        return narrower
    assert student.static is not None
    counts_V = None
    if student.static.weighting == "sif":
        counts_V = vocabulary.counts(context.data.tokens("train", reader).dataset)
    return start.new(
        architecture.auto_class, architecture.options, reader.tokenizer, teacher, student.static,
        pair=context.recipe.reads_pairs, counts_V=counts_V,
        kept_K=None if context.pair.cut is None else context.pair.cut.kept_K,
    )  # fmt: skip


def save_student(recipe: Recipe, model: PreTrainedModel, tokenizer: InputReader, folder: Path) -> None:
    """Save an ordinary transformers model in float32 (an adapter is merged) with its tokenizer."""
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    model.to(torch.float32).save_pretrained(str(folder))
    save_tokenizer(recipe, tokenizer, folder)


def save_tokenizer(recipe: Recipe, tokenizer: InputReader, folder: Path) -> None:
    """Save a tokenizer, or what reads pictures, whatever this process has cut and padded with it before.

    Its files name the length at which rows were cut in training, and `tokenizers` alone cuts there: other programs
    then read of a long text what the model knows. Language models keep the limit that they came with, since prompts
    and answers share it; questions are answered in windows, which no file can ask for.
    """
    if recipe.kind.reads_images:
        tokenizer.save_pretrained(str(folder))
        return
    limit = tokenizer.model_max_length
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        core.no_truncation()
        core.no_padding()
    if not recipe.kind.is_language_model:
        tokenizer.model_max_length = min(recipe.data.max_tokens, limit)
        for name in CUTTING:
            tokenizer.init_kwargs.pop(name, None)
        if core is not None and not isinstance(recipe.task, QuestionAnswering):
            core.enable_truncation(tokenizer.model_max_length, direction=tokenizer.truncation_side)
    tokenizer.save_pretrained(str(folder))
    tokenizer.model_max_length = limit
    if core is not None:
        core.no_truncation()


def load_student(runtime: Runtime, pair: Pair, folder: Path) -> Loaded:
    """A saved student or export, frozen, loaded as any user of transformers would."""
    model = pair.architecture.auto_class.from_pretrained(str(folder), dtype="auto")
    tokenizer = pair.load_reader(Source(str(folder), folder))
    pair.task.prepare(model)
    reader = RowReader(tokenizer, pair.student_reader.digest)
    return Loaded(model.to(runtime.device).requires_grad_(False).eval(), reader)
