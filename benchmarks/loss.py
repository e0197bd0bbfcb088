"""Time and peak memory of KL + CE from hidden states to gradients: whole logits, ours, and Liger's chunked loss.

    python benchmarks/loss.py                      # CPU: fp32, H = 1,024, rows 512 and 2,048; half an hour
    python benchmarks/loss.py --device cuda        # bf16, H = 4,096, rows up to 8,192
    python benchmarks/loss.py --table              # Markdown from the result file, and into docs/losses.md

Arms: `naive` makes both [rows, V] logits and lets autograd do the rest; `ours` is distilpeft.distillation.fused;
`ours frozen` does
not train the head; `liger` is the same work as `naive` (its JSD loss at beta 0 is forward KL; a mean over rows, scaled
here to the same sum; its default chunks of 1,024 rows, not compiled). Every measurement is a process of its own on the
CPU, where memory is that process's peak above what it held just before; arms take turns in one run, and ratios are
medians over the turns. With --vocabulary or --rows only those cells are measured anew. Exit code 1 if loss or gradients
differ by more
than rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import platform
import statistics
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import page
import torch
from numpy.linalg import norm
from torch import nn
from torch.nn import functional as F

from distilpeft.distillation.fused import Head, linear_distil_sum
from distilpeft.distillation.losses import Loss
from distilpeft.machine.host import cpu_name

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "losses.md"
VOCABULARIES = (32_000, 128_256, 151_936)
ROWS = {"cpu": (512, 2048), "cuda": (1024, 2048, 8192)}
HIDDEN = {"cpu": 1024, "cuda": 4096}
REPEATS = {"cpu": 3, "cuda": 7}
ALPHA = 0.5
SAME_WORK = {"ours": "naive", "ours frozen": "naive", "liger": "naive"}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def inputs(rows: int, vocabulary: int, hidden: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Hidden states, heads and labels, allocated and touched."""
    torch.manual_seed(0)
    made: dict[str, Any] = {"device": device}
    for side in ("student", "teacher"):
        made[side] = torch.randn(rows, hidden, device=device, dtype=dtype)
        layer = nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=dtype)
        made[f"{side}_head"] = layer.requires_grad_(side == "student")
    made["student"].requires_grad_()
    made["labels"] = torch.randint(0, vocabulary, (rows,), device=device)
    return made


def naive(made: dict[str, Any]) -> torch.Tensor:
    student = made["student_head"](made["student"]).float()
    with torch.no_grad():
        teacher = made["teacher_head"](made["teacher"]).float()
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return ALPHA * kl + (1 - ALPHA) * F.cross_entropy(student, made["labels"], reduction="sum")


def ours(made: dict[str, Any]) -> torch.Tensor:
    teacher = (made["teacher"], Head(made["teacher_head"]))
    return linear_distil_sum(made["student"], Head(made["student_head"]), made["labels"], teacher, Loss(ALPHA))


def frozen(made: dict[str, Any]) -> torch.Tensor:
    made["student_head"].requires_grad_(False)
    return ours(made)


def liger(made: dict[str, Any]) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=0.0, compiled=False)
    mean = loss(
        made["student"], made["student_head"].weight, made["teacher"], made["teacher_head"].weight, made["labels"]
    )
    return mean * len(made["labels"])


ARMS = {"naive": naive, "ours": ours, "ours frozen": frozen, "liger": liger}


def measure_cpu(arm: str, size: tuple[Any, ...], pipe: Any) -> None:
    """In a process of its own: seconds, peak bytes above the start, loss and gradients."""
    rows, _, *rest = size
    ARMS[arm](inputs(min(rows, 64), 512, *rest)).backward()  # threads and kernels are set up here, not in what is timed
    made = inputs(*size)
    base, peak, stop = resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    loss = ARMS[arm](made)
    loss.backward()
    seconds = time.perf_counter() - begin
    stop.set()
    watcher.join()
    pipe.send({"seconds": seconds, "peak_bytes": max(0, peak[0] - base), **outcome(made, loss)})


def measure_cuda(arm: str, size: tuple[Any, ...], _: Any = None) -> dict[str, Any]:
    """In this process, after a first pass that is not timed."""
    for _turn in range(2):
        made = inputs(*size)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        loss = ARMS[arm](made)
        loss.backward()
        end.record()
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    return {"seconds": begin.elapsed_time(end) / 1000, "peak_bytes": peak, **outcome(made, loss)}


