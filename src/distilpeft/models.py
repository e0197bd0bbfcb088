"""Models: load and quantize a base, put LoRA on it, merge it exactly, and cut a student out of it.

Two library traps are held here. Heads must never be quantized or frozen, random as they mostly are: they are
found by building the architecture on the meta device, not by a list of names. And bitsandbytes repacks 4-bit
weights for CPU inference in any eval-mode forward, after which LoRA gradients are None: that is switched off.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from distilpeft.data import pictures
from distilpeft.data.sources import Source, gguf_folder, is_gguf
from distilpeft.errors import InputError
from distilpeft.machine.files import is_whole, seal_folder
from distilpeft.recipe.export import FORMS
from distilpeft.recipe.student import FromTeacher
from distilpeft.recipe.training import Lora

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Quantize = Literal["nf4", "int8", "none"]


class Architecture:
    """What a task asks of a model: the auto class, its options, PEFT's name of the task, and whether heads are new.

    New heads are trained in full beside an adapter; pretrained ones only by an adapter that names them.
    """

    def __init__(self, auto_class: str, peft_task: str | None, options: dict[str, Any], *, train_heads: bool) -> None:
        self.auto_class: Any = getattr(transformers, auto_class)
        self.peft_task = peft_task
        self.options = options
        self.train_heads = train_heads


def load_tokenizer(source: Source) -> Any:
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
) -> tuple[Any, list[str]]:
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


def start_head(model: Any, bias_C: Sequence[float]) -> None:
    """Set the bias of the output layer, if it came without weights.

    Answers begin at what is usual in training instead of at 0. Without it the first steps only learn that, and where
    most answers are no they drown what tells texts apart (Lin et al. 2017, arXiv:1708.02002, section 3.3).
    """
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.bias" in model.fresh and module.out_features == len(bias_C)
    ]
    if layers:
        with torch.no_grad():
            layers[-1].bias.copy_(torch.as_tensor(bias_C))


def head_modules(architecture: Architecture, config: Any, *, trusted: bool = False) -> list[str]:
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


def add_lora(model: nn.Module, lora: Lora, architecture: Architecture, heads: list[str], key: str) -> Any:
    """Freeze the model, add a LoRA adapter, and train new heads in full beside it.

    Raises:
        InputError: `key`.target_modules names nothing in the model.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    names = "|".join(re.escape(name) for name in heads)
    config = peft.LoraConfig(
        task_type=architecture.peft_task,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=rf"(.*\.)?({names})(\..*)?" if heads and architecture.train_heads else None,
        modules_to_save=heads or None if architecture.train_heads else None,
    )
    tied = getattr(model.config, "tie_word_embeddings", False) and not architecture.train_heads
    if tied and not isinstance(targets, str) and any(target.rpartition(".")[2] in heads for target in targets):
        raise InputError(f"{key}.target_modules: the head is tied to the embeddings; an adapter would tune one of them")
    try:
        tuned = peft.get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"{key}.target_modules: {' '.join(str(error).split())[:300]}") from None
    for name, parameter in tuned.named_parameters():
        if ".modules_to_save." in name:
            assert parameter.is_floating_point(), f"{name} is quantized: a head must stay in floating point"
            assert parameter.requires_grad, f"{name} is frozen: a head without pretrained weights must be trained"
    return tuned


def load_adapter(model: nn.Module, folder: Path) -> Any:
    """Put a saved adapter (and its heads) on its base; everything is frozen."""
    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=False)


def load_exported(folder: Path, manifest: Mapping[str, Any], device: torch.device) -> Any:
    """The model that transformers makes of an exported folder, frozen."""
    form = FORMS[manifest["format"]]
    options: dict[str, Any] = {"dtype": "auto", "device_map": {"": device}}
    if form.file != ".":  # GGUF, dequantized; its reader alone would miss llama3's rope scaling and odd head widths
        config = transformers.AutoConfig.from_pretrained(str(folder))
        options = {"gguf_file": form.file, "dtype": torch.float32, "config": config}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of transformers' GGUF reader
        model = getattr(transformers, manifest["auto_class"]).from_pretrained(str(folder), **options)
    if form.file != ".":
        model = model.to(device)
    return model.requires_grad_(False).eval()


def dequantize(model: Any) -> Any:
    """Turn a quantized base into an ordinary float32 model that computes with the very same weights."""
    if not getattr(model, "is_quantized", False):
        return model
    model = model.dequantize(dtype=torch.float32)
    _unmark(model)
    return model


