"""Models: load and quantize a base, put LoRA on it, merge it exactly, and cut a student out of it.

Two library traps are held here. Heads must never be quantized or frozen, random as they mostly are: they are
found by building the architecture on the meta device, not by a list of names. And bitsandbytes repacks 4-bit
weights for CPU inference in any eval-mode forward, after which LoRA gradients are None: that is switched off.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from distilpeft.data import pictures
from distilpeft.data.model_files.heads import Head, head_of
from distilpeft.data.model_files.quantized import form_of
from distilpeft.data.sources import Source, gguf_folder, is_gguf, saved_modules
from distilpeft.errors import InputError, machine_fault
from distilpeft.machine.files import is_whole, publish_folder, seal_folder
from distilpeft.models.bases import adapters
from distilpeft.models.bases import heads as finished_heads
from distilpeft.models.bases.quantized import Packing, Quantize, unmark
from distilpeft.models.static import architecture as _static  # noqa: F401 - tells the Auto classes of static students

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Architecture:
    """What a task asks of a model: the auto class, its options, PEFT's name of the task, and whether heads are new.

    New heads are trained in full beside an adapter; pretrained ones only by an adapter that names them.
    """

    def __init__(self, auto_class: str, peft_task: str | None, options: dict[str, Any], *, train_heads: bool) -> None:
        self.auto_class: type[transformers.AutoModel] = getattr(transformers, auto_class)
        self.peft_task = peft_task
        self.options = options
        self.train_heads = train_heads


def load_tokenizer(source: Source) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end-of-text token.

    Raises:
        InputError: it cannot be loaded.
    """
    source = source.reader
    tokenizer = _load("tokenizer", source, transformers.AutoTokenizer.from_pretrained, revision=source.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_picture_reader(source: Source) -> pictures.Reader:
    """How an image model reads pictures.

    Raises:
        InputError: it has no such file, or asks for what is not supported.
    """
    if source.path is None:
        file = _load("image processor", source, _downloaded, revision=source.revision)
    else:
        file = source.path / pictures.FILE
    return pictures.Reader.of(file, source.name)


def _downloaded(name: str, revision: str | None, *, trust_remote_code: bool) -> Path:
    del trust_remote_code  # a file of numbers
    return Path(huggingface_hub.hf_hub_download(name, pictures.FILE, revision=revision))


def load_base(
    source: Source,
    architecture: Architecture,
    *,
    quantize: Quantize,
    dtype: str,
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device,
    pad_token_id: int | None,
    heads: list[str] | None = None,
) -> tuple[transformers.PreTrainedModel, list[str]]:
    """Load a pretrained model for the task.

    A finished head is put into the order of the recipe's classes. The adapter of a source is merged into weights in
    floating point, and put on quantized ones.

    Args:
        source: where it is.
        architecture: what the task asks for.
        quantize: `nf4` (double quantization), `int8` or `none`, for all linear layers but the heads. Weights that were
            saved quantized are used as they are if this says so, and dequantized for `none` where that can be done.
        dtype: of the weights that are not quantized.
        compute_dtype: in which 4-bit weights are multiplied.
        device: where to put it.
        pad_token_id: of the tokenizer; decoder classifiers find the last token by it.
        heads: modules to leave unquantized, where they are known from an earlier load.

    Returns:
        The model and its heads: the modules outside the pretrained body, and any inside it that came without
        weights. They are never quantized, and trained in full.

    Raises:
        InputError: it cannot be loaded.
    """
    config = configuration(source, architecture, {})
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id
    heads = head_modules(architecture, config, trusted=source.trusted) if heads is None else list(heads)
    packing = Packing(quantize, form_of(config.to_dict()), compute_dtype, source)
    while True:
        own = copy.deepcopy(config)
        model, info = _load(
            "model", source, architecture.auto_class.from_pretrained, revision=source.revision, config=own,
            dtype=DTYPES[dtype], ignore_mismatched_sizes=True, use_safetensors=True, output_loading_info=True,
            **packing.options(own, heads, device),
        )  # fmt: skip
        missing = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
        more = sorted({key.rpartition(".")[0] for key in missing if not _inside(key, heads)})
        heads += more
        if not packing.packs or not more:
            break  # else a part of the body has random weights: load again, without quantizing it
    model = packing.opened(model, heads, DTYPES[dtype])
    head = own_head(source.base, architecture)
    model.fresh = sorted(finished_heads.settle(model, heads, head, missing, source.title))
    if source.adapter is not None:
        model = join_adapter(model, source, architecture, heads)
    return model if getattr(model, "is_quantized", False) else model.to(device), heads


def join_adapter(
    model: transformers.PreTrainedModel, source: Source, architecture: Architecture, heads: list[str]
) -> transformers.PreTrainedModel:
    """A base with the adapter of its source, if any; its head is put into the order of the recipe's classes."""
    if source.adapter is None:
        return model
    head = _adapter_head(source, architecture)
    others = heads if head.verdict == "other" else []  # a head that does not fit stays new
    fresh = {name for name in model.fresh if _inside(name, others) or not adapters.brought(source.adapter, name)}
    packed = getattr(model, "is_quantized", False)
    model = adapters.join(model, source, architecture.peft_task, merged=not packed, partly=bool(others))
    model.fresh = sorted(finished_heads.settle(model, heads, head, fresh, source.title))
    return model


def take_over_adapter(
    model: transformers.PreTrainedModel, source: Source, architecture: Architecture, heads: list[str]
) -> None:
    """Start a new adapter from that of a source; a head that comes with it as in `join_adapter`."""
    head = _adapter_head(source, architecture)
    adapters.take_over(model, source, partly=head.verdict == "other")
    finished_heads.settle(model, heads, head, set(), source.title)


def _adapter_head(source: Source, architecture: Architecture) -> Head:
    """The head that an adapter brings; its classes follow from its base's where it names none."""
    assert source.adapter is not None
    return own_head(source, architecture) if saved_modules(source.adapter) else Head("none")


def own_head(source: Source, architecture: Architecture) -> Head:
    """The classes of the head that a model brings, compared with those that the task asks for."""
    labels = architecture.options.get("id2label")
    if labels is None:
        return Head("none")
    suffix = architecture.auto_class.__name__.removeprefix("AutoModel")
    return head_of(source, _raw_configuration(source, {}).to_dict(), suffix, tuple(labels.values()))


def head_modules(
    architecture: Architecture, config: transformers.PretrainedConfig, *, trusted: bool = False
) -> list[str]:
    """Names of the modules outside the pretrained body (classifier, score, ...), from the architecture itself.

    Of language models the layer that gives logits: their other parts may all be siblings (T5). Code that comes with the
    model is run only if it is `trusted`.
    """
    if architecture.auto_class is transformers.AutoModel:
        return []  # it is all body
    with torch.device("meta"):
        model = architecture.auto_class.from_config(config, trust_remote_code=trusted)
    if not architecture.train_heads:
        output = model.get_output_embeddings()
        return [name for name, module in model.named_modules() if module is output]
    heads = [name for name, child in model.named_children() if name != model.base_model_prefix]
    return [name for name in heads if any(True for _ in getattr(model, name).parameters())]


def configuration(
    source: Source, architecture: Architecture, overrides: Mapping[str, Any]
) -> transformers.PretrainedConfig:
    """A model's configuration, for the task and with some values changed.

    Raises:
        InputError: it cannot be read.
    """
    config = _raw_configuration(source, overrides)
    for name, value in architecture.options.items():  # transformers would check them against what the file says
        setattr(config, name, value)
    return config


def _raw_configuration(source: Source, overrides: Mapping[str, Any]) -> transformers.PretrainedConfig:
    """The same as the file has it."""
    return _load(
        "configuration", source, transformers.AutoConfig.from_pretrained, revision=source.revision, **overrides
    )


def from_config(
    source: Source, architecture: Architecture, overrides: dict[str, Any], pad_token_id: int | None
) -> transformers.PreTrainedModel:
    """Build a model with random weights.

    Raises:
        InputError: the configuration cannot be read or does not fit together.
    """
    config = configuration(source, architecture, overrides)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # random weights are in floating point
    try:
        model = architecture.auto_class.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"student.from_config: {' '.join(str(error).split())[:300]}") from None
    model.fresh = sorted(model.state_dict())
    return model


