"""The gate's child process: answers calls from the exported files alone.

Started as `python -m distilpeft.export.gate_process FOLDER CALLS OUT`, so that nothing of the process that wrote the
files can help to read them.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from distilpeft.export.generation import generate
from distilpeft.export.runtimes import Array, Inputs, Runner, open_model2vec, open_runner

TEXTS = "texts.json"
"""Texts to be read next to the calls, for a runtime that tokenises by itself."""
STEPS = 4
"""Single tokens after a cut, in calls that go through the cache; the rest follows at once."""


def through_cache(runner: Runner, inputs: Inputs, cut: int) -> Array:
    """Logits [B, S, V] as generation computes them: `cut` positions at once, then one by one, then the rest."""
    ids_BS, mask_BS = inputs["input_ids"], inputs["attention_mask"]
    width = ids_BS.shape[1]
    edges = [0, *range(cut, min(cut + STEPS, width) + 1), width]
    parts, cache = [], None
    for start, end in pairwise(edges):
        if end > start:
            part = {"input_ids": ids_BS[:, start:end], "attention_mask": mask_BS[:, :end]}
            logits, cache = runner.run(part, cache)
            parts.append(logits)
    return np.concatenate(parts, axis=1)


def answer(folder: Path, calls: Path, out: Path) -> None:
    """Answer the gate's calls: `calls` is an .npz of arrays `N.input_ids`, ... and `N.at`, the flat positions wanted.

    Leaves `N.npy` in `out`: logits [positions, C or V], float32. `N.cut` sends a call through the cache. Arrays
    `prompt.N` are continued by `new_tokens` tokens, which go to `tokens.json`.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    runner = open_runner(folder, threads)
    arrays = np.load(calls, allow_pickle=False)
    numbers = sorted({int(name.split(".")[0]) for name in arrays.files if name[0].isdecimal()})
    for number in numbers:
        call = {name.partition(".")[2]: arrays[name] for name in arrays.files if name.split(".")[0] == str(number)}
        at, cut = call.pop("at"), call.pop("cut", None)
        logits = runner.run(call)[0] if cut is None else through_cache(runner, call, int(cut))
        np.save(out / f"{number}.npy", logits.reshape(-1, logits.shape[-1])[at], allow_pickle=False)
    prompts = [arrays[name].tolist() for name in arrays.files if name.startswith("prompt.")]
    continuations = [generate(runner, ids, int(arrays["new_tokens"]), ()) for ids in prompts]
    if (calls.parent / TEXTS).is_file():
        _read_texts(folder, json.loads((calls.parent / TEXTS).read_text(encoding="utf-8"))["texts"], out)
    (out / "tokens.json").write_text(json.dumps(continuations), encoding="utf-8")


def _read_texts(folder: Path, texts: list[str], out: Path) -> None:
    """Texts through both libraries that open model2vec's layout, as their users call them.

    Leaves `texts.npy`, the outputs of model2vec, and its `vectors.npy` and `others.npy`, those of
    sentence-transformers; [texts, C or D].
    """
    from sentence_transformers import SentenceTransformer

    model, head = open_model2vec(folder)
    vectors_TD = model.encode(texts)
    outputs = {
        "texts": vectors_TD if head is None else head.predict_regression(vectors_TD),
        "vectors": vectors_TD,
        "others": SentenceTransformer(str(folder), device="cpu").encode(texts),
    }
    for name, array in outputs.items():
        np.save(out / f"{name}.npy", array, allow_pickle=False)


if __name__ == "__main__":
    answer(*map(Path, sys.argv[1:4]))
