"""Tiny causal language models and rows for them, built in code."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from support import tiny

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


@functools.cache
def tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Bytes as tokens, with a chat template: offsets, special tokens and all as large tokenizers have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet, *map("".join, merges)])}
    core = Tokenizer(models.BPE(vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=4096
    )
    found.chat_template = TEMPLATE
    return found


def config(layers: int = 2, **changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return LlamaConfig(**(settings | changes))


def model(layers: int = 2, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(layers, **changes))


def save_merging(folder: Path) -> Path:
    """A random model whose tokenizer merges something, which llama.cpp wants."""
    words = tokenizer(("t", "h"), ("th", "e"))
    model(vocab_size=len(words)).save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder


@functools.cache
def pretrained() -> LlamaForCausalLM:
    """A model that has seen a little of such text, so that its base and its layers are worth something."""
    texts = [f"{pair['prompt']} This is a good one. This is a bad one.<|end|>" for pair in pairs(2400, seed=77)]
    return taught(model(seed=1), tokenizer(), texts)


def taught(found: LlamaForCausalLM, words: PreTrainedTokenizerFast, texts: list[str]) -> LlamaForCausalLM:
    """The model after reading these texts once."""
    found.train()
    optimizer = torch.optim.AdamW(found.parameters(), lr=3e-3)
    for start in range(0, len(texts), 32):
        inputs = words(texts[start : start + 32], padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        found(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found.eval()


def save_pretrained(folder: Path) -> Path:
    pretrained().save_pretrained(str(folder))
    tokenizer().save_pretrained(str(folder))
    return folder


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """A film's line and the verdict on it; every seventh completion is empty."""
    found = []
    for index, (text, label) in enumerate(tiny.rows(count, seed)):
        verdict = " This is a good one." if label else " This is a bad one."
        found.append({"prompt": text + " :", "completion": "" if index % 7 == 6 else verdict})
    return found


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """One or two turns each."""
    found = []
    for index, pair in enumerate(pairs(count, seed)):
        turn = [
            {"role": "user", "content": pair["prompt"]},
            {"role": "assistant", "content": pair["completion"] or "no idea"},
        ]
        found.append({"messages": turn * (1 + index % 2)})
    return found


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """A small whole recipe for completions; `changes` as in `tiny.recipe_tree`."""
    changes = {
        "name": "tinylm",
        "task": {"kind": "causal_lm", "prompt": "prompt", "completion": "completion"},
        "data__source": str(folder / "rows.jsonl"),
        "data__max_tokens": 96,
        "targets": {"mode": "online", "precision": "fp32"},
        "teacher__optim__lr": 0.01,
        "distil__alpha": 0.9,
        "evaluate": {"samples": 1, "sample_tokens": 8},
        **changes,
    }
    return tiny.recipe_tree(folder, **changes)
