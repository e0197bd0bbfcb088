"""GGUF files in llama.cpp's own server, as the package xllamacpp brings it: it writes what transformers writes."""

from __future__ import annotations

import json
import urllib.request

import pytest
import torch
from parity import test_gguf_export as tiny
from transformers import Qwen2Config, Qwen3Config

xllamacpp = pytest.importorskip("xllamacpp")

pytestmark = pytest.mark.slow
NEW_TOKENS, SURE = 30, 0.05
"""Tokens that are written; and where the first two logits are nearer than this, f16 may choose the other one."""
CASES = {
    "llama": (tiny.config(), "gpt-2", "<|begin|> $A"),
    "qwen2": (tiny.config(Qwen2Config), "qwen2", ""),
    "qwen3": (tiny.config(Qwen3Config, head_dim=32), "qwen2", ""),
}


def served(path, text):
    """Tokens that the server makes of a text, and those that it writes after it, always the likeliest."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(path), 256, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(settings)

    def ask(what, job):
        asked = urllib.request.Request(
            f"{server.listening_address}/{what}", json.dumps(job).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=300) as answer:
            return json.loads(answer.read())["tokens"]

    read = ask("tokenize", {"content": text, "add_special": True})
    job = {"prompt": read, "n_predict": NEW_TOKENS, "temperature": 0, "return_tokens": True}
    return read, ask("completion", job)


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("name", CASES)
def test_llama_cpps_server_continues_a_prompt_as_transformers_does(tmp_path, name, kind):
    settings, pre, frame = CASES[name]
    model, words = tiny.build(settings), tiny.tokenizer(pre, frame)
    text = tiny.TEXTS[0][:60]
    read, found = served(tiny.write(model, tmp_path, kind, words), text)
    assert read == words(text)["input_ids"]
    with torch.no_grad():
        right = model.generate(
            torch.tensor([read]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    expected = right.sequences[0, len(read) :].tolist()
    expected = expected[: expected.index(1)] if 1 in expected else expected  # the end token is not told
    differs = next((at for at, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if kind == "f16" and differs is not None:
        one, two = right.logits[differs][0].topk(2).values.tolist()
        assert one - two < SURE, f"token {differs} of {len(expected)}"
    else:
        assert found[: len(expected)] == expected
        assert len(expected) > 5
