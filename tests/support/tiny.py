"""Tiny models, a tiny tokenizer and tiny rows, built in code: nothing is downloaded or stored."""

from __future__ import annotations

import csv
import functools
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

GOOD = ["good", "great", "fine", "lovely", "superb"]
BAD = ["bad", "poor", "awful", "dull", "weak"]
PLAIN = ["film", "story", "actor", "scene", "music", "script", "the", "a", "of", "and"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own tokenizer has them
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, model_input_names=names, **special)


def config(layers: int = 2, **changes: Any) -> BertConfig:
    settings: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 2,
    }
    return BertConfig(**(settings | changes))


def classifier(layers: int = 2, seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(config(layers, **changes))


@functools.cache
def pretrained() -> BertForSequenceClassification:
    """A classifier that has learnt the words from other rows, so that its body is worth an adapter."""
    model, words = classifier(seed=1).train(), tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = rows(1600, seed=77)
    for start in range(0, len(texts), 32):
        batch = texts[start : start + 32]
        inputs = words([text for text, _ in batch], padding=True, return_tensors="pt")
        labels = torch.tensor([label for _, label in batch])
        loss = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.2, "the tiny body has not learnt its words"
    return model


def save_pretrained(folder: Path) -> Path:
    """A body that knows the words, without its head, as pretrained models come, with its tokenizer."""
    pretrained().bert.save_pretrained(str(folder))
    tokenizer().save_pretrained(str(folder))
    return folder


def save_model(folder: Path, layers: int = 2, seed: int = 0, **changes: Any) -> Path:
    """A random body without a head, with its tokenizer."""
    classifier(layers, seed, **changes).bert.save_pretrained(str(folder))
    tokenizer().save_pretrained(str(folder))
    return folder


def rows(count: int, seed: int = 0, noise: float = 0.0) -> list[tuple[str, int]]:
    """Texts of 3 to 14 words whose class is set by one word; `noise` is the share of turned labels."""
    rng = random.Random(seed)
    found = []
    for index in range(count):
        label = index % 2
        words = rng.choices(PLAIN, k=rng.randint(2, 13))
        words.insert(rng.randrange(len(words) + 1), rng.choice(GOOD if label else BAD))
        found.append((" ".join(words), label if rng.random() >= noise else 1 - label))
    return found


def pairs(count: int, seed: int = 0) -> list[tuple[str, str, int]]:
    """Pairs of texts, each with a word that sets its mood; the class is the second one's mood, whatever the first's."""
    first, second = rows(count, seed), rows(count, seed + 1)
    random.Random(seed).shuffle(first)
    return [(one, two, label) for (one, _), (two, label) in zip(first, second, strict=True)]


def write_csv(path: Path, count: int = 200, seed: int = 0, noise: float = 0.0) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows(count, seed, noise))
    return path


def recipe_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """A small whole recipe on files in `folder`; `changes` are dotted keys with `__` for the dot."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "task": {"kind": "text_classification", "text": "text", "label": "label", "labels": ["bad", "good"]},
        "data": {
            "source": str(folder / "rows.csv"),
            "split": {"train": 0.6, "validation": 0.2, "test": 0.2, "seed": 1},
            "max_tokens": 16,
        },
        "teacher": {
            "model": str(folder / "base"),
            "quantize": "nf4",
            "lora": {"rank": 4, "alpha": 8},
            "optim": {"lr": 0.02},
            "fit": {"epochs": 2, "batch_size": 16, "micro_batch_size": 8, "precision": "fp32", "save_every": 3},
        },
        "targets": {"precision": "fp32"},
        "student": {"from_teacher": {"layers": [1]}},
        "distil": {
            "alpha": 0.5,
            "temperature": 2.0,
            "optim": {"lr": 0.005},
            "fit": {"epochs": 2, "batch_size": 16, "micro_batch_size": 16, "precision": "fp32", "save_every": 3},
        },
        "evaluate": {"metrics": ["accuracy", "log_loss"]},
        "benchmark": {"rounds": 3, "batch_sizes": [1], "precision": None},
        "export": {"gate_rows": 16},
    }
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None and leaf in node:
            del node[leaf]
        else:
            node[leaf] = None if value == "null" else value  # left out is the default, which may be another
    return tree
