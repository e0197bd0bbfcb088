"""Take real steps with the loop in a process of its own, and tell how much memory they took: KIND OUT.

What libraries allocate once, for a model of any size (30 MB), is gone through with a model of one layer before. bf16 is
multiplied at 1 to 8 GFLOP/s on a processor without instructions for it, so the models are narrow.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers

from distilpeft.distillation.losses import Loss, distil_sum
from distilpeft.machine.runtime import Runtime
from distilpeft.models import loading, lora
from distilpeft.models.parallel import wrap
from distilpeft.planning.memory import MemoryModel, Shape
from distilpeft.recipe.task import CausalLM
from distilpeft.recipe.training import Fit, Lora, Optim
from distilpeft.tasks.language.causal_lm import CausalLMTask
from distilpeft.training.step import Work, make_optimizer, optimizer_step

ROWS, TOKENS = 8, 128
VOCABULARY, LAYERS = 16_000, 12
LANGUAGE = CausalLMTask(CausalLM(kind="causal_lm", text="text"))


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def built(kind: str, layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "dropout":  # BERT's own, 0.1
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=512,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=352, tie_word_embeddings=True, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def batch_of(rows: int, *, language: bool) -> dict:
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, VOCABULARY, (rows, TOKENS)))
    if language:
        given = {"input_ids": ids.tolist(), "target": [[False] + [True] * (TOKENS - 1)] * rows,
                 "segments": [[TOKENS]] * rows, "num_bytes": [TOKENS] * rows}  # fmt: skip
        return LANGUAGE.collate(given, transformers.PreTrainedTokenizerBase())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"inputs": inputs, "labels_N": torch.zeros(rows).long()}


def main(kind: str, out: Path) -> None:
    torch.set_num_threads(1)
    # mapped and unmapped, not kept: what is held is what is used
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(-1, 1 << 16)  # M_TRIM_THRESHOLD
    measured(kind, 1, 1, out.parent)
    out.write_text(json.dumps(measured(kind, LAYERS, ROWS, out.parent)))


def measured(kind: str, layers: int, rows: int, folder: Path) -> dict:
    """Bytes that a model and the second of two steps take at most, and what a plan knows of them."""
    precision, language = "bf16" if kind == "half-adapter" else "fp32", kind != "dropout"
    runtime = Runtime()
    batches = iter([batch_of(1, language=language), batch_of(rows, language=language)])

    def loss_sum(bare: torch.nn.Module, given: dict) -> torch.Tensor:
        with runtime.autocast(precision):
            if language:
                return LANGUAGE.loss_sum(bare, given, Loss(), None)
            return distil_sum(bare(**given["inputs"]).logits, given["labels_N"], None, Loss())

    before = status("VmRSS")
    model = built(kind, layers)
    total = sum(weight.numel() for weight in model.parameters())
    linear = {
        name: weight.shape
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "embed" not in name and "lm_head" not in name
    }
    config = model.config
    if kind == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = Lora(rank=8, alpha=16, dropout=0.05) if kind == "half-adapter" else None
    if adapter is not None:
        language_model = loading.Architecture(LANGUAGE.auto_class, LANGUAGE.peft_task, {}, train_heads=False)
        model = lora.add_lora(model, adapter, language_model, ["lm_head"], "teacher.lora")
    if language:
        LANGUAGE.prepare(model)
    optim = Optim(lr=1e-4)
    fit = Fit(epochs=1, batch_size=rows, micro_batch_size=rows, precision=precision)
    work = Work(
        label="peak", fit=fit, optim=optim, seed=0,
        lengths_N=np.full(rows, TOKENS, dtype=np.int32), load_batch=lambda *_: next(batches), loss_sum=loss_sum,
        count_rows=lambda given: len(given["labels_N"]), validate=lambda _: {}, folder=folder,
    )  # fmt: skip
    wrapped = wrap(runtime, model)
    optimizer = make_optimizer(model, optim)
    for step in (5, 6):  # the first one, of a single row, makes the moments
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        optimizer_step(runtime, wrapped, optimizer, np.arange(rows), work, step)
    tuned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    load = MemoryModel(
        Shape.of(config.to_dict(), total, sum(map(math.prod, linear.values())), config.num_hidden_layers),
        4.0 * (total + tuned * (tuned < total)), tuned, TOKENS, rows, half=precision == "bf16", language=language,
        adapted=sum(shape[1] for shape in linear.values()) if adapter else 0, adapter_dropout=adapter is not None,
    )  # fmt: skip
    return {"peak_bytes": status("VmHWM") - before, "load": asdict(load)}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
