"""The same distillation of a language model in our loop, in a bare PyTorch loop, and in TRL's GKDTrainer.

    python benchmarks/peers.py                              # all cells
    python benchmarks/peers.py --cells tiny:8192 small:151936   # these anew, the others stay as they are
    python benchmarks/peers.py --device cuda                # has not been run
    python benchmarks/peers.py --table                      # Markdown from the result file, into the docs

Teacher and student are Llamas with random weights, tied embeddings (as small Qwens) and one vocabulary. The loss is
the forward KL at temperature 1 over all tokens but the first, per token; the teacher is frozen and runs in every step;
float32, AdamW without weight decay, a constant lr, gradients clipped to 1. All arms load the same files and take the
same batches in the same order, and their losses of steps 1 to 3 have to agree to 1e-4, or there is no result: lr 2 %
off, no update, or the reverse KL would be seen (2e-4 and more, tiny:8192); clipping would not, as the norm is small.

- `ours`: `train.optimizer_step` with the fused loss, from token lists to new weights. What `train.train` does besides
  in a step (a line in the log, the seed, the learning rate) is not in it.
- `bare`: what one writes by hand: two forwards, log_softmax, kl_div, backward, clip, fused AdamW, on tensors that are
  there before. No tensor of a step lives on into the next.
- `trl`: GKDTrainer.train() off-policy (lmbda 0, beta 0), from one on_step_end to the next, told by a TrainerCallback:
  fetching, its own collator on rows that are tokens already, forward, backward, clip, step, and whatever else it does.
  Gradient checkpointing and bf16, its defaults, are off. Skipped with a line if trl cannot be imported (extra `peers`).

Each arm is a process of its own that waits at a pipe until it is its turn. Turns rotate; two steps warm up; a ratio is
that of one round, and the figure the median over rounds. Memory is of another, fresh process that takes three steps:
`peak` is the most it ever held, libraries and models included; `step` the most during the steps above what it held
right before the first (of Adam's state, which that step makes, both tell). On a GPU both are PyTorch's allocations.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import page

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE, README = HERE.parent / "docs" / "peers.md", HERE.parent / "README.md"
SIZES = {
    "tiny": {"hidden": 128, "student": 2, "teacher": 4, "rows": 4, "tokens": 128},
    "small": {"hidden": 512, "student": 4, "teacher": 8, "rows": 4, "tokens": 256},
}
VOCABULARIES = (8192, 49152, 151936)
LR, CLIP = 1e-3, 1.0
WARMUP, CHECKED = 2, 3
AGREE = 1e-4


class Turns:
    """An arm's end of the pipe: it calls `begin` and `end` around each step."""

    def __init__(self, pipe: Any, device: str) -> None:
        self._pipe, self._device = pipe, device
        self._memory: Memory | None = None
        self._at = 0.0

    def begin(self) -> None:
        """Wait until this arm may take a step; tell its memory in the meantime if that is asked for."""
        self._memory = self._memory or Memory(self._device)
        try:
            while self._pipe.recv() == "memory":
                self._pipe.send(self._memory.told())
        except EOFError:  # the parent has all that it wanted
            sys.exit()
        self._at = time.perf_counter()

    def end(self, loss: Any) -> None:
        """Tell the step's seconds and loss."""
        value = float(loss)
        synchronize(self._device)
        self._pipe.send({"seconds": time.perf_counter() - self._at, "loss": value})


class Memory:
    """Most bytes that this process holds, ever and above what it holds now."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cuda":
            import torch

            synchronize(device)
            self._earlier = self._now = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._earlier, self._now = status("VmHWM"), status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: loading may have held more than a step

    def told(self) -> dict[str, int]:
        """`peak_bytes` and `step_bytes`."""
        if self._device == "cuda":
            import torch

            highest = torch.cuda.max_memory_allocated()
        else:
            highest = status("VmHWM")
        return {"peak_bytes": max(self._earlier, highest), "step_bytes": highest - self._now}


def status(name: str) -> int:
    """Bytes, as the kernel tells of this process; ru_maxrss would count the parent's."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


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

    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype="float32").to(device)
        for role in ("teacher", "student")
    )
    return teacher.requires_grad_(False).eval(), student.train()


def batches(size: dict[str, int], vocabulary: int, count: int) -> np.ndarray:
    """Token ids of every step, [steps, rows, tokens]."""
    return np.random.default_rng(0).integers(3, vocabulary, (count, size["rows"], size["tokens"]))


