"""Exports of the quickstart beside its student in eager PyTorch: latency, size and accuracy, in one run.

    distilpeft run recipes/quickstart.yaml            # once
    python benchmarks/export.py                       # a minute; results/export_cpu.json
    python benchmarks/export.py --table               # Markdown from the result file, and into docs/export.md

Each model lives in a process of its own with as many threads (the runtimes' threads wait busily and would slow each
other down in one). Every round times each on the same test rows, one by one and 32 at once, in an order that turns; a
figure is the median over rounds of the round's median, a ratio the median of the rounds' ratios. Accuracy is the
report's, on all test rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import page
import torch

from distilpeft.exported import open_exported
from distilpeft.pair import MODEL, load_student
from distilpeft.plan import make_plan
from distilpeft.recipe_file import with_formats
from distilpeft.runtime import Runtime
from distilpeft.tasks import TaskData

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "results" / "export_cpu.json", HERE.parent / "docs" / "export.md"
STUDENT = "student in PyTorch"
BATCHES = {1: 20, 32: 3}
"""Rows at once → calls in a round."""
WARMUP = 3


def run(options: argparse.Namespace) -> None:
    report = json.loads((options.run / "report.json").read_text())
    forms = report["settings"]["export"]["formats"]
    names = [STUDENT, *forms]
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, options.run, name), daemon=True).start()
    num_rows = {name: pipes[name].recv() for name in names}[STUDENT]  # all are ready
    seconds: dict[int, dict[str, list[float]]] = {size: {name: [] for name in names} for size in BATCHES}
    rng = np.random.default_rng(0)
    for turn in range(options.rounds):
        for size, calls in BATCHES.items():
            picked = [rng.integers(0, num_rows, size) for _ in range(calls)]
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                pipes[name].send(picked)
                seconds[size][name].append(median(pipes[name].recv()))
    for name in names:
        pipes[name].send(None)
    environment = pipes[STUDENT].recv()
    scored = {model["role"]: model for model in report["models"]}
    roles = {STUDENT: "student", **{form: f"export:{form}" for form in forms}}
    found = {
        name: {
            "accuracy": scored[roles[name]]["scores"]["accuracy"]["value"],
            "size_bytes": scored[roles[name]]["size_bytes"],
            "way": report["exports"].get(name, {}).get("way"),
            "parity": report["exports"].get(name, {}).get("parity"),
            "batches": {str(size): figures(seconds[size], name) for size in BATCHES},
        }
        for name in names
    }
    result = {"recipe": report["recipe"], "seed": report["seed"], "rounds": options.rounds, "models": found,
              "environment": environment}  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def serve(pipe: Any, run: Path, name: str) -> None:
    """One model in a process of its own: row ids of several calls in, seconds of each out."""
    report = json.loads((run / "report.json").read_text())
    plan = make_plan(with_formats(report["given"], []), run.resolve().parent)
    runtime = Runtime()
    data = TaskData(plan.recipe, plan.data_digest, plan.folder / "cache")
    student = load_student(runtime, plan.recipe, plan.artifacts["distil/student"].path / MODEL)
    rows = data.tokens("test", student.tokenizer, student.tokenizer_digest)
    model = student.model if name == STUDENT else open_exported(run / "exports" / name, runtime.device)
    pipe.send(len(rows.lengths_N))
    while (picked := pipe.recv()) is not None:
        batches = [rows.load_batch(ids)["inputs"] for ids in picked]
        seconds = []
        for inputs in [*batches[:WARMUP], *batches]:
            begin = time.perf_counter()
            with torch.inference_mode():
                model(**inputs)
            seconds.append(time.perf_counter() - begin)
        pipe.send(seconds[len(batches[:WARMUP]) :])
    pipe.send(runtime.environment())


def figures(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    ratios = [base / own for base, own in zip(seconds[STUDENT], seconds[name], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "p50_ms": median(seconds[name]) * 1000, "speedup": median(ratios), "speedup_q1": low, "speedup_q3": high,
    }  # fmt: skip


def table() -> str:
    found = json.loads(RESULT.read_text())
    models = found["models"]
    base = models[STUDENT]["accuracy"]
    lines = [
        "| model | accuracy | of the student's | MB | ms, 1 row | x (quartiles) | x, 32 rows |",
        "| --- " * 7 + "|",
    ]
    for name, model in models.items():
        one, many = (model["batches"][str(size)] for size in BATCHES)
        cells = (
            name + (f" ({model['way']})" if model["way"] else ""),
            f"{model['accuracy']:.4f}",
            f"{model['accuracy'] / base:.1%}",
            f"{model['size_bytes'] / 1e6:.1f}",
            f"{one['p50_ms']:.2f}",
            f"{one['speedup']:.2f} ({one['speedup_q1']:.2f} to {one['speedup_q3']:.2f})",
            f"{many['speedup']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    where = f"{found['environment']['device']}, {found['environment']['threads']} threads"
    return "\n".join([*lines, "", f"{found['recipe']}, seed {found['seed']}, {where}, {found['rounds']} rounds."])


def sentence() -> str:
    models = json.loads(RESULT.read_text())["models"]
    student, int8 = models[STUDENT], models["onnx-int8"]
    before, after = (model["size_bytes"] / 1e6 for model in (student, int8))
    return (
        f"As int8 ONNX the student is {after:.1f} MB instead of {before:.1f} and "
        f"{int8['batches']['1']['speedup']:.1f}x as fast at batch 1, with "
        f"{int8['accuracy'] / student['accuracy']:.1%} of its accuracy ([measured](docs/export.md#int8-that-holds))."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/quickstart"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        run(options)
        return
    page.insert(PAGE, "export", table())
    page.insert(HERE.parent / "README.md", "export", sentence())
    print(table())


if __name__ == "__main__":
    main()
