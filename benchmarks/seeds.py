"""Run a recipe over several seeds and put what came out, good or bad, into one result file and a page.

    python benchmarks/seeds.py recipes/sentiment_reviews.yaml --seeds 17 18 19 --runs runs
    python benchmarks/seeds.py recipes/sentiment_reviews.yaml --table      # from the result file

A seed turns the head's start, the order of rows and dropout; the split of the data stays. What is finished is not done
again. Leaves benchmarks/results/<name>_seeds.json and rewrites docs/when-it-pays.md between its seeds markers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import page

ROOT = Path(__file__).parents[1]
KEPT = (
    "recipe", "seed", "split", "metric", "models", "comparisons", "seeds", "verdict", "quantization_cost", "benchmark",
    "training", "environment",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    name = options.recipe.stem
    path = ROOT / "benchmarks/results" / f"{name}_seeds.json"
    if not options.table:
        seeds = f"evaluate.seeds=[{','.join(map(str, options.seeds))}]"
        command = [sys.executable, "-m", "distilpeft", "run", str(options.recipe), "--runs", str(options.runs)]
        subprocess.run([*command, "--set", seeds], check=True)
        report = json.loads((options.runs / name / "report.json").read_text())
        path.write_text(json.dumps({key: report[key] for key in KEPT}, indent=1) + "\n")
    text = table(json.loads(path.read_text()))
    page.insert(ROOT / "docs/when-it-pays.md", "seeds", text)
    print(text)


def table(report: dict[str, Any]) -> str:
    """The result as the page shows it."""
    found = report["seeds"]
    models = {model["role"]: model for model in report["models"]}
    rows = next(iter(models.values()))["scores"][report["metric"]]["num_rows"]
    titles = ["model", *(f"seed {seed}" for seed in found["seeds"]), "mean ± sd", "weights", "size", "ms p50", "memory"]
    lines = [
        f"`{report['recipe']}`, {report['metric']} on {rows} held-out rows, every seed that was run:",
        "",
        f"| {' | '.join(titles)} |",
        "| --- " * len(titles) + "|",
    ]
    over = {model["role"]: model for model in found["models"]}
    for role in [role for role in models if role in over or role.startswith("export:")]:
        lines.append(f"| {' | '.join(cells(models[role], over.get(role), report))} |")
    environment, noise = report["environment"], report["benchmark"]["noise"]
    twice = noise["same_model_ratio"]
    lines += [
        "",
        " ".join(report["verdict"]["sentences"]),
        "",
        *(sentence(pair) for pair in found["comparisons"] if pair["role"] == "student"),
        "",
        f"Latency and memory are those of one row in a process that runs this model only ({environment['device']}, "
        f"{environment['threads']} threads, torch {environment['versions']['torch']}; two models of one architecture "
        f"differed by {abs(twice - 1):.1%}).",
    ]
    return "\n".join(lines)


def cells(model: dict[str, Any], over: dict[str, Any] | None, report: dict[str, Any]) -> list[str]:
    seeds, metric = report["seeds"]["seeds"], report["metric"]
    if over:
        values = [f"{value:.4f}" for value in over["values"]]
        mean = f"{over['mean']:.4f} ± {over['sd']:.4f}"
    else:
        own = f"{model['scores'][metric]['value']:.4f}"
        values, mean = [own if seed == report["seed"] else "-" for seed in seeds], "-"
    size, latency, memory = model["size_bytes"], model["latency_ms"], model["memory_bytes"]
    return [
        model["role"], *values, mean,
        f"{model['num_parameters'] / 1e6:.1f} M" if model["num_parameters"] else "-",
        f"{size / 1e6:.1f} MB" if size else "-",
        f"{latency['p50']:.1f}" if latency else "-",
        f"{memory / 1e6:.0f} MB" if memory else "-",
    ]  # fmt: skip


def sentence(pair: dict[str, Any]) -> str:
    each = ", ".join(
        f"{gap * 100:+.2f} (p {p:.2g})" for gap, p in zip(pair["differences"], pair["p_values"], strict=True)
    )
    low, mean, high = (pair[name] * 100 for name in ("low", "mean", "high"))
    return (
        f"- {pair['role']} − {pair['against']}, points on the same rows, by seed: {each}; mean {mean:+.2f}, 95 % "
        f"{low:+.2f} to {high:+.2f} over rows and seeds."
    )


if __name__ == "__main__":
    main()