def _from_gguf(source: Source) -> Source:
    """The same weights as an ordinary folder: dequantized to float32 once, and kept in the user's cache."""
    path = source.path
    assert path is not None
    folder = gguf_folder(path)
    if not is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        options = {"gguf_file": path.name}
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of transformers' own
                tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **options)
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    str(path.parent), dtype=torch.float32, **options
                )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise InputError(f"{path}: cannot read this GGUF file: {' '.join(str(error).split())[:300]}") from None
        unmark(model)
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            inside = Path(fresh) / "model"
            model.save_pretrained(str(inside))
            tokenizer.save_pretrained(str(inside))
            seal_folder(inside)
            with contextlib.suppress(OSError):  # another process was faster
                publish_folder(inside, folder)
    return Source(str(folder), folder)


def _inside(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _load(what: str, source: Source, function: Any, **options: Any) -> Any:
    """Call a `from_pretrained`; a hub or file fault becomes one line."""
    if is_gguf(source):
        source = _from_gguf(source)
    try:
        return function(source.location, trust_remote_code=source.trusted, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and machine_fault(error) is not None:  # such as memory
            raise
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{source.name}: the {what} needs code that comes with it; read that code, and run it with "
                "teacher.trust_remote_code: true (students may not need any)"
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{source.title}: cannot load the {what}: {reason}") from None