def ours(turns: Turns, folder: Path, ids: np.ndarray, device: str) -> None:
    import torch

    from distilpeft.distillation.losses import Loss
    from distilpeft.machine.runtime import Runtime
    from distilpeft.models.parallel import wrap
    from distilpeft.recipe.task import CausalLM
    from distilpeft.recipe.training import Fit, Optim
    from distilpeft.tasks.language.causal_lm import CausalLMTask
    from distilpeft.training.step import Work, make_optimizer, optimizer_step

    runtime = Runtime()
    assert runtime.device.type == device, f"{runtime.device} is not {device}"
    teacher, student = load(folder, device)
    task = CausalLMTask(CausalLM(kind="causal_lm", text="text"))
    for model in (teacher, student):
        task.prepare(model)
    loss, tokenizer = Loss(alpha=1.0, temperature=1.0), SimpleNamespace(pad_token_id=0)
    steps, rows, tokens = ids.shape
    lists = ids.reshape(-1, tokens).tolist()
    target = [False] + [True] * (tokens - 1)

    def load_batch(chosen: np.ndarray, epoch: int = 0) -> dict[str, Any]:
        count = len(chosen)
        columns = {
            "input_ids": [lists[row] for row in chosen], "target": [target] * count, "segments": [[tokens]] * count,
            "num_bytes": [0] * count,
        }  # fmt: skip
        return task.collate(columns, tokenizer)

    def loss_sum(model: Any, batch: dict[str, Any]) -> Any:
        with torch.no_grad():
            soft = task.soft(teacher, batch)
        return task.loss_sum(model, batch, loss, soft)

    work = Work(
        label="ours", fit=Fit(epochs=1, batch_size=rows, micro_batch_size=rows),
        optim=Optim(lr=LR, max_grad_norm=CLIP, weight_decay=0.0), seed=0, load_batch=load_batch, loss_sum=loss_sum,
        lengths_N=np.full(len(lists), tokens, np.int32), count_rows=task.count_rows, validate=lambda _: {},
        folder=folder,
    )  # fmt: skip
    wrapped, optimizer = wrap(runtime, student), make_optimizer(student, work.optim)
    for step, chosen in enumerate(np.arange(steps * rows).reshape(steps, rows)):
        turns.begin()
        turns.end(optimizer_step(runtime, wrapped, optimizer, chosen, work, step).loss)


def bare(turns: Turns, folder: Path, ids: np.ndarray, device: str) -> None:
    import torch
    from torch.nn import functional

    teacher, student = load(folder, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            known = functional.log_softmax(teacher(input_ids=batch).logits[:, :-1], dim=-1)
        found = functional.log_softmax(student(input_ids=batch).logits[:, :-1], dim=-1)
        return functional.kl_div(found, known, reduction="sum", log_target=True) / batch[:, 1:].numel()

    for batch in [torch.from_numpy(one).to(device) for one in ids]:
        turns.begin()
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turns.end(loss.detach())


def trl(turns: Turns, folder: Path, ids: np.ndarray, device: str) -> None:
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    losses: list[Any] = []

    class Trainer(GKDTrainer):
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            found = super().compute_loss(*arguments, **named)
            losses[:] = [found.detach()]
            return found

    class Callback(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end(losses[0])
            turns.begin()

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    steps, rows, tokens = ids.shape
    # Its collator wants a prompt of at least one token, which has no loss: here the first, which nothing predicts.
    columns = {
        "input_ids": ids.reshape(-1, tokens).tolist(), "completion_mask": [[0] + [1] * (tokens - 1)] * (steps * rows),
        "prompt": [""] * (steps * rows),
    }  # fmt: skip
    config = GKDConfig(
        output_dir=str(folder / "trl"), lmbda=0.0, beta=0.0, temperature=1.0, seq_kd=False, max_length=tokens,
        per_device_train_batch_size=rows, max_steps=steps, learning_rate=LR, lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=CLIP, train_sampling_strategy="sequential", logging_strategy="no",
        save_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True, use_cpu=device == "cpu", bf16=False,
        gradient_checkpointing=False, dataloader_num_workers=0, dataloader_pin_memory=device == "cuda",
    )  # fmt: skip
    teacher, student = load(folder, device)
    Trainer(
        model=student, teacher_model=teacher, args=config, train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer, callbacks=[Callback()],
    ).train()  # fmt: skip


ARMS = {"ours": ours, "bare": bare, "trl": trl}


def serve(pipe: Any, arm: str, folder: Path, cell: str, steps: int, device: str) -> None:
    """An arm in its process, until the parent closes the pipe."""
    size, vocabulary = parts(cell)
    turns = Turns(pipe, device)
    ARMS[arm](turns, folder, batches(size, vocabulary, steps), device)
    turns.begin()  # the memory may still be asked for


class Arm:
    """An arm's process, as the parent sees it."""

    def __init__(self, arm: str, folder: Path, cell: str, steps: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = f"{cell}: {arm}"
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, arm, folder, cell, steps, device), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, word: str = "step") -> dict[str, Any]:
        """A step's seconds and loss, or the memory."""
        try:
            self._pipe.send(word)
            found: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            sys.exit(f"{self._name} ended early, with {self._process.exitcode} (-9: out of memory?)")
        return found

    def end(self) -> None:
        """Let it go; one that hangs is killed."""
        self._pipe.close()
        self._process.join(20)
        self._process.kill()
        self._process.join()


def measure(cell: str, arms: list[str], rounds: int, device: str) -> dict[str, Any]:
    size, vocabulary = parts(cell)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder, size, vocabulary)
        alone = {arm: first_steps(arm, folder, cell, device) for arm in arms}
        losses = {arm: found["losses"] for arm, found in alone.items()}
        agree(cell, losses)
        told = take_turns(arms, folder, cell, rounds, device)
    seconds = {arm: [one["seconds"] for one in told[arm][WARMUP:]] for arm in arms}
    return {
        "rows": size["rows"], "tokens": size["tokens"], "rounds": rounds, "losses": losses,
        "largest_difference": {arm: largest_difference(told[arm], told["bare"]) for arm in arms if arm != "bare"},
        "arms": {
            arm: {
                "step_ms": round(median(seconds[arm]) * 1000, 1),
                "tokens_per_s": round(size["rows"] * size["tokens"] / median(seconds[arm]), 1),
                "seconds": [round(one, 4) for one in seconds[arm]],
                **alone[arm]["memory"],
                **{f"time_over_{other}": ratio(seconds[arm], seconds[other]) for other in arms if other != arm},
            }
            for arm in arms
        },
    }  # fmt: skip


