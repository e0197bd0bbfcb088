"""The teacher: new, saved, and loaded in each of its forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distilpeft.data.model_files.adapters import is_continued
from distilpeft.data.sources import Source
from distilpeft.errors import InputError
from distilpeft.machine.files import read_json, write_json
from distilpeft.machine.runtime import Runtime
from distilpeft.models import loading, lora, prompted, weights
from distilpeft.models.bases.quantized import Quantize, dequantize
from distilpeft.models.context import Context
from distilpeft.models.pair import ADAPTER, HEADS, MODEL, Loaded, Pair
from distilpeft.models.parallel import offload_layers, shard_layers
from distilpeft.recipe.training import Precision
from distilpeft.tasks.prompts.reader import PromptReader
from distilpeft.tasks.rows import RowReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def new_teacher(context: Context) -> tuple[PreTrainedModel, list[str]]:
    """The untuned teacher, ready to be trained or used as it is, and the names of its heads.

    Raises:
        InputError: it is to be used as it is, but came without some of its weights.
    """
    runtime, pair, teacher = context.runtime, context.pair, context.recipe.teacher
    continued = is_continued(teacher, pair.teacher)
    source = pair.teacher.base if continued else pair.teacher
    model, heads = _base(runtime, pair, source, teacher.quantize, teacher.precision)
    if teacher.fit is None:
        return _as_it_is(pair, model), heads
    start_head(context, model, pair.teacher_reader)
    if teacher.lora is None:
        weights.unfreeze(model, pair.teacher_architecture)
    if teacher.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if teacher.lora is not None:
        _check_trainable(model, pair.teacher)
        model = lora.add_lora(model, teacher.lora, pair.teacher_architecture, heads, "teacher.lora")
        if continued:
            loading.take_over_adapter(model, pair.teacher, pair.teacher_architecture, heads)
    pair.task.prepare(model)
    return model, heads


def _check_trainable(model: PreTrainedModel, source: Source) -> None:
    """Refuse packed weights through which transformers gives no gradient."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = str(getattr(quantizer.quantization_config.quant_method, "value", "its method"))
        raise InputError(
            f"teacher.fit: the weights of {source.title} are quantized with {method}, on which nothing can be tuned; "
            "use the teacher unchanged (fit: null)"
        )


def _as_it_is(pair: Pair, model: PreTrainedModel) -> PreTrainedModel:
    pair.task.prepare(model)
    own = getattr(model, "get_base_model", lambda: model)()
    used = {name.replace(".base_layer", "").replace(".original_module", "") for name, _ in own.named_parameters()}
    fresh = [name for name in model.fresh if name in used]
    if fresh:
        raise InputError(
            f"teacher.fit: null uses {pair.recipe.teacher.model} unchanged, but it came without {fresh[0]}"
            f"{f' and {len(fresh) - 1} more' if len(fresh) > 1 else ''}; tune it, or take a model for this task"
        )
    return model.requires_grad_(False).eval()


def start_head(context: Context, model: PreTrainedModel, reader: RowReader) -> None:
    """Let a new head start at the answer usual in training, where the task has one."""
    bias_C = context.task.head_start(context.data.tokens("train", reader))
    if bias_C is not None:
        weights.start_head(model, bias_C)


def save_teacher(model: PreTrainedModel, folder: Path, heads: list[str], *, tuned: bool = True) -> None:
    """Save what was tuned: the adapter with its heads, the whole model, or nothing."""
    if hasattr(model, "peft_config") and tuned:
        # Nothing of ours resizes embeddings; to find out, PEFT would look for the base's configuration on the hub.
        model.save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # an empty form, its tags in another order every time
    elif tuned:
        model.save_pretrained(str(folder / MODEL))
    write_json(folder / HEADS, {"modules": heads})


