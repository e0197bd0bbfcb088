"""Measure one model: latency at batch 1, throughput at the recipe's batch, parameters and bytes.

A first simple measurement, on real rows of the evaluation split: models are timed one after the other, so compare
figures of one run only, and small differences not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from distilpeft import models
from distilpeft.machine import machine_name
from distilpeft.pair import Loaded
from distilpeft.recipe import Recipe
from distilpeft.runtime import Runtime
from distilpeft.tasks import TaskData, Tokens


def run(runtime: Runtime, recipe: Recipe, data: TaskData, loaded: Loaded) -> dict[str, Any]:
    """Time the model in fp32 as it was loaded.

    Returns:
        latency_ms (p50, p95 of one row), throughput_rows_per_s (median over batches), num_parameters, size_bytes.
    """
    settings = recipe.benchmark
    device = runtime.device if settings.device == "auto" else torch.device(settings.device)
    model = loaded.model.to(device)
    rows = data.tokens(recipe.evaluate.split, loaded.tokenizer, loaded.tokenizer_digest)
    single_s = _time(data, model, rows, settings.warmup, settings.repeats, 1, device)
    batch = min(settings.batch_size, len(rows.lengths_N))
    many_s = _time(data, model, rows, 1, max(5, settings.repeats // 5), batch, device)
    p50, p95 = np.percentile(single_s, [50, 95]) * 1000
    return {
        "latency_ms": {"p50": round(float(p50), 3), "p95": round(float(p95), 3)},
        "throughput_rows_per_s": round(float(batch / np.median(many_s)), 1),
        "batch_size": batch,
        "device": str(device),
        "machine": machine_name(),
        "threads": torch.get_num_threads(),
        "num_parameters": models.num_parameters(model),
        "size_bytes": models.size_bytes(model),
    }


def _time(
    data: TaskData, model: Any, rows: Tokens, warmup: int, repeats: int, batch_size: int, device: torch.device
) -> list[float]:
    """Seconds of each forward pass over `batch_size` random rows, the same rows for every model."""
    rng = np.random.default_rng(0)
    finish: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for turn in range(warmup + repeats):
        picked = rng.integers(0, len(rows.lengths_N), batch_size)
        inputs = send_to_device(rows.load_batch(picked)["inputs"], device)
        finish()
        begin = time.perf_counter()
        with torch.inference_mode():
            data.task.forward(model, inputs)
        finish()
        if turn >= warmup:
            seconds.append(time.perf_counter() - begin)
    return seconds