def first_steps(arm: str, folder: Path, cell: str, device: str) -> dict[str, Any]:
    """Losses and memory of a fresh process that takes the first steps alone."""
    one = Arm(arm, folder, cell, CHECKED, device)
    try:
        return {"losses": [one.ask()["loss"] for _ in range(CHECKED)], "memory": one.ask("memory")}
    finally:
        one.end()


def agree(cell: str, losses: dict[str, list[float]]) -> None:
    for arm, found in losses.items():
        for step, (one, two) in enumerate(zip(found, losses["bare"], strict=True), 1):
            if not abs(one / two - 1) <= AGREE:
                sys.exit(f"{cell}: step {step}: the loss of {arm} is {one}, of bare {two}: not the same work")


def take_turns(arms: list[str], folder: Path, cell: str, rounds: int, device: str) -> dict[str, list[dict[str, float]]]:
    """What each arm tells of every step, the first `WARMUP` of which are not side by side."""
    running: dict[str, Arm] = {}
    told: dict[str, list[dict[str, float]]] = {}
    try:
        for arm in arms:
            running[arm] = Arm(arm, folder, cell, WARMUP + rounds, device)
            told[arm] = [running[arm].ask() for _ in range(WARMUP)]
        for turn in range(rounds):
            at = turn % len(arms)
            for arm in arms[at:] + arms[:at]:
                told[arm].append(running[arm].ask())
            line = ", ".join(f"{arm} {told[arm][-1]['seconds']:.3f} s" for arm in arms)
            print(f"{cell}: round {turn + 1}: {line}", file=sys.stderr)
    finally:
        for one in running.values():
            one.end()
    return told


def largest_difference(one: list[dict[str, float]], two: list[dict[str, float]]) -> float:
    """Of the losses of all steps, relative: rounding grows with the steps, so it is told and not checked."""
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, two, strict=True))


def ratio(one: list[float], two: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile([a / b for a, b in zip(one, two, strict=True)], [25, 50, 75])
    return {"median": round(float(middle), 3), "q1": round(float(low), 3), "q3": round(float(high), 3)}


def environment(device: str, arms: list[str]) -> dict[str, Any]:
    import torch

    from distilpeft.machine.runtime import device_name

    names = ["torch", "transformers", "accelerate", *(["trl"] if "trl" in arms else [])]
    return {
        "device": device_name(torch.device(device)), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "versions": {name: metadata.version(name) for name in names},
    }  # fmt: skip


def run(options: argparse.Namespace, file: Path) -> None:
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ours would take a GPU that is there
    arms = [arm for arm in ARMS if arm != "trl" or has_trl()]
    where = environment(options.device, arms)
    known = json.loads(file.read_text()) if file.is_file() else {"environment": where, "cells": {}}
    if known["environment"] != where:
        sys.exit(f"{file} was measured elsewhere or with other versions or threads: name another --out, or delete it")
    file.parent.mkdir(exist_ok=True)
    for cell in options.cells:
        begin = time.monotonic()
        known["cells"][cell] = measure(cell, arms, options.rounds, options.device)
        known["cells"] = {name: known["cells"][name] for name in sorted(known["cells"], key=order)}
        file.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{cell}: {time.monotonic() - begin:.0f} s; in {file}", file=sys.stderr)


def has_trl() -> bool:
    try:
        importlib.import_module("trl.experimental.gkd")
    except ImportError as error:
        print(f"without the arm trl: {error}", file=sys.stderr)
        return False
    return True


def parts(cell: str) -> tuple[dict[str, int], int]:
    """`tiny:8192` → its size and vocabulary."""
    name, _, vocabulary = cell.partition(":")
    return SIZES[name], int(vocabulary)


def order(cell: str) -> tuple[int, int]:
    name, _, vocabulary = cell.partition(":")
    return list(SIZES).index(name), int(vocabulary)


def a_cell(text: str) -> str:
    try:
        parts(text)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text}: SIZE:VOCABULARY, SIZE one of {', '.join(SIZES)}") from None
    return text


