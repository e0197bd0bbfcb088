"""Exports of the quickstart beside its student in eager PyTorch: latency, size and accuracy, in one run.

    distilpeft run recipes/quickstart.yaml            # once
    python benchmarks/export.py                       # a minute; results/export_cpu.json
    python benchmarks/export.py --table               # Markdown from the result file, and into docs/export.md

Every round times each model once on the same test row (batch 1) and on the same 32 rows, in an order that turns, with
the same number of threads; a figure is the median over rounds, a ratio the median of each round's ratio. Accuracy is
the report's, on all test rows.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import page
import torch
from accelerate.utils import send_to_device

from distilpeft.exported import open_exported
from distilpeft.pair import MODEL, load_student
from distilpeft.plan import make_plan
from distilpeft.recipe_file import with_formats
from distilpeft.runtime import Runtime
from distilpeft.tasks import TaskData

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "results" / "export_cpu.json", HERE.parent / "docs" / "export.md"
STUDENT = "student in PyTorch"
BATCHES = (1, 32)


def run(options: argparse.Namespace) -> None:
    report = json.loads((options.run / "report.json").read_text())
    plan = make_plan(with_formats(report["given"], []), options.run.resolve().parent)
    runtime = Runtime()
    data = TaskData(plan.recipe, plan.data_digest, plan.folder / "cache")
    student = load_student(runtime, plan.recipe, plan.artifacts["distil/student"].path / MODEL)
    rows = data.tokens("test", student.tokenizer, student.tokenizer_digest)
    models: dict[str, Any] = {STUDENT: student.model}
    for form in plan.recipe.export.formats:
        models[form] = open_exported(options.run / "exports" / form, runtime.device)
    seconds: dict[int, dict[str, list[float]]] = {size: {name: [] for name in models} for size in BATCHES}
    rng = np.random.default_rng(0)
    names = list(models)
    for turn in range(-options.warmup, options.rounds):
        for size in BATCHES:
            inputs = send_to_device(
                rows.load_batch(rng.integers(0, len(rows.lengths_N), size))["inputs"], runtime.device
            )
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                begin = time.perf_counter()
                with torch.inference_mode():
                    models[name](**inputs)
                if turn >= 0:
                    seconds[size][name].append(time.perf_counter() - begin)
    scored = {model["role"]: model for model in report["models"]}
    roles = {STUDENT: "student", **{form: f"export:{form}" for form in plan.recipe.export.formats}}
    found = {
        name: {
            "accuracy": scored[roles[name]]["scores"]["accuracy"]["value"],
            "size_bytes": scored[roles[name]]["size_bytes"],
            "way": report["exports"].get(name, {}).get("way"),
            "parity": report["exports"].get(name, {}).get("parity"),
            "batches": {str(size): figures(seconds[size], name) for size in BATCHES},
        }
        for name in models
    }
    result = {"recipe": plan.recipe.name, "seed": plan.recipe.seed, "rounds": options.rounds, "models": found,
              "environment": runtime.environment()}  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/quickstart"))
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        run(options)
        return
    page.insert(PAGE, "export", table())
    print(table())


if __name__ == "__main__":
    main()
