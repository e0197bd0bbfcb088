"""One GGUF file that llama.cpp and transformers' own reader load to the same function.

`fault` says before anything slow why a model cannot become one. The rest is streamed: first all names, shapes and
types, then one weight after another, reordered and quantized on its way to the disk, so that only one is in memory
twice. The tokenizer is only written where llama.cpp is known to cut text exactly as it does: a wrong
`tokenizer.ggml.pre` would load, and silently read other tokens. Not carried over is NFC, which Qwen's tokenizers apply
first: llama.cpp takes text as it comes, so text that is not in NFC is read as other tokens there.

    D  half of a head's width
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from numpy.typing import NDArray
from torch import Tensor

from distilpeft.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    **{
        kind: getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}")
        for kind in ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
    },
}
KINDS = tuple(FILE_TYPES)
"""What a weight can be stored as: all that the Python package can quantize to (its K-quants can only be read)."""
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,  # the same function, but for the window that `fault` refuses
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_GPT2_BYTES, _PLAIN_BYTES = "gpt2 words", "bytes"
PRE: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2_BYTES,), False): "gpt-2",
    (("digits", _GPT2_BYTES), False): "smollm",
    ((_QWEN2, _PLAIN_BYTES), False): "qwen2",
    ((_LLAMA3, _PLAIN_BYTES), True): "llama-bpe",
    ((_LLAMA3, _PLAIN_BYTES), False): "smaug-bpe",
}
"""How text is cut, and whether a piece that is a token stays whole, → llama.cpp's name for it."""


def fault(config: PretrainedConfig, tokenizer_json: dict[str, Any]) -> str | None:
    """Why this model cannot become a GGUF file; None if it can.

    Args:
        config: of transformers.
        tokenizer_json: the parsed tokenizer.json.
    """
    return (
        _architecture_fault(config)
        or _rope_fault(config)
        or _vocabulary_fault(tokenizer_json, config.vocab_size)
        or _pieces_fault(tokenizer_json)
    )


def _architecture_fault(config: PretrainedConfig) -> str | None:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        return f"models of type {kind} are not written as GGUF; {', '.join(ARCHITECTURES)} are"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):  # transformers' reader would leave the biases out without a word
            return f"a {kind} model with {name} does not survive being read from GGUF"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}; a {kind} model in GGUF has silu"
    kinds = getattr(config, "layer_types", None) or ()
    window = config.sliding_window if kind == "mistral" else None
    windowed = window is not None and window < config.max_position_embeddings
    if windowed or any(kind != "full_attention" for kind in kinds):
        return f"its attention sees a sliding window, which a {kind} model in GGUF does not"
    return None


def _rope_fault(config: PretrainedConfig) -> str | None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    llama = ARCHITECTURES[config.model_type] is gguf.MODEL_ARCH.LLAMA
    if kind != "default" and not (kind == "llama3" and llama):
        return f"its rotary embedding is scaled ({kind}); only llama3's scaling of llama models is written as GGUF"
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        return "its rotary embedding turns only part of each head"
    return None


