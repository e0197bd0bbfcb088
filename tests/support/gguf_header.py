"""A GGUF file that is nothing but a header."""

from __future__ import annotations

import struct


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(kind: str = "llama", *, output: bool = False, template: str | None = None) -> bytes:
    """Of a model with two layers of four units, nine tokens, and lists between the values."""
    sizes = {"embedding_length": 4, "block_count": 2, "feed_forward_length": 8, "attention.head_count": 2,
             "attention.head_count_kv": 1, "context_length": 32}  # fmt: skip
    values = [text("general.architecture") + struct.pack("<I", 8) + text(kind)]
    values += [text("tokenizer.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("é")]
    values += [text("tokenizer.scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.5)]
    values += [text(f"{kind}.{name}") + struct.pack("<II", 4, size) for name, size in sizes.items()]
    if template is not None:
        tokens, types = ("a", "<|im_start|>", "<|im_end|>", "b"), (1, 3, 3, 1)
        values += [text("tokenizer.chat_template") + struct.pack("<I", 8) + text(template)]
        values += [text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 4) + b"".join(map(text, tokens))]
        values += [text("tokenizer.ggml.token_type") + struct.pack("<IIQ4i", 9, 5, 4, *types)]
        ids = {"bos": 1, "eos": 2, "unknown": 9}  # the last does not exist
        values += [text(f"tokenizer.ggml.{n}_token_id") + struct.pack("<II", 4, id_) for n, id_ in ids.items()]
    tensors = ["token_embd.weight", *(["output.weight"] if output else [])]
    shapes = [text(name) + struct.pack("<IQQIQ", 2, 4, 9, 0, 0) for name in tensors]
    return struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(values)) + b"".join(values + shapes)
