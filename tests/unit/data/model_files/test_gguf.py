"""What is read from a GGUF file's header."""

from __future__ import annotations

import struct

import pytest
from support.gguf_header import header, text

from distilpeft.data.model_files.gguf import gguf_config, gguf_template
from distilpeft.data.sources import Source
from distilpeft.planning.forecast.overview import origin
from distilpeft.planning.sizes import size_of


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
    assert gguf_template(file) is None


def test_lists_within_lists_without_end_say_nothing(tmp_path):
    file = tmp_path / "model.gguf"
    lists = text("deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + lists)
    assert gguf_config(file) is None


def test_the_chat_template_and_the_special_tokens_are_known_before_a_file_is_converted(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(header(template="{{ messages }}"))
    found = gguf_template(file)
    assert (found.text, found.named, found.control) == (
        "{{ messages }}", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, ["<|im_start|>", "<|im_end|>"]
    )  # fmt: skip
    file.write_bytes(header())
    assert gguf_template(file).text is None