def load_teacher(runtime: Runtime, pair: Pair, folder: Path, precision: Precision, *, placed: bool = False) -> Loaded:
    """The tuned teacher as it was tuned: its adapter on the quantized base, frozen.

    Args:
        runtime: the device.
        pair: names its base.
        folder: its artifact.
        precision: in which 4-bit weights are multiplied; that of the stage, so that its figures are of one kind.
        placed: put it where `teacher.place` says, instead of whole on the device.
    """
    return _load(runtime, pair, folder, precision, pair.recipe.teacher.quantize, lora.load_adapter, placed=placed)


def load_teacher_unquantized(
    runtime: Runtime, pair: Pair, folder: Path, precision: Precision, *, placed: bool = False
) -> Loaded:
    """The same adapter on the base in full precision; see `load_teacher`."""
    return _load(runtime, pair, folder, precision, "none", lora.load_adapter, placed=placed)


def load_teacher_merged(
    runtime: Runtime, pair: Pair, folder: Path, precision: Precision, *, placed: bool = False
) -> Loaded:
    """An ordinary model: the adapter merged into the dequantized base; see `load_teacher`."""
    return _load(runtime, pair, folder, precision, pair.recipe.teacher.quantize, lora.merge, placed=placed)


def _load(
    runtime: Runtime, pair: Pair, folder: Path, precision: Precision, quantize: Quantize,
    join: Callable[[PreTrainedModel, Path], PreTrainedModel], *, placed: bool,
) -> Loaded:  # fmt: skip
    """`join` puts the adapter on its base."""
    teacher = pair.recipe.teacher
    whole = teacher.fit is not None and teacher.lora is None  # all weights were tuned, so none are quantized
    place = teacher.place if placed else "replicated"
    # Quantized weights are made on the device; others come to it layer by layer.
    on_device = place == "replicated" or (quantize != "none" and not whole)
    device = runtime.device if on_device else torch.device("cpu")
    if whole:
        tuned = Source(str(folder / MODEL), folder / MODEL)
        model, _ = loading.load_base(
            tuned, pair.teacher_architecture, quantize="none", dtype=teacher.dtype, device=device,
            pad_token_id=pair.teacher_reader.tokenizer.pad_token_id,
        )  # fmt: skip
        _ask(pair, model)
    else:
        heads = read_json(folder / HEADS, f"delete {folder} to make it again")["modules"]
        merged = join is lora.merge
        apart = is_continued(teacher, pair.teacher) or (merged and teacher.fit is None)
        source = pair.teacher.base if apart else pair.teacher
        model, _ = _base(runtime, pair, source, quantize, precision, heads, device)
        if teacher.fit is not None:
            model = join(model, folder / ADAPTER)
        elif merged:
            model = loading.join_adapter(dequantize(model), pair.teacher, pair.teacher_architecture, heads)
    pair.task.prepare(model)
    model.requires_grad_(False).eval()
    if place == "offloaded":
        offload_layers(runtime, model)
    elif place == "sharded":
        shard_layers(runtime, model)
    return Loaded(model, pair.teacher_reader)


def _base(
    runtime: Runtime, pair: Pair, source: Source, quantize: Quantize, precision: Precision,
    heads: list[str] | None = None, device: torch.device | None = None,
) -> tuple[PreTrainedModel, list[str]]:  # fmt: skip
    runtime.seed(pair.recipe.seed)
    model, heads = loading.load_base(
        source, pair.teacher_architecture, quantize=quantize, dtype=pair.recipe.teacher.dtype,
        compute_dtype=runtime.compute_dtype(precision), device=device or runtime.device,
        pad_token_id=pair.teacher_reader.tokenizer.pad_token_id, heads=heads,
    )  # fmt: skip
    _ask(pair, model)
    return model, heads


def _ask(pair: Pair, model: PreTrainedModel) -> None:
    """Let a language model answer with classes, if the recipe has a prompt for it."""
    teacher, reader = pair.recipe.teacher, pair.teacher_reader.tokenizer
    if isinstance(reader, PromptReader):
        prompted.attach(model, reader, per_token=teacher.per_token, calibrate=teacher.calibrate)