def _unmark(model: Any) -> None:
    """Forget that the weights were once quantized; `save_pretrained` would refuse them."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False


def merge(base: Any, adapter: Path) -> Any:
    """Merge a saved adapter into its base, dequantizing the base first.

    Merging into 4-bit weights would round the sum to 4 bits again and give another model than the one that was
    tuned; merging into the dequantized weights is exact up to floating-point rounding.
    """
    return load_adapter(dequantize(base), adapter).merge_and_unload()


def keep_layers(model: Any, chosen: FromTeacher) -> None:
    """Keep only some transformer layers of a model, in place, and correct its configuration.

    Raises:
        InputError: the recipe names layers that are not there, or that cannot be taken out.
    """
    if chosen.ffn is not None:
        narrow(model, chosen.ffn)
    if not model.config.is_encoder_decoder:
        depth = getattr(model.config, "num_hidden_layers", None)
        if depth is None:
            raise InputError(
                f"student.from_teacher: {type(model).__name__} is no stack of layers; use student.model or from_config"
            )
        _keep(model, chosen.of(depth), model.config, ("num_hidden_layers",))
        return
    nested = hasattr(model.config, "encoder")  # EncoderDecoderModel keeps a configuration for each
    for side, other in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        config = getattr(model.config, side) if nested else model.config
        wanted = ("num_hidden_layers",) if nested else (f"{side}_layers", other)
        names = [name for name in wanted if name in config.to_dict()]
        depth = getattr(config, names[0])
        _keep(getattr(model, f"get_{side}")(), chosen.of(depth, side=side), config, names)


def _keep(model: Any, layers: tuple[int, ...], config: Any, names: Sequence[str]) -> None:
    """Keep these layers of one stack; `names` are those under which the configuration keeps their number."""
    key, told, depth = "student.from_teacher", config.to_dict(), getattr(config, names[0])
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(stacks) != 1:
        raise InputError(f"{key}: {type(model).__name__} has {len(stacks)} stacks of {depth} layers; use student.model")
    name, stack = stacks[0]
    if layers[0] > 0 and any("relative_attention_bias" in part for part, _ in stack[0].named_parameters()):
        raise InputError(f"{key}: layer 0 of {type(model).__name__} holds the positions of all layers; keep it")
    parent, _, child = name.rpartition(".")
    kept = nn.ModuleList(stack[i] for i in layers)
    setattr(model.get_submodule(parent), child, kept)
    _number(kept)
    for name, value in told.items():
        if isinstance(value, list) and len(value) == depth:  # layer_types, no_rope_layers, ...: one entry per layer
            setattr(config, name, [value[i] for i in layers])
    for name in names:
        setattr(config, name, len(layers))


FFN = ("intermediate_size", "hidden_dim")
"""What configurations call the width of the feed-forward part."""


def narrow(model: Any, width: int) -> None:
    """Keep only the most important units inside each feed-forward part, in place, and correct the configuration.

    A unit's importance is the product of the lengths of its weights, those into it (and of its gate) and those out of
    it: the most that it can add, up to its activation. What is left computes exactly what the whole would with the
    other units silent.

    Raises:
        InputError: there are fewer units, or the feed-forward parts are not two or three linear layers of that width.
    """
    config, key = model.config, "student.from_teacher.ffn"
    name = next((name for name in FFN if hasattr(config, name)), "")
    old = getattr(config, name, 0)
    if width > old:
        raise InputError(f"{key}: {width} are more than there are; {type(model).__name__} has {old or 'no known'}")
    for block in blocks(model):
        layers = {path: one for path, one in block.named_modules() if isinstance(one, nn.Linear)}
        into = {path: one for path, one in layers.items() if one.out_features == old and one.in_features != old}
        out = {path: one for path, one in layers.items() if one.in_features == old and one.out_features != old}
        if not (len(out) == 1 and 1 <= len(into) <= 2):
            raise InputError(f"{key}: the feed-forward part of {type(block).__name__} is not made of such layers")
        lengths = [one.weight.norm(dim=1) for one in into.values()] + [one.weight.norm(dim=0) for one in out.values()]
        kept = torch.stack(lengths).log().sum(0).topk(width).indices.sort().values
        for path, one in into.items():
            bias = getattr(one, "bias", None)
            block.set_submodule(path, _linear(one.weight[kept], None if bias is None else bias[kept]))
        for path, one in out.items():
            block.set_submodule(path, _linear(one.weight[:, kept], one.bias))
    setattr(config, name, width)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def _number(layers: nn.ModuleList) -> None:
    """Tell layers their new places, by which they find their part of a cache."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 (mypy knows modules as tensors only)


def configuration(source: Source, architecture: Architecture, overrides: Mapping[str, Any]) -> Any:
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


def from_config(source: Source, architecture: Architecture, overrides: dict[str, Any], pad_token_id: int | None) -> Any:
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


def unfreeze(model: Any, architecture: Architecture) -> None:
    """Let training change all weights but those that the architecture itself keeps as they are.

    Marian's sines and cosines of positions are parameters, for instance, and were never trained.
    """
    with torch.device("meta"):
        fresh = architecture.auto_class.from_config(model.config)
    fixed = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in fixed)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tuned(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, by name: the trainable parameters, and the running statistics of BatchNorms."""
    found: dict[str, Tensor] = dict(trainable(model))
    for prefix, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.track_running_stats:
            found |= {f"{prefix}.{name}": buffer for name, buffer in module.named_buffers(recurse=False)}
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the model's stacks, outermost stacks only."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) > 1 and stack not in inside:
            inside.update(stack.modules())
            found += [block for block in stack if any(True for _ in block.parameters())]
    return found


def num_parameters(model: nn.Module) -> int:
    """Number of weights; 4-bit weights are counted, not the bytes that hold them."""
    return sum(
        parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1) for parameter in model.parameters()
    )


def size_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they lie in memory, quantized ones packed, with their scales."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(t.numel() * t.element_size() for t in state.as_dict(packed=True).values())
    return total


def _keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16 inference; they could not be trained after."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (see above)


def quantization(quantize: Quantize, compute_dtype: torch.dtype = torch.float32, *, heads: list[str]) -> Any:
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
                inside.rename(folder)
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
