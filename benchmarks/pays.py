"""What rows without labels are worth: recipes that have some, against every control, over their seeds.

    python benchmarks/pays.py recipes/quickstart.yaml --runs runs          run what is missing, then write the pages
    python benchmarks/pays.py --table                                      the pages from the result file alone

What was changed stands behind a recipe's name in the result file: `--set student.from_teacher={layers: [0]}` makes an
entry of its own. Differences are paired on the same test rows; intervals move rows and seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import page

from distilpeft.recipe.task import gap, gap_unit

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/pays.json"
PAGE = ROOT / "docs/when-it-pays.md"
FRONT = ROOT / "README.md"
KEPT = (
    "recipe", "metric", "split", "seed", "rows", "ce_gap_closed", "lead", "seeds", "comparisons", "verdict", "training",
    "environment", "given",
)  # fmt: skip
AGAINST = {
    "student_ce_only": "labels alone",
    "student_ce_only_long": "labels alone, as many steps",
    "student_labelled_rows": "teacher on labelled rows only",
    "student_hard_labels": "teacher's likeliest class",
    "teacher": "teacher",
}


def main() -> None:
    parser = page.parser(__doc__)
    parser.add_argument("recipes", type=Path, nargs="*")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--set", action="append", default=[], dest="changes")
    page.run_or_show(parser, run, lambda: show(json.loads(RESULT.read_text())))


def run(options: argparse.Namespace) -> None:
    """Run recipes, keep what their reports say, and write the page."""
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for recipe in options.recipes:
        seeds = f"evaluate.seeds=[{','.join(map(str, options.seeds))}]"
        changes = [part for change in [seeds, *options.changes] for part in ("--set", change)]
        command = [sys.executable, "-m", "distilpeft", "run", str(recipe), "--runs", str(options.runs), *changes]
        subprocess.run(command, check=True)
        report = json.loads((options.runs / recipe.stem / "report.json").read_text(encoding="utf-8"))
        kept = {key: report[key] for key in KEPT if key in report} | {"changes": options.changes}
        kept["models"] = {model["role"]: model["scores"][report["metric"]] for model in report["models"]}
        found[" ".join([recipe.stem, *options.changes])] = kept
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)


def show(found: dict[str, Any]) -> None:
    """Put the tables into the page, and the first one into the README."""
    tables = [table(name, one) for name, one in found.items()]
    page.insert(PAGE, "pays", "\n\n".join(tables))
    page.insert(FRONT, "pays", tables[0])


def table(name: str, one: dict[str, Any]) -> str:
    """One recipe: every model, over the seeds if there are several, and how far the student is ahead of it."""
    metric, seeds, rows, count = one["metric"], one["seeds"], one["rows"], one["models"]["teacher"]["num_rows"]
    pairs = one["comparisons"] if seeds is None else seeds["comparisons"]
    ahead = {pair["against"]: pair for pair in pairs if pair["role"] == "student"}
    scores = {role: f"{score['value']:.4f}" for role, score in one["models"].items()}
    if seeds is not None:
        scores |= {model["role"]: f"{model['mean']:.4f} ± {model['sd']:.4f}" for model in seeds["models"]}
    closed = "no gap beyond chance" if one["ce_gap_closed"] is None else f"{one['ce_gap_closed']:.0%} of the gap closed"
    whose = f"seed {one['seed']}" if seeds is None else f"seeds {', '.join(map(str, seeds['seeds']))}"
    lines = [
        f"`{name}`: {rows['train']} labels, {rows['unlabelled']} rows without, {count} {one['split']} rows, {whose}; "
        f"{closed}.",
        "",
        f"| | {metric}{'' if seeds is None else ', mean ± sd'} | student less this,{gap_unit(metric)} (95 %) |",
        "| --- | --- | --- |",
    ]
    for role, words in {"student": "student", **AGAINST}.items():
        if role in scores:
            pair = ahead.get(role)
            ends = ("difference" if seeds is None else "mean", "low", "high")
            lead = "" if pair is None else "{} ({} to {})".format(*(gap(metric, pair[end]) for end in ends))
            lines.append(f"| {words} | {scores[role]} | {lead} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
