"""The same distillation of a language model in our loop, in a bare PyTorch loop, and in TRL's GKDTrainer.

    python benchmarks/peers.py                              # all cells; about 20 minutes on two cores
    python benchmarks/peers.py --cells tiny:8192 small:151936
    python benchmarks/peers.py --device cuda
    python benchmarks/peers.py --table                      # Markdown from the result file, and into docs/peers.md

Teacher and student are Llamas with random weights, tied embeddings and one vocabulary. The loss is the forward KL at
temperature 1 over all tokens but the first; the teacher is frozen and runs in every step; float32, AdamW, gradients
clipped to 1. All arms load the same weights and take the same batches in the same order, and their losses of the first
steps have to agree, or there is no result.

- `ours`: `train.optimizer_step` as a run calls it, with the fused loss.
- `bare`: what one writes by hand: two forwards, log_softmax, kl_div, backward, clip, step, on batches that are there.
- `trl`: GKDTrainer.train() off-policy (lmbda 0, beta 0), from one on_step_end to the next, so with all that its users
  pay for. Skipped if the package `trl` is not installed (extra `peers`).

Each arm is a process of its own. They take turns in rotating order, and the ratio is the median over rounds. Memory is
the most that a process holds that takes three steps and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import page

HERE = Path(__file__).parent
RESULT = HERE / "results" / "peers_{}.json"
PAGE = HERE.parent / "docs" / "peers.md"
SIZES = {
    "tiny": {"hidden": 128, "student": 2, "teacher": 4, "rows": 4, "tokens": 128},
    "small": {"hidden": 512, "student": 4, "teacher": 8, "rows": 4, "tokens": 256},
}
VOCABULARIES = (8192, 49152, 151936)
ARMS = ("ours", "bare", "trl")
LR, CLIP, CHECKED, WARMUP, MEMORY_STEPS = 1e-4, 1.0, 3, 3, 3
AGREE = 1e-4


def make_models(folder: Path, size: dict[str, int], vocabulary: int) -> None:
    """Save teacher and student, the same for all arms."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=size["hidden"], intermediate_size=size["hidden"] * 4,
            num_hidden_layers=size[role], num_attention_heads=size["hidden"] // 64,
            num_key_value_heads=size["hidden"] // 64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, initializer_range=0.05,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / role)


