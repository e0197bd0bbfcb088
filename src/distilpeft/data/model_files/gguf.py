"""What the header of a GGUF file says of its model, without the file being converted. Torch-free.

A header has counts, then keys with values, then the names and shapes of all tensors; see the format's description in
ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from distilpeft.machine.files import JsonObject

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MAGIC = int.from_bytes(b"GGUF", "little")
_KEYS = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}  # fmt: skip
"""Key of a header, behind the architecture's name → key of a configuration."""


_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""A special token's name in a header → in transformers."""
_CONTROL = 3
"""The type of tokens that are no text."""


@dataclass(frozen=True)
class GGUFTemplate:
    """The chat template in a header, None if it has none, and the tokens that a template may use.

    Attributes:
        text: of the template.
        named: `bos_token` and the like → the token.
        control: all tokens that are no text.
    """

    text: str | None
    named: Mapping[str, str]
    control: Sequence[str]


def gguf_template(path: Path) -> GGUFTemplate | None:
    """The chat template of a GGUF file; None if the header cannot be read."""
    read = _read(path)
    if read is None:
        return None
    values, _ = read
    text, tokens, types = (
        values.get(f"tokenizer.{name}") for name in ("chat_template", "ggml.tokens", "ggml.token_type")
    )
    tokens, types = tokens if isinstance(tokens, list) else [], types if isinstance(types, list) else []
    ids = {name: values.get(f"tokenizer.ggml.{key}_token_id") for key, name in _NAMED.items()}
    named = {name: tokens[id_] for name, id_ in ids.items() if isinstance(id_, int) and 0 <= id_ < len(tokens)}
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    return GGUFTemplate(text if isinstance(text, str) else None, named, control)


def gguf_config(path: Path) -> JsonObject | None:
    """The configuration of a GGUF file's model, as far as its header has it; None if the header cannot be read."""
    read = _read(path)
    if read is None:
        return None
    values, shapes = read
    kind = values.get("general.architecture")
    if any(f"{kind}.{key}" not in values for key in _KEYS):
        return None
    config: JsonObject = {name: values[f"{kind}.{key}"] for key, name in _KEYS.items()}
    rows = shapes.get("token_embd.weight", (0, 0))[-1]
    return {**config, "model_type": kind, "vocab_size": rows, "tie_word_embeddings": "output.weight" not in shapes}


def _read(path: Path) -> tuple[JsonObject, dict[str, tuple[int, ...]]] | None:
    """The values and the tensors' shapes of a header; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return _header(file)
    except (OSError, struct.error, KeyError, UnicodeDecodeError, MemoryError, OverflowError, RecursionError):
        return None


def _header(file: BinaryIO) -> tuple[JsonObject, dict[str, tuple[int, ...]]]:
    magic, _, num_tensors, num_values = _numbers(file, "IIQQ")
    if magic != _MAGIC:
        raise KeyError(magic)
    values: JsonObject = {}
    for _ in range(num_values):
        name = _text(file)
        values[name] = _value(file, _numbers(file, "I")[0])
    shapes = {}
    for _ in range(num_tensors):
        name = _text(file)
        (dimensions,) = _numbers(file, "I")
        shapes[name] = _numbers(file, f"{dimensions}Q")
        _numbers(file, "IQ")
    return values, shapes


def _numbers(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _text(file: BinaryIO) -> str:
    return file.read(_numbers(file, "Q")[0]).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> object:
    if kind == _TEXT:
        return _text(file)
    if kind != _LIST:
        return _numbers(file, _NUMBERS[kind])[0]
    inner, count = _numbers(file, "IQ")
    if inner in _NUMBERS:
        return list(_numbers(file, f"{count}{_NUMBERS[inner]}"))
    return [_value(file, inner) for _ in range(count)]
