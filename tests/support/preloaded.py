"""What the processes of tests need, imported once in the server that they are forked from; nothing else is done here."""

from __future__ import annotations

import gc
import importlib

NAMES = (
    "distilpeft.cli", "distilpeft.pipeline.chain", "distilpeft.benchmark.model_process",
    "distilpeft.export.gate_process", "distilpeft.tuning.search", "support.commands", "support.tiny_lm",
    "support.tiny_tasks", "evaluate", "sklearn.metrics", "transformers.pipelines", "onnxruntime", "peft.tuners.lora.bnb",
    "requests", "distilpeft.metrics.classification",
)  # fmt: skip

for name in NAMES:
    importlib.import_module(name)
gc.freeze()  # Accelerate collects garbage after every training, and the libraries' objects are many
