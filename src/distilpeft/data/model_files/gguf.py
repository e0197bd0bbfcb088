"""What the header of a GGUF file says of its model, without the file being converted. Torch-free.

A header has counts, then keys with values, then the names and shapes of all tensors; see the format's description in
ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
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


def gguf_config(path: Path) -> JsonObject | None:
    """The configuration of a GGUF file's model, as far as its header has it; None if the header cannot be read."""
    try:
        with path.open("rb") as file:
            values, shapes = _header(file)
        kind = values["general.architecture"]
        config: JsonObject = {name: values[f"{kind}.{key}"] for key, name in _KEYS.items()}
    except (OSError, struct.error, KeyError, UnicodeDecodeError, MemoryError):
        return None
    rows = shapes.get("token_embd.weight", (0, 0))[-1]
    return {**config, "model_type": kind, "vocab_size": rows, "tie_word_embeddings": "output.weight" not in shapes}


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
    """A value; of lists, which hold the vocabulary, nothing is kept."""
    if kind == _TEXT:
        return _text(file)
    if kind != _LIST:
        return _numbers(file, _NUMBERS[kind])[0]
    inner, count = _numbers(file, "IQ")
    if inner in _NUMBERS:
        file.seek(count * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
        return None
    for _ in range(count):
        _value(file, inner)
    return None
