"""What is read from a GGUF file's header."""

from __future__ import annotations

import struct

import pytest

from distilpeft.data.model_files.gguf import gguf_config
from distilpeft.data.sources import Source
from distilpeft.planning.forecast.overview import origin
from distilpeft.planning.sizes import size_of


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(kind: str = "llama", *, output: bool = False) -> bytes:
    """Of a model with two layers of four units, nine tokens, and lists between the values."""
    sizes = {"embedding_length": 4, "block_count": 2, "feed_forward_length": 8, "attention.head_count": 2,
             "attention.head_count_kv": 1, "context_length": 32}  # fmt: skip
    values = [text("general.architecture") + struct.pack("<I", 8) + text(kind)]
    values += [text("tokenizer.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("é")]
    values += [text("tokenizer.scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.5)]
    values += [text(f"{kind}.{name}") + struct.pack("<II", 4, size) for name, size in sizes.items()]
    tensors = ["token_embd.weight", *(["output.weight"] if output else [])]
    shapes = [text(name) + struct.pack("<IQQIQ", 2, 4, 9, 0, 0) for name in tensors]
    return struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(values)) + b"".join(values + shapes)


@pytest.mark.parametrize("output", [False, True])
def test_the_size_of_a_gguf_model_is_known_before_it_is_converted(tmp_path, output):
    file = tmp_path / "model.gguf"
    file.write_bytes(header(output=output))
    size = size_of(Source(str(file), file))
    layer = 2 * 4 * 4 + 2 * 2 * 4 + 3 * 8 * 4 + 2 * 4
    assert size.total == 2 * layer + 4 + 9 * 4 * (1 + output)
    assert ", on this machine; a run converts the GGUF file once (" in origin(Source(str(file), file))
    assert (size.layers, size.shape.keys, size.shape.vocabulary, size.shape.gated) == (2, 2, 9, True)


def test_an_architecture_without_known_shapes_has_a_configuration_but_no_size(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(header("rwkv7"))
    assert gguf_config(file)["hidden_size"] == 4
    assert size_of(Source(str(file), file)) is None


@pytest.mark.parametrize("content", [b"", b"GGUF", header()[:60], b"GGML" + header()[4:], b"x" * 200])
def test_a_file_that_is_cut_short_or_something_else_says_nothing(tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert gguf_config(file) is None