def table(file: Path) -> str:
    """The result file as Markdown: every arm beside bare, then ours beside TRL."""
    found = json.loads(file.read_text())
    where = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    titles = ["models", "V", "arm", "step ms", "tokens/s", "time ÷ bare's"]
    titles += ["step MB", "÷ bare's", "peak MB", "÷ bare's"]
    lines = [f"{where['device']}, {where['threads']} threads, {versions}; quartiles in brackets:", ""]
    lines += [row(titles), "| --- " * len(titles) + "|"]
    for cell, one in found["cells"].items():
        name, vocabulary = cell.split(":")
        for arm, told in one["arms"].items():
            figures = [f"{told['step_ms']:,.0f}", f"{told['tokens_per_s']:,.0f}", spread(told.get("time_over_bare"))]
            for kind in ("step_bytes", "peak_bytes"):
                figures += [f"{told[kind] / 1e6:,.0f}", f"{told[kind] / one['arms']['bare'][kind]:.2f}"]
            lines.append(row([name, f"{int(vocabulary):,}", arm, *figures]))
    if "trl" in where["versions"]:
        titles = ["models", "V", "our time ÷ TRL's", "step memory ÷ TRL's", "peak memory ÷ TRL's"]
        lines += ["", row(titles), "| --- " * len(titles) + "|"]
        for cell, one in found["cells"].items():
            name, vocabulary = cell.split(":")
            our, their = one["arms"]["ours"], one["arms"]["trl"]
            shares = [f"{our[kind] / their[kind]:.2f}" for kind in ("step_bytes", "peak_bytes")]
            lines.append(row([name, f"{int(vocabulary):,}", spread(our["time_over_trl"]), *shares]))
    worst = max(value for one in found["cells"].values() for value in differences(one["losses"]))
    return "\n".join([*lines, "", f"The losses of steps 1 to {CHECKED} agree to {worst:.1e}."])


def sentence(file: Path) -> str:
    """What the largest vocabulary says, of the larger models that were run."""
    found = json.loads(file.read_text())
    cell = max(found["cells"], key=lambda name: (parts(name)[1], order(name)))
    told = found["cells"][cell]["arms"]
    faster = {other: 1 / told["ours"][f"time_over_{other}"]["median"] for other in told if other != "ours"}
    line = (
        f"Distilling with the teacher online at V = {parts(cell)[1]:,}, our loop is {faster['bare']:.1f}x as fast as a "
    )
    line += "bare PyTorch loop"
    if "trl" in told:
        share = told["ours"]["step_bytes"] / told["trl"]["step_bytes"]
        line += f" and {faster['trl']:.1f}x as fast as TRL's GKDTrainer; a step takes {share:.2f} of its memory"
    return f"{line} ([measured](docs/peers.md))."


def differences(losses: dict[str, list[float]]) -> list[float]:
    return [abs(a / b - 1) for found in losses.values() for a, b in zip(found, losses["bare"], strict=True)]


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f} ({found['q1']:.2f} to {found['q3']:.2f})" if found else "1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{name}:{vocabulary}" for name in SIZES for vocabulary in VOCABULARIES]
    parser.add_argument("--cells", nargs="+", type=a_cell, default=every, metavar="SIZE:VOCABULARY")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="another result file; its table is printed and goes into no page")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    file = options.out or RESULTS / f"peers_{options.device}.json"
    if not options.table:
        run(options, file)
        return
    if options.out is None:
        files = sorted(RESULTS.glob("peers_*.json"))
        page.insert(PAGE, "peers", "\n\n".join(table(one) for one in files))
        page.insert(README, "peers", sentence(file))
    print(table(file))


if __name__ == "__main__":
    main()