def load(folder: Path, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    teacher, student = (AutoModelForCausalLM.from_pretrained(folder / role, dtype="float32").to(device)
                        for role in ("teacher", "student"))  # fmt: skip
    return teacher.requires_grad_(False).eval(), student.train()


def batches(size: dict[str, int], vocabulary: int, count: int) -> np.ndarray:
    """Token ids of every step, [steps, rows, tokens]."""
    return np.random.default_rng(0).integers(3, vocabulary, (count, size["rows"], size["tokens"]))


def steps_of(arm: str, folder: Path, size: dict[str, int], ids: np.ndarray, device: str) -> Iterator[float]:
    """Take one step after the other; gives each step's loss."""
    return {"ours": ours, "bare": bare, "trl": trl}[arm](folder, size, ids, device)


def ours(folder: Path, size: dict[str, int], ids: np.ndarray, device: str) -> Iterator[float]:
    from distilpeft.losses import Loss
    from distilpeft.recipe import CausalLM, Fit, Optim
    from distilpeft.runtime import Runtime
    from distilpeft.tasks import causal_lm
    from distilpeft.train import Step, Work, make_optimizer, optimizer_step

    runtime = Runtime()
    teacher, student = load(folder, device)
    task = CausalLM(kind="causal_lm", text="text")
    for model in (teacher, student):
        causal_lm.prepare(task, model)
    loss = Loss(alpha=1.0, temperature=1.0)
    rows, tokens = size["rows"], size["tokens"]

    class Tokenizer:
        pad_token_id = 0

    def load_batch(chosen: np.ndarray) -> dict[str, Any]:
        found = [ids[row // rows, row % rows].tolist() for row in chosen]
        target = [[False] + [True] * (tokens - 1)] * len(found)
        columns = {"input_ids": found, "target": target, "segments": [[tokens]] * len(found),
                   "num_bytes": [0] * len(found)}  # fmt: skip
        return causal_lm.collate(columns, Tokenizer())

    def loss_sum(model: Any, batch: dict[str, Any]) -> Any:
        import torch

        with torch.no_grad():
            soft = causal_lm.soft(teacher, batch)
        return causal_lm.loss_sum(model, batch, loss, soft)

    with tempfile.TemporaryDirectory() as out:
        work = Work(
            label="ours", fit=Fit(epochs=1, batch_size=rows, micro_batch_size=rows),
            optim=Optim(lr=LR, max_grad_norm=CLIP), seed=0, load_batch=load_batch, loss_sum=loss_sum,
            lengths_N=np.full(ids.shape[0] * rows, tokens, np.int32),
            count_rows=causal_lm.count_rows, validate=lambda _: {}, folder=Path(out),
        )  # fmt: skip
        wrapped, optimizer = runtime.accelerator.prepare(Step(student, loss_sum), make_optimizer(student, work.optim))
        for step in range(len(ids)):
            chosen = np.arange(step * rows, (step + 1) * rows)
            yield optimizer_step(runtime, wrapped, optimizer, chosen, work, step)["loss"]


def bare(folder: Path, size: dict[str, int], ids: np.ndarray, device: str) -> Iterator[float]:
    import torch
    from torch.nn import functional

    del size
    teacher, student = load(folder, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0, fused=True)
    ready = [torch.from_numpy(one).to(device) for one in ids]
    for batch in ready:
        with torch.no_grad():
            known = functional.log_softmax(teacher(input_ids=batch).logits[:, :-1], dim=-1)
        found = functional.log_softmax(student(input_ids=batch).logits[:, :-1], dim=-1)
        loss = functional.kl_div(found, known, reduction="sum", log_target=True) / known[..., 0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def trl(folder: Path, size: dict[str, int], ids: np.ndarray, device: str) -> Iterator[float]:
    """GKDTrainer has a loop of its own: it runs in a thread that is let go on from step to step."""
    import threading
    from queue import Queue

    asked, told = Queue(), Queue()
    trainer = gkd_trainer(folder, size, ids, device, asked, told)
    thread = threading.Thread(target=trainer.train, daemon=True)
    for step in range(len(ids)):
        if step:
            asked.put(None)
        else:
            thread.start()
        yield told.get()


def gkd_trainer(folder: Path, size: dict[str, int], ids: np.ndarray, device: str, asked: Any, told: Any) -> Any:
    import datasets
    import torch
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    words = {name: number for number, name in enumerate(("<pad>", "<s>", "</s>"))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
                                        pad_token="<pad>", bos_token="<s>", eos_token="</s>")  # fmt: skip
    losses: list[Any] = []

    class Trainer(GKDTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            found = super().compute_loss(*arguments, **named)
            losses.append((found[0] if isinstance(found, tuple) else found).detach())
            return found

    class Turns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            told.put(float(losses[-1]))
            if state.global_step < len(ids):
                asked.get()

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = torch.tensor([row["input_ids"] for row in rows])
        labels = found.clone()
        labels[:, 0] = -100  # nothing predicts it, and GKDTrainer counts what it divides by before the shift
        return {"input_ids": found, "attention_mask": torch.ones_like(found), "labels": labels}

    teacher, student = load(folder, device)
    config = GKDConfig(
        output_dir=str(folder / "trl"), lmbda=0.0, beta=0.0, temperature=1.0, seq_kd=False,
        per_device_train_batch_size=size["rows"], max_steps=len(ids), learning_rate=LR, lr_scheduler_type="constant",
        max_grad_norm=CLIP, weight_decay=0.0, logging_strategy="no", save_strategy="no", eval_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=device == "cpu", bf16=False, gradient_checkpointing=False,
        dataloader_pin_memory=False, seed=0, max_length=size["tokens"],
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"input_ids": ids.reshape(-1, ids.shape[-1]).tolist()})
    return Trainer(model=student, teacher_model=teacher, args=config, train_dataset=rows, processing_class=tokenizer,
                   data_collator=collate, callbacks=[Turns()])  # fmt: skip


def serve(pipe: Any, arm: str, folder: Path, cell: str, steps: int, device: str) -> None:
    """An arm in its process: a step at every word, its seconds and loss back; at last the memory."""
    name, vocabulary = cell.split(":")
    size = SIZES[name]
    ids = batches(size, int(vocabulary), steps)
    found = steps_of(arm, folder, size, ids, device)
    wait = finish(device)
    for _ in range(steps):
        pipe.recv()
        begin = time.perf_counter()
        loss = next(found)
        wait()
        pipe.send({"seconds": time.perf_counter() - begin, "loss": loss})
    pipe.recv()
    pipe.send({"peak_bytes": peak(device)})
    pipe.recv()


def finish(device: str) -> Any:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def peak(device: str) -> int:
    import torch

    from distilpeft.timed import peak_bytes

    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else peak_bytes()


class Arm:
    """An arm's process."""

    def __init__(self, arm: str, folder: Path, cell: str, steps: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, arm, folder, cell, steps, device), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self) -> dict[str, Any]:
        """A step's seconds and loss; after the last one its memory."""
        self._pipe.send(None)
        return self._pipe.recv()

    def end(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.join()


def measure(cell: str, arms: list[str], rounds: int, device: str) -> dict[str, Any]:
    name, vocabulary = cell.split(":")
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder, size, int(vocabulary))
        used = {arm: memory_of(arm, folder, cell, device) for arm in arms}
        running = {arm: Arm(arm, folder, cell, WARMUP + rounds, device) for arm in arms}
        try:
            first = {arm: [running[arm].ask()["loss"] for _ in range(WARMUP)] for arm in arms}
            agree(cell, first)
            seconds: dict[str, list[float]] = {arm: [] for arm in arms}
            for turn in range(rounds):
                at = turn % len(arms)
                for arm in arms[at:] + arms[:at]:
                    seconds[arm].append(running[arm].ask()["seconds"])
        finally:
            for arm in running.values():
                arm.end()
    tokens = size["rows"] * size["tokens"]
    return {
        "rows": size["rows"], "tokens": size["tokens"], "rounds": rounds, "losses": first,
        "arms": {
            arm: {
                "step_ms": round(median(seconds[arm]) * 1000, 1),
                "tokens_per_s": round(tokens / median(seconds[arm]), 1),
                **used[arm],
                **{f"time_over_{other}": ratio(seconds[arm], seconds[other]) for other in arms if other != arm},
            }
            for arm in arms
        },
    }  # fmt: skip


def memory_of(arm: str, folder: Path, cell: str, device: str) -> dict[str, int]:
    one = Arm(arm, folder, cell, MEMORY_STEPS, device)
    try:
        for _ in range(MEMORY_STEPS):
            one.ask()
        return one.ask()
    finally:
        one.end()


def agree(cell: str, losses: dict[str, list[float]]) -> None:
    for arm, found in losses.items():
        for step, (one, two) in enumerate(zip(found, losses["bare"], strict=True)):
            if abs(one / two - 1) > AGREE:
                sys.exit(
                    f"{cell}: step {step + 1}: {arm} has a loss of {one}, the bare loop of {two}: not the same work"
                )


def ratio(one: list[float], two: list[float]) -> dict[str, float]:
    each = [a / b for a, b in zip(one, two, strict=True)]
    low, _, high = quantiles(each, n=4)
    return {"median": round(median(each), 3), "q1": round(low, 3), "q3": round(high, 3)}


def environment(device: str) -> dict[str, Any]:
    import torch

    from distilpeft.runtime import device_name

    names = [name for name in ("torch", "transformers", "accelerate", "trl") if find_spec(name)]
    return {
        "device": device_name(torch.device(device)), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "versions": {name: metadata.version(name) for name in names},
    }  # fmt: skip


def table(device: str) -> str:
    found = json.loads(Path(str(RESULT).format(device)).read_text())
    lines = [
        "| models, vocabulary | tokens/s ours | bare | TRL | our time ÷ bare's | ÷ TRL's | peak MB ours | bare | TRL "
        "| our memory ÷ TRL's |",
        "| --- " * 10 + "|",
    ]
    for cell, one in found["cells"].items():
        name, vocabulary = cell.split(":")
        arms = one["arms"]
        speed = [f"{arms[arm]['tokens_per_s']:.0f}" if arm in arms else "-" for arm in ARMS]
        size = [f"{arms[arm]['peak_bytes'] / 1e6:.0f}" if arm in arms else "-" for arm in ARMS]
        times = [spread(arms["ours"].get(f"time_over_{arm}")) for arm in ("bare", "trl")]
        share = f"{arms['ours']['peak_bytes'] / arms['trl']['peak_bytes']:.2f}" if "trl" in arms else "-"
        lines.append(f"| {name}, {int(vocabulary):,} | {' | '.join([*speed, *times, *size, share])} |")
    told = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return "\n".join([*lines, "", f"{told['device']}, {told['threads']} threads, {versions}; quartiles in brackets."])


def spread(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f} ({found['q1']:.2f} to {found['q3']:.2f})" if found else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{name}:{vocabulary}" for name in SIZES for vocabulary in VOCABULARIES]
    parser.add_argument("--cells", nargs="+", default=every, metavar="SIZE:VOCABULARY")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        text = table(options.device)
        page.insert(PAGE, "peers", text)
        print(text)
        return
    arms = [arm for arm in ARMS if arm != "trl" or find_spec("trl")]
    if "trl" not in arms:
        print("the package trl is not installed: without its arm", file=sys.stderr)
    file = Path(str(RESULT).format(options.device))
    for cell in options.cells:
        print(f"{cell}: {', '.join(arms)}, {options.rounds} rounds", file=sys.stderr)
        found = measure(cell, arms, options.rounds, options.device)
        whole = json.loads(file.read_text()) if file.is_file() else {"cells": {}}
        whole["cells"][cell] = found
        whole["cells"] = {name: whole["cells"][name] for name in sorted(whole["cells"], key=order)}
        whole["environment"] = environment(options.device)
        file.write_text(json.dumps(whole, indent=1) + "\n")
        print(json.dumps(found["arms"], indent=1), file=sys.stderr)
    print(f"result: {file}")


def order(cell: str) -> tuple[int, int]:
    name, vocabulary = cell.split(":")
    return list(SIZES).index(name), int(vocabulary)


if __name__ == "__main__":
    main()
