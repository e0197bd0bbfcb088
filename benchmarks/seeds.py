"""Run a recipe over several seeds and put what came out, good or bad, into one result file and the README's table.

    python benchmarks/seeds.py recipes/quickstart.yaml --seeds 17 18 19 --runs runs

A seed turns the head's start, the order of rows and dropout; the split of the data stays. Runs that are finished are
not done again. Leaves benchmarks/results/<name>_seeds.json and rewrites the README between its seeds markers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
ROLES = ("majority", "untrained", "student_ce_only", "student", "teacher", "teacher_full_precision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args()
    name = options.recipe.stem
    reports = []
    for seed in options.seeds:
        settings = ["--set", f"seed={seed}", "--set", f"name={name}_seed{seed}"]
        command = [sys.executable, "-m", "distilpeft", "run", str(options.recipe), "--runs", str(options.runs)]
        subprocess.run([*command, *settings], check=True)
        reports.append(json.loads((options.runs / f"{name}_seed{seed}" / "report.json").read_text()))
    result = summary(name, options.seeds, reports)
    (ROOT / "benchmarks/results").mkdir(exist_ok=True)
    path = ROOT / "benchmarks/results" / f"{name}_seeds.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    text = table(result)
    readme = options.readme.read_text(encoding="utf-8")
    marked = re.sub(r"(<!-- seeds:[^>]*-->\n).*?(<!-- /seeds -->)", lambda m: m[1] + text + m[2], readme, flags=re.S)
    options.readme.write_text(marked, encoding="utf-8")
    print(text)
    print(f"result: {path}")


def summary(name: str, seeds: list[int], reports: list[dict]) -> dict:
    """Every seed's figures, and means over seeds."""
    runs = []
    for seed, report in zip(seeds, reports, strict=True):
        models = {model["role"]: model for model in report["models"]}
        runs.append(
            {
                "seed": seed,
                "accuracy": {role: models[role]["scores"]["accuracy"]["value"] for role in ROLES if role in models},
                "log_loss": {role: models[role]["scores"]["log_loss"]["value"] for role in ROLES if role in models},
                "num_parameters": {role: models[role]["num_parameters"] for role in ROLES if role in models},
                "size_bytes": {role: models[role]["size_bytes"] for role in ROLES if role in models},
                "latency_ms": {role: models[role]["latency_ms"] for role in ROLES if role in models},
                "student_vs_teacher": report["student_vs_teacher"],
                "ce_gap_closed": report["ce_gap_closed"],
                "quantization_cost": report["quantization_cost"],
                "train_seconds": {step: made["seconds"] for step, made in report["training"].items()},
            }
        )
    accuracy = {role: [run["accuracy"][role] for run in runs] for role in runs[0]["accuracy"]}
    means = {role: mean(values) for role, values in accuracy.items()}
    return {
        "recipe": name,
        "num_rows": reports[0]["models"][0]["scores"]["accuracy"]["num_rows"],
        "mean_accuracy": means,
        "stdev_accuracy": {role: stdev(values) if len(values) > 1 else 0.0 for role, values in accuracy.items()},
        "student_vs_teacher": means["student"] / means["teacher"],
        "ce_gap_closed": (means["student"] - means["student_ce_only"]) / (means["teacher"] - means["student_ce_only"]),
        "runs": runs,
        "environment": reports[0]["environment"],
    }


def table(result: dict) -> str:
    """The result as the README shows it."""
    seeds = [run["seed"] for run in result["runs"]]
    last = result["runs"][-1]
    lines = [
        f"`{result['recipe']}`, accuracy on {result['num_rows']} held-out rows, every seed that was run:",
        "",
        "| model | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean ± sd | weights | size | ms p50 |",
        "| --- |" + " --- |" * (len(seeds) + 4),
    ]
    for role, average in result["mean_accuracy"].items():
        each = " | ".join(f"{run['accuracy'][role]:.4f}" for run in result["runs"])
        size, latency = last["size_bytes"][role], last["latency_ms"][role]["p50"]
        weights = f"{last['num_parameters'][role] / 1e6:.1f} M | {size / 1e6:.1f} MB" if size else "- | -"
        spread = f"{average:.4f} ± {result['stdev_accuracy'][role]:.4f}"
        lines.append(f"| {role} | {each} | {spread} | {weights} | {f'{latency:.1f}' if latency else '-'} |")
    kept, closed = result["student_vs_teacher"], result["ce_gap_closed"]
    seconds = [sum(run["train_seconds"].values()) for run in result["runs"]]
    environment = result["environment"]
    lines += [
        "",
        f"On average the student keeps {kept:.1%} of the teacher's accuracy and closes {closed:.0%} of the gap that "
        f"labels alone leave. Training teacher and both students took {min(seconds):.0f} to {max(seconds):.0f} s "
        f"({environment['device']}, {environment['threads']} threads, torch {environment['versions']['torch']}); "
        "latency is one row in fp32 on the same machine.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
