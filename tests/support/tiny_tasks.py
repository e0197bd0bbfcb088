"""Data of every kind of task that can be learnt in seconds, and small whole recipes on them."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import MarianConfig, MarianMTModel, ResNetConfig, ResNetForImageClassification

from support import commands, tiny

MOODS = ["praise", "blame"]
OPTIM, FIT = {"lr": 0.003}, {"epochs": 15, "batch_size": 16, "micro_batch_size": 16, "precision": "fp32"}
TAGS = ["O", "B-GOOD", "I-GOOD", "B-BAD", "I-BAD"]


def multi_label(folder: Path) -> dict:
    """Any of praise and blame, by words that a text holds or does not."""
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(500):
            words = rng.choices(tiny.PLAIN, k=rng.randint(2, 9))
            moods = [mood for mood in MOODS if rng.random() < 0.5]
            for mood in moods:
                words.insert(rng.randrange(len(words) + 1), rng.choice(tiny.GOOD if mood == "praise" else tiny.BAD))
            file.write(json.dumps({"text": " ".join(words), "moods": moods}) + "\n")
    return {"task": {"kind": "multi_label_classification", "text": "text", "label": "moods", "labels": MOODS}}


def regression(folder: Path) -> dict:
    """How good a text is: its good words less its bad ones."""
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(500):
            words = rng.choices([*tiny.PLAIN, *tiny.GOOD, *tiny.BAD], k=rng.randint(2, 7))
            mood = sum(word in tiny.GOOD for word in words) - sum(word in tiny.BAD for word in words)
            file.write(json.dumps({"text": " ".join(words), "mood": mood / 2}) + "\n")
    return {"task": {"kind": "regression", "text": "text", "label": "mood"}, "distil__temperature": 1}


def tagging(folder: Path) -> dict:
    """Good and bad words begin entities, and the last two of each kind go on with them."""
    rng, moods = random.Random(0), {"GOOD": tiny.GOOD, "BAD": tiny.BAD}
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(400):
            words = rng.choices([*tiny.PLAIN, *tiny.GOOD, *tiny.BAD], k=rng.randint(2, 12))
            tags = [
                next((f"{'BI'[mine.index(word) > 2]}-{mood}" for mood, mine in moods.items() if word in mine), "O")
                for word in words
            ]
            file.write(json.dumps({"words": words, "tags": tags, "long": len(words) > 7}) + "\n")
    task = {"kind": "token_classification", "words": "words", "tags": "tags", "labels": TAGS}
    return {"task": task, "evaluate": {"groups": "long"}}


def questions(folder: Path) -> dict:
    """The good or the bad word of a text, whichever the question asks for; some texts take two windows."""
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(500):
            good, bad = rng.choice(tiny.GOOD[1:]), rng.choice(tiny.BAD[1:])
            words = [*rng.choices(tiny.PLAIN, k=rng.randint(4, 12)), good, bad]
            rng.shuffle(words)
            question, answer = ("good", good) if number % 2 else ("bad", bad)
            row = {"question": question, "context": " ".join(words), "answers": answer}
            file.write(json.dumps(row) + "\n")
    columns = {name: name for name in ("question", "context", "answers")}
    return {"task": {"kind": "question_answering", **columns, "stride": 4, "longest_answer": 2}}


def rewriting(folder: Path) -> dict:
    """Every word as the one behind it in the vocabulary, by an encoder-decoder of BART's kind."""
    rng, words = random.Random(0), [*tiny.PLAIN, *tiny.GOOD]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(600):
            picked = rng.choices(range(len(words)), k=rng.randint(1, 3))
            row = {name: " ".join(words[(at + far) % len(words)] for at in picked) for far, name in enumerate("ab")}
            file.write(json.dumps({**row, "length": len(picked)}) + "\n")
    save_encoder_decoder(folder / "base")
    tiny.tokenizer().save_pretrained(str(folder / "base"))
    return {
        "task": {"kind": "seq2seq", "source": "a", "target": "b"},
        "evaluate": {"generate": {"max_new_tokens": 8, "rows": 40}, "samples": 1},
        "teacher__lora": "null",
        "student": {"from_teacher": {"spread": 2, "decoder": 1}},
    }


