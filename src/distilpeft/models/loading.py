"""Models: load and quantize a base, put LoRA on it, merge it exactly, and cut a student out of it.

Two library traps are held here. Heads must never be quantized or frozen, random as they mostly are: they are
found by building the architecture on the meta device, not by a list of names. And bitsandbytes repacks 4-bit
weights for CPU inference in any eval-mode forward, after which LoRA gradients are None: that is switched off.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
import transformers
from torch import nn

from distilpeft.data import pictures
from distilpeft.data.sources import Source, gguf_folder, is_gguf
from distilpeft.errors import InputError
from distilpeft.machine.files import is_whole, publish_folder, seal_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Quantize = Literal["nf4", "int8", "none"]


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

    Args:
        source: where it is.
        architecture: what the task asks for.
        quantize: `nf4` (double quantization), `int8` or `none`, for all linear layers but the heads.
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
    while True:
        options: dict[str, Any] = {"config": config, "dtype": DTYPES[dtype], "output_loading_info": True}
        if quantize != "none":
            options["quantization_config"] = quantization(quantize, compute_dtype, heads=heads)
            options["device_map"] = {"": device}
        model, info = _load(
            "model", source, architecture.auto_class.from_pretrained, revision=source.revision,
            ignore_mismatched_sizes=True, use_safetensors=True, **options,
        )  # fmt: skip
        missing = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
        more = sorted({key.rpartition(".")[0] for key in missing if not _inside(key, heads)})
        heads += more
        if quantize == "none" or not more:
            break  # else a part of the body has random weights: load again, without quantizing it
    _keep_trainable(model)
    model.fresh = sorted(missing)
    return model.to(device) if quantize == "none" else model, heads


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


def dequantize(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Turn a quantized base into an ordinary float32 model that computes with the very same weights."""
    if not getattr(model, "is_quantized", False):
        return model
    model = model.dequantize(dtype=torch.float32)
    _unmark(model)
    return model


def _unmark(model: transformers.PreTrainedModel) -> None:
    """Forget that the weights were once quantized; `save_pretrained` would refuse them."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False


def configuration(
    source: Source, architecture: Architecture, overrides: Mapping[str, Any]
) -> transformers.PretrainedConfig:
    """A model's configuration, for the task and with some values changed.

    Raises:
        InputError: it cannot be read.
    """
    config = _load(
        "configuration", source, transformers.AutoConfig.from_pretrained, revision=source.revision, **overrides
    )
    for name, value in architecture.options.items():  # transformers would check them against what the file says
        setattr(config, name, value)
    return config


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
    try:
        model = architecture.auto_class.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"student.from_config: {' '.join(str(error).split())[:300]}") from None
    model.fresh = sorted(model.state_dict())
    return model


def _keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16 inference; they could not be trained after."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (see above)


def quantization(
    quantize: Quantize, compute_dtype: torch.dtype = torch.float32, *, heads: list[str]
) -> transformers.BitsAndBytesConfig:
    """What transformers needs to know to quantize the linear layers of a model, but for the heads."""
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=heads,
    )


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
        _unmark(model)
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
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{source.name}: the {what} needs code that comes with it; read that code, and run it with "
                "teacher.trust_remote_code: true (students may not need any)"
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{source.name}: cannot load the {what}: {reason}") from None