def _vocabulary_fault(words: dict[str, Any], rows: int) -> str | None:
    model = words["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece's" if model.get("byte_fallback") else f"of kind {model['type']}"
        return f"its tokenizer is {kind}; only byte-level BPE is written as GGUF"
    if not model["merges"]:
        return "its tokenizer merges nothing, and llama.cpp loads none without merges"
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"its tokenizer has a {name}, which llama.cpp does not know"
    if model.get("unk_token") and not set(_alphabet()) <= model["vocab"].keys():
        return "its tokenizer writes an unknown token for some bytes; llama.cpp would leave them out"
    return _added_fault(words["added_tokens"], max(model["vocab"].values()), rows)


def _added_fault(added: list[dict[str, Any]], last: int, rows: int) -> str | None:
    last = max([last, *(token["id"] for token in added)])
    if last >= rows:
        return f"its tokenizer has a token {last}, its embeddings only {rows} rows"
    for token in added:
        ways = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if ways:
            return f"its added token {token['content']!r} has {ways[0]}, which llama.cpp does not know"
    return None


def _pieces_fault(words: dict[str, Any]) -> str | None:
    pre = _pre(words)
    if pre is None:
        return "its tokenizer cuts text into pieces in a way that llama.cpp is not known to share (pre_tokenizer)"
    normalizer = words["normalizer"]
    if normalizer is not None and (pre, normalizer["type"]) != ("qwen2", "NFC"):
        return f"its tokenizer changes text first ({normalizer['type']}), which llama.cpp does not"
    if _frame(words["post_processor"]) is None:
        return "its tokenizer puts more around a text than one token before and one after (post_processor)"
    return None


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    alphabet: list[str] = pre_tokenizers.ByteLevel.alphabet()
    return alphabet


def _pre(words: dict[str, Any]) -> str | None:
    top = words["pre_tokenizer"] or {"type": None}
    steps = top["pretokenizers"] if top["type"] == "Sequence" else [top]
    key = tuple(_step(step) for step in steps)
    return PRE.get((key, bool(words["model"].get("ignore_merges"))))


def _step(step: dict[str, Any]) -> str:
    """What one step does, in the words of `PRE`; anything else matches nothing there."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return _GPT2_BYTES if step.get("use_regex", True) else _PLAIN_BYTES
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", ""))
    return ""


def _frame(step: dict[str, Any] | None) -> tuple[int | None, int | None] | None:
    """The tokens put before and after one text; None where it is more than that."""
    steps = [] if step is None else step.get("processors", [step])
    steps = [part for part in steps if part["type"] != "ByteLevel"]  # it moves offsets only
    if not steps:
        return None, None
    if len(steps) > 1 or steps[0]["type"] != "TemplateProcessing":
        return None
    ids: list[list[int]] = [[], []]
    texts = 0
    for item in steps[0]["single"]:
        if "Sequence" in item:
            texts += 1
        else:
            ids[min(texts, 1)] += steps[0]["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    if texts != 1 or max(map(len, ids)) > 1:
        return None
    before, after = (next(iter(side), None) for side in ids)
    return before, after


def write(
    model: PreTrainedModel, tokenizer_json: dict[str, Any], special: Mapping[str, int | None], template: str | None,
    path: Path, kind: str, *, name: str,
) -> None:  # fmt: skip
    """Write a model, with its tokenizer, for which `fault` found none.

    Args:
        model: float32, of transformers; it is not changed.
        tokenizer_json: the parsed tokenizer.json.
        special: ids of the tokens "bos", "eos", "pad" and "unk".
        template: for chats, if it has one.
        path: of the file.
        kind: one of `KINDS`. Norms and biases stay f32. Rows that blocks do not fill are f16. In 4 and 5 bits the
            output head, or the embeddings where they are the head, are q8_0, as llama.cpp keeps them wider too.
        name: what the file says it is.

    Raises:
        InputError: a weight does not fit the kind, or the tokenizer frames texts with other tokens than bos and eos.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    writer.add_type("model")
    # transformers' reader takes this very name of a llama model for an architecture, one with a window
    writer.add_name("Mistral" if name == "mistral" else name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, tokenizer_json, special, config.vocab_size)
    if template is not None:
        writer.add_chat_template(template)
    tensors = dict(_tensors(model))
    tied = "output.weight" not in tensors
    types = {title: _type(title, tensor.shape, Type[kind.upper()], tied) for title, tensor in tensors.items()}
    for title, tensor in tensors.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[types[title]]
        size = tensor.numel() // block * block_bytes
        writer.add_tensor_info(title, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=types[title])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for title, tensor in tensors.items():
            writer.write_tensor_data(_encoded(_arranged(title, tensor, config), types[title], title))
    finally:
        writer.close()


def _add_shape(writer: Any, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_tokenizer(writer: Any, words: dict[str, Any], special: Mapping[str, int | None], rows: int) -> None:
    frame = _frame(words["post_processor"])
    assert frame is not None
    for role, token in zip(("bos", "eos"), frame, strict=True):
        if token is not None and token != special[role]:
            raise InputError(
                f"export.formats: gguf: the tokenizer puts token {token} around texts, where llama.cpp puts the {role} "
                f"token ({special[role]})"
            )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(words))
    tokens, types = _vocabulary(words, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = words["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for role in ("bos", "eos", "pad", "unk"):
        if special[role] is not None:
            getattr(writer, f"add_{role}_token_id")(special[role])
    writer.add_add_bos_token(frame[0] is not None)
    writer.add_add_eos_token(frame[1] is not None)


def _vocabulary(words: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """A token and its type for each row of the embeddings; rows without one are called [PADn]."""
    tokens = {index: (token, TokenType.NORMAL) for token, index in words["model"]["vocab"].items()}
    for token in words["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        tokens[token["id"]] = (token["content"], kind)
    names = {token for token, _ in tokens.values()}
    for row in range(rows):
        if row not in tokens:
            filler = f"[PAD{row}]"
            while filler in names:
                filler += "_"
            tokens[row] = (filler, TokenType.UNUSED)
    return [tokens[row][0] for row in range(rows)], [int(tokens[row][1]) for row in range(rows)]


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All weights, a tied head not twice, by their names in GGUF, and the stretching of rotary wavelengths."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for own, tensor in model.named_parameters():
        title = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if title is None:
            raise InputError(f"export.formats: gguf: the weight {own} has no place in a {config.model_type} model")
        yield title, tensor.detach()
    if config.rope_parameters.get("rope_type", "default") != "default":
        turns_D = model.get_decoder().rotary_emb.inv_freq.double().cpu()
        plain_D = config.rope_parameters["rope_theta"] ** -(torch.arange(len(turns_D)).double() / len(turns_D))
        yield "rope_freqs.weight", (plain_D / turns_D).float()


def _type(title: str, shape: tuple[int, ...], kind: Any, tied: bool) -> Any:
    if len(shape) == 1:
        return Type.F32
    narrow = kind in (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1)
    if narrow and title == ("token_embd.weight" if tied else "output.weight"):
        kind = Type.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return Type.F16 if shape[-1] % block else kind


def _arranged(title: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    """The weight as llama.cpp multiplies with it.

    Its llama models turn neighbouring rows of a head together; transformers turns a row with the one half a head on.
    """
    if ARCHITECTURES[config.model_type] is not gguf.MODEL_ARCH.LLAMA:
        return tensor
    side = title.rpartition(".attn_")[2]
    heads = {"q.weight": config.num_attention_heads, "k.weight": config.num_key_value_heads}.get(side)
    if heads is None:
        return tensor
    outputs, inputs = tensor.shape
    halves = tensor.reshape(heads, 2, outputs // heads // 2, inputs)
    return halves.transpose(1, 2).reshape(outputs, inputs)


def _encoded(tensor: Tensor, kind: Any, title: str) -> NDArray[np.generic]:
    array = tensor.float().cpu().contiguous().numpy()
    with np.errstate(over="ignore"):
        content: NDArray[np.generic] = gguf.quants.quantize(array, kind)
    if kind == Type.F16 and np.isinf(content).any():
        raise InputError(f"export.formats: gguf: {title} has weights beyond the largest of f16; gguf-bf16 holds them")
    return content
