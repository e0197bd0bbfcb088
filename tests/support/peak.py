"""Take real steps with the loop in a process of its own, and tell how much memory they took: peak.py KIND OUT."""

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

ROWS, TOKENS = 8, 256
LANGUAGE = CausalLMTask(CausalLM(kind="causal_lm", text="text"))


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def built(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "dropout":  # BERT's own, 0.1
        config = transformers.BertConfig(
            vocab_size=20_000, hidden_size=384, num_hidden_layers=8, num_attention_heads=6, intermediate_size=1536
        )
        return transformers.BertForSequenceClassification(config)
    config = transformers.Qwen2Config(
        vocab_size=32_000, hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=1024, tie_word_embeddings=True, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def main(kind: str, out: Path) -> None:
    precision = "bf16" if kind == "half-adapter" else "fp32"
    torch.set_num_threads(1)
    # mapped and unmapped, not kept: what is held is what is used
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(-1, 1 << 20)  # M_TRIM_THRESHOLD
    runtime = Runtime()
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(5, 20_000, (ROWS, TOKENS)))
    language = kind != "dropout"
    if language:
        rows = {"input_ids": ids.tolist(), "target": [[False] + [True] * (TOKENS - 1)] * ROWS,
                "segments": [[TOKENS]] * ROWS, "num_bytes": [TOKENS] * ROWS}  # fmt: skip
        batch = LANGUAGE.collate(rows, transformers.PreTrainedTokenizerBase())
    else:
        batch = {
            "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            "labels_N": torch.zeros(ROWS).long(),
        }

    def loss_sum(bare: torch.nn.Module, given: dict) -> torch.Tensor:
        with runtime.autocast(precision):
            if language:
                return LANGUAGE.loss_sum(bare, given, Loss(), None)
            return distil_sum(bare(**given["inputs"]).logits, given["labels_N"], None, Loss())

    before = status("VmRSS")
    model = built(kind)
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
    fit = Fit(epochs=1, batch_size=ROWS, micro_batch_size=ROWS, precision=precision)
    work = Work(
        label="peak", fit=fit, optim=optim, seed=0,
        lengths_N=np.full(ROWS, TOKENS, dtype=np.int32), load_batch=lambda *_: batch, loss_sum=loss_sum,
        count_rows=lambda given: len(given["labels_N"]), validate=lambda _: {}, folder=out.parent,
    )  # fmt: skip
    wrapped = wrap(runtime, model)
    optimizer = make_optimizer(model, optim)
    for step in (5, 6):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: the first step has no moments yet
        optimizer_step(runtime, wrapped, optimizer, np.arange(ROWS), work, step)
    tuned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    load = MemoryModel(
        Shape.of(config.to_dict(), total, sum(map(math.prod, linear.values())), config.num_hidden_layers),
        4.0 * (total + tuned * (tuned < total)), tuned, TOKENS, ROWS, half=precision == "bf16", language=language,
        adapted=sum(shape[1] for shape in linear.values()) if adapter else 0, adapter_dropout=adapter is not None,
    )  # fmt: skip
    out.write_text(json.dumps({"peak_bytes": status("VmHWM") - before, "load": asdict(load)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
