"""The teacher: new, saved, and loaded in each of its forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distilpeft.data.sources import Source
from distilpeft.errors import InputError
from distilpeft.machine.files import read_json, write_json
from distilpeft.machine.runtime import Runtime
from distilpeft.models import loading, lora, weights
from distilpeft.models.pair import (
    ADAPTER,
    HEADS,
    MODEL,
    Loaded,
    architecture,
    load_reader,
    teacher_source,
    tokenizer_digest,
)
from distilpeft.models.parallel import offload_layers, shard_layers
from distilpeft.recipe import Recipe
from distilpeft.recipe.training import Precision
from distilpeft.tasks.rows import TaskData, task_of


def new_teacher(runtime: Runtime, recipe: Recipe, data: TaskData, tokenizer: Any) -> tuple[Any, list[str]]:
    """The untuned teacher, ready to be trained or used as it is, and the names of its heads.

    Raises:
        InputError: it is to be used as it is, but came without some of its weights.
    """
    model, heads = _base(runtime, recipe, recipe.teacher.quantize, tokenizer, recipe.teacher.precision)
    if recipe.teacher.fit is None:
        task_of(recipe).prepare(model)
        used = set(dict(model.named_parameters()))
        fresh = [name for name in model.fresh if name in used]
        if fresh:
            raise InputError(
                f"teacher.fit: null uses {recipe.teacher.model} as it is, but it came without {fresh[0]}"
                f"{f' and {len(fresh) - 1} more' if len(fresh) > 1 else ''}; tune it, or take a model for this task"
            )
        return model.requires_grad_(False).eval(), heads
    _start_head(recipe, data, model, teacher_source(recipe))
    if recipe.teacher.lora is None:
        weights.unfreeze(model, architecture(recipe))
    if recipe.teacher.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.teacher.lora is not None:
        model = lora.add_lora(model, recipe.teacher.lora, architecture(recipe), heads, "teacher.lora")
    task_of(recipe).prepare(model)
    return model, heads


def save_teacher(model: Any, folder: Path, heads: list[str], *, tuned: bool = True) -> None:
    """Save what was tuned: the adapter with its heads, the whole model, or nothing."""
    if hasattr(model, "peft_config"):
        # Nothing of ours resizes embeddings; to find out, PEFT would look for the base's configuration on the hub.
        model.save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # an empty form, its tags in another order every time
    elif tuned:
        model.save_pretrained(str(folder / MODEL))
    write_json(folder / HEADS, {"modules": heads})


def load_teacher(
    runtime: Runtime,
    recipe: Recipe,
    folder: Path,
    precision: Precision,
    *,
    full_precision: bool = False,
    merged: bool = False,
    placed: bool = False,
) -> Loaded:
    """The tuned teacher, frozen.

    Args:
        runtime: the device.
        recipe: names its base.
        folder: its artifact.
        precision: in which 4-bit weights are multiplied; that of the stage, so that its figures are of one kind.
        full_precision: put the adapter on the unquantized base instead.
        merged: merge the adapter into the (dequantized) base, as an ordinary model.
        placed: put it where `teacher.place` says, instead of whole on the device.
    """
    place = recipe.teacher.place if placed else "replicated"
    whole = recipe.teacher.fit is not None and recipe.teacher.lora is None  # all weights tuned, which are not quantized
    quantize = "none" if full_precision or whole else recipe.teacher.quantize
    # quantized weights are made on the device; others come to it layer by layer
    device = runtime.device if place == "replicated" or quantize != "none" else torch.device("cpu")
    source = teacher_source(recipe)
    tokenizer = load_reader(recipe, source)
    if whole:
        tuned = Source(str(folder / MODEL), folder / MODEL)
        model, _ = loading.load_base(
            tuned, architecture(recipe), quantize="none", dtype=recipe.teacher.dtype,
            device=device, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    else:
        heads = read_json(folder / HEADS, f"delete {folder} to make it again")["modules"]
        model, _ = _base(runtime, recipe, quantize, tokenizer, precision, heads, device)
        if recipe.teacher.fit is None:
            model = loading.dequantize(model) if merged else model
        else:
            model = lora.merge(model, folder / ADAPTER) if merged else lora.load_adapter(model, folder / ADAPTER)
    task_of(recipe).prepare(model)
    model.requires_grad_(False).eval()
    if place == "offloaded":
        offload_layers(runtime, model)
    elif place == "sharded":
        shard_layers(runtime, model)
    return Loaded(model, tokenizer, tokenizer_digest(source))


def _start_head(recipe: Recipe, data: TaskData, model: Any, tokens: Source) -> None:
    """Let a new head start at the answer usual in training, where the task has one."""
    rows = data.tokens("train", load_reader(recipe, tokens), tokenizer_digest(tokens))
    bias_C = data.task.head_start(rows)
    if bias_C is not None:
        weights.start_head(model, bias_C)


def _base(
    runtime: Runtime,
    recipe: Recipe,
    quantize: loading.Quantize,
    tokenizer: Any,
    precision: Precision,
    heads: list[str] | None = None,
    device: torch.device | None = None,
) -> tuple[Any, list[str]]:
    teacher = recipe.teacher
    runtime.seed(recipe.seed)
    return loading.load_base(
        teacher_source(recipe), architecture(recipe), quantize=quantize, dtype=teacher.dtype,
        compute_dtype=runtime.compute_dtype(precision),
        device=device or runtime.device, pad_token_id=tokenizer.pad_token_id, heads=heads,
    )  # fmt: skip