def outcome(made: dict[str, Any], loss: torch.Tensor) -> dict[str, Any]:
    """What equal work must agree in: the loss, and each gradient's products with the same random vectors.

    A norm would not see rows that were swapped; the products see any difference, and are small enough to be sent.
    """
    found = {"loss": loss.detach().reshape(1).double().cpu()}
    for name, gradient in (("hidden_grad", made["student"].grad), ("weight_grad", made["student_head"].weight.grad)):
        if gradient is not None:
            generator = torch.Generator().manual_seed(1)
            left, right = (torch.randn(n, generator=generator).to(gradient) for n in gradient.shape)
            found[name] = torch.cat([left @ gradient, gradient @ right]).double().cpu()
    return {name: value.numpy() for name, value in found.items()}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def apart(arm: str, size: tuple[Any, ...]) -> dict[str, Any]:
    context = multiprocessing.get_context("forkserver")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measure_cpu, args=(arm, size, send))
    process.start()
    send.close()
    found: dict[str, Any] = receive.recv()
    process.join()
    return found


def run(options: argparse.Namespace) -> int:
    device = options.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    arms = [arm for arm in ARMS if "liger" not in arm or importlib.util.find_spec("liger_kernel")]
    names = ("torch", "liger-kernel") if "liger" in arms else ("torch",)
    environment = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
        "dtype": str(dtype).removeprefix("torch."),
    }
    path = options.out or RESULTS / f"loss_{device}.json"
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {}
    cells = known["cells"] if known.get("environment") == environment else []
    wrong = 0
    for vocabulary in options.vocabulary or VOCABULARIES:
        for rows in options.rows or ROWS[device]:
            size = (rows, vocabulary, options.hidden or HIDDEN[device], dtype, device)
            turns: list[dict[str, Any]] = []
            for turn in range(options.repeats or REPEATS[device]):
                order = arms[turn % len(arms) :] + arms[: turn % len(arms)]
                found = {}
                for arm in order:
                    found[arm] = measure_cuda(arm, size) if device == "cuda" else apart(arm, size)
                    line = f"{found[arm]['seconds']:8.3f} s {found[arm]['peak_bytes'] / 2**20:8.0f} MiB"
                    print(f"V {vocabulary} rows {rows} turn {turn + 1}: {arm:12} {line}", file=sys.stderr)
                turns.append(found)
            cell = {"vocabulary": vocabulary, "rows": rows, "hidden": size[2], **summary(turns)}
            cells = [one for one in cells if any(one[key] != cell[key] for key in SIZE)] + [cell]
            cells.sort(key=lambda one: [one[key] for key in SIZE])
            path.write_text(json.dumps({"environment": environment, "alpha": ALPHA, "cells": cells}, indent=1) + "\n")
            worst = max(cell["relative_difference"].values(), default=0.0)
            wrong += not worst <= TOLERANCE[dtype]
    print(f"results in {path}", file=sys.stderr)
    return 1 if wrong else 0


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each arm, of its ratios to naive turn by turn, and how far equal work differs."""
    arms = {}
    for arm in turns[0]:
        arms[arm] = {
            "seconds": [round(turn[arm]["seconds"], 4) for turn in turns],
            "peak_bytes": int(statistics.median(turn[arm]["peak_bytes"] for turn in turns)),
            "time_ratio": statistics.median(turn[arm]["seconds"] / turn["naive"]["seconds"] for turn in turns),
            "memory_ratio": statistics.median(turn[arm]["peak_bytes"] / turn["naive"]["peak_bytes"] for turn in turns),
        }
    difference = {}
    for one, two in SAME_WORK.items():
        if one in turns[0]:
            pairs = [(turn[one][key], turn[two][key]) for turn in turns for key in OUTCOMES if key in turn[one]]
            difference[f"{one} / {two}"] = max(float(norm(a - b) / norm(b)) for a, b in pairs)
    return {"arms": arms, "relative_difference": difference}


SIZE = ("vocabulary", "rows", "hidden")
OUTCOMES = ("loss", "hidden_grad", "weight_grad")


def table(path: Path) -> str:
    """The result file as Markdown."""
    result = json.loads(path.read_text())
    where = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [f"{where['device']}, {where['threads']} threads, {where['dtype']}, {versions}; ratios to naive:", ""]
    lines += ["| V | rows | H | arm | median s | time | peak MiB | memory |", "| --- " * 8 + "|"]
    for cell in result["cells"]:
        for arm, found in cell["arms"].items():
            lines.append(
                f"| {cell['vocabulary']:,} | {cell['rows']:,} | {cell['hidden']:,} | {arm} "
                f"| {statistics.median(found['seconds']):.3f} | {found['time_ratio']:.2f} x "
                f"| {found['peak_bytes'] / 2**20:,.0f} | {found['memory_ratio']:.2f} x |"
            )
    worst = max(max(cell["relative_difference"].values()) for cell in result["cells"])
    lines += ["", f"Equal work gave equal loss and gradients to {worst:.1e}."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name in ("--vocabulary", "--rows"):
        parser.add_argument(name, type=int, nargs="*")
    for name in ("--hidden", "--repeats"):
        parser.add_argument(name, type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        return run(options)
    text = "\n\n".join(table(path) for path in sorted(RESULTS.glob("loss_*.json")))
    print(text)
    if PAGE.is_file():
        page.insert(PAGE, "loss", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