def save_encoder_decoder(folder: Path, **changes: object) -> None:
    torch.manual_seed(1)
    MarianMTModel(encoder_decoder(**changes)).save_pretrained(str(folder))


def encoder_decoder(**changes: object) -> MarianConfig:
    ids = {word: tiny.WORDS.index(f"[{word.upper()}]") for word in ("pad", "cls", "sep")}
    settings = {
        "vocab_size": len(tiny.WORDS), "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 64, "pad_token_id": ids["pad"], "eos_token_id": ids["sep"],
        "bos_token_id": ids["cls"], "decoder_start_token_id": ids["pad"], "forced_eos_token_id": None,
        "scale_embedding": True,
    }  # fmt: skip
    return MarianConfig(**(settings | changes))


def pictures(folder: Path) -> dict:
    """Digits by hand, from 0 to 3, for ResNets with BatchNorm."""
    digits = load_digits(n_class=4)
    order = np.random.default_rng(1).permutation(len(digits.target))[:400]
    features = datasets.Features({"image": datasets.Image(), "digit": datasets.Value("string")})
    rows = {
        "image": [{"bytes": png(digits.images[at]), "path": None} for at in order],
        "digit": [str(digits.target[at]) for at in order],
    }
    datasets.Dataset.from_dict(rows, features).to_parquet(str(folder / "rows.parquet"))
    torch.manual_seed(1)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(str(folder / "base"))
    reader = {"size": {"height": 16, "width": 16}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "base" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **reader})
    )
    task = {"kind": "image_classification", "image": "image", "label": "digit", "labels": list("0123")}
    return {
        "task": task, "data__source": str(folder / "rows.parquet"), "teacher__lora": "null",
        "student": {"model": str(folder / "base")},
    }  # fmt: skip


def png(points: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray((points * 255 / 16).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def vectors(folder: Path) -> dict:
    """Texts alone: the teacher's vectors are all there is to learn."""
    rng, words = random.Random(0), [*tiny.PLAIN, *tiny.GOOD, *tiny.BAD]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(500):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(2, 9)))}) + "\n")
    as_is = {"teacher__fit": "null", "teacher__optim": None, "teacher__lora": None}
    return {
        "task": {"kind": "embedding", "text": "text"}, **as_is, "distil__alpha": 1, "distil__temperature": 1
    }  # fmt: skip


TASKS = {
    "embedding": vectors,
    "image_classification": pictures,
    "seq2seq": rewriting,
    "question_answering": questions,
    "multi_label_classification": multi_label,
    "regression": regression,
    "token_classification": tagging,
}
MAIN = {"multi_label_classification": "samples_f1", "regression": "r2", "token_classification": "entity_f1"}


def workspace(folder: Path, kind: str, **changes: object) -> Path:
    if kind not in ("seq2seq", "image_classification"):  # these bring models of their own
        tiny.save_model(folder / "base")  # a body that knows two moods, and nothing between them, would be a hindrance
    settings = {
        "data__source": str(folder / "rows.jsonl"), "evaluate": {}, "teacher__quantize": "none", "teacher__lora": None,
        "teacher__optim": OPTIM, "teacher__fit": FIT, "distil__fit": FIT, "distil__optim": OPTIM, **TASKS[kind](folder),
    }  # fmt: skip
    return commands.workspace(folder, **{**settings, **changes})


EPOCHS = {
    "image_classification": 6, "multi_label_classification": 6, "question_answering": 5, "regression": 12,
    "seq2seq": 10, "token_classification": 4,
}  # fmt: skip


def learnable(folder: Path, kind: str, **changes: object) -> Path:
    """`workspace` whose models all learn the task in a few epochs: the base tells words apart from the start."""
    fit = {**FIT, "epochs": EPOCHS[kind]}
    optim = {"lr": 0.01 if kind == "image_classification" else 0.005}
    settings = {"teacher__fit": fit, "teacher__optim": optim, "distil__fit": fit, "distil__optim": optim}
    recipe = workspace(folder, kind, **{**settings, **changes})
    if kind == "seq2seq":
        save_encoder_decoder(folder / "base", init_std=0.1)
    elif kind != "image_classification":
        tiny.save_model(folder / "base", initializer_range=0.1)
    return recipe
