"""Training on a machine that others use: steps per second with busy processors and without, by how threads wait.

    python benchmarks/threads.py            # minutes, on a machine with nothing else to do
    python benchmarks/threads.py --table

Each cell is a process of its own that trains a BERT of the shape of the quickstart's student (three layers, 32 rows of
48 tokens, random weights) on all processors or on one, while 0, 1 or all processors are kept busy by other processes.
`spinning` is how OpenMP's threads wait by default, `passive` (OMP_WAIT_POLICY) how `distilpeft` lets them wait. Cells
take turns; medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import page

from distilpeft.machine.host import cpu_name, num_cpus

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/threads_cpu.json"
PAGE = ROOT / "docs/devices.md"
BUSY = "while True: pass"
TRAIN = """
import sys, time, torch
from transformers import BertConfig, BertForSequenceClassification
torch.manual_seed(0)
config = BertConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=3)
model = BertForSequenceClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
rows, labels = torch.randint(1000, 30000, (32, 48)), torch.randint(2, (32,))
def step():
    model(input_ids=rows, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
for _ in range(3):
    step()
begin, steps = time.perf_counter(), 0
while time.perf_counter() - begin < float(sys.argv[1]):
    step()
    steps += 1
print(steps / (time.perf_counter() - begin))
"""


def cells(processors: int) -> list[tuple[str, int, int]]:
    """How threads wait, how many there are, how many processors are busy."""
    busy = sorted({0, 1, processors})
    return [
        *(("spinning", processors, count) for count in busy),
        *(("passive", processors, count) for count in busy),
        *(("one thread", 1, count) for count in busy),
    ]


def rate(wait: str, threads: int, busy: int, seconds: float) -> float:
    """Steps per second of one cell."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["OMP_NUM_THREADS"] = str(threads)
    if wait == "passive":
        environment["OMP_WAIT_POLICY"] = "passive"
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        command = [sys.executable, "-c", TRAIN, str(seconds)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    finally:
        for other in others:
            other.kill()
    return float(done.stdout)


def run(options: argparse.Namespace) -> None:
    """Measure every cell in turns."""
    found: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for wait, threads, busy in cells(num_cpus()):
            steps = rate(wait, threads, busy, options.seconds)
            found.setdefault(f"{wait}, {busy} busy", []).append(steps)
            print(f"round {number + 1} of {options.rounds}: {wait}, {busy} busy: {steps:.2f} steps/s", flush=True)
    RESULT.write_text(json.dumps({"cpu": cpu_name(), "processors": num_cpus(), "steps_per_s": found}, indent=1) + "\n")
    show()


def show() -> None:
    """Write the table."""
    found = json.loads(RESULT.read_text())
    processors, rates = found["processors"], found["steps_per_s"]
    busy = sorted({0, 1, processors})
    base = {count: median(rates[f"spinning, {count} busy"]) for count in busy}
    lines = [
        f"Steps per second on {found['cpu']}, {processors} processors, and how many times spinning's:",
        "",
        f"| threads wait | {' | '.join(f'{count} processors busy' for count in busy)} |",
        "| --- " * (len(busy) + 1) + "|",
    ]
    for wait in ("spinning", "passive", "one thread"):
        mid = {count: median(rates[f"{wait}, {count} busy"]) for count in busy}
        shown = " | ".join(f"{mid[count]:.2f} ({mid[count] / base[count]:.2f}x)" for count in busy)
        lines.append(f"| {wait} | {shown} |")
    page.show(PAGE, "threads", "\n".join(lines))


def main() -> None:
    parser = page.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    page.run_or_show(parser, run, show)


if __name__ == "__main__":
    main()
