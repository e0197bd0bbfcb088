"""What rows without labels are worth: recipes that have some, against every control, over their seeds.

    python benchmarks/pays.py recipes/few_labels_trec.yaml --runs runs     run what is missing, then write the pages
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

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/pays.json"
PAGE = ROOT / "docs/when-it-pays.md"
KEPT = ("recipe", "metric", "split", "rows", "ce_gap_closed", "lead", "seeds", "training", "environment", "given")
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
    parser.add_argument("--set", action="append", default=[], dest="changes")
    page.run_or_show(parser, run, lambda: show(json.loads(RESULT.read_text())))


def run(options: argparse.Namespace) -> None:
    """Run recipes, keep what their reports say, and write the page."""
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for recipe in options.recipes:
        changes = [part for change in options.changes for part in ("--set", change)]
        command = [sys.executable, "-m", "distilpeft", "run", str(recipe), "--runs", str(options.runs), *changes]
        subprocess.run(command, check=True)
        report = json.loads((options.runs / recipe.stem / "report.json").read_text(encoding="utf-8"))
        kept = {key: report[key] for key in KEPT if key in report} | {"changes": options.changes}
        kept["num_rows"] = report["models"][0]["scores"][report["metric"]]["num_rows"]
        found[" ".join([recipe.stem, *options.changes])] = kept
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)


def show(found: dict[str, Any]) -> None:
    """Put the tables into the page."""
    page.insert(PAGE, "pays", "\n\n".join(table(name, one) for name, one in found.items()))


def table(name: str, one: dict[str, Any]) -> str:
    """One recipe: every model over the seeds, and what the student is ahead of it."""
    seeds, rows = one["seeds"], one["rows"]
    models = {model["role"]: model for model in seeds["models"]}
    ahead = {pair["against"]: pair for pair in seeds["comparisons"] if pair["role"] == "student"}
    closed = "no gap beyond chance" if one["ce_gap_closed"] is None else f"{one['ce_gap_closed']:.0%} of the gap closed"
    lines = [
        f"`{name}`: {rows['train']} labels, {rows['unlabelled']} rows without, {one['num_rows']} {one['split']} rows, "
        f"seeds {', '.join(map(str, seeds['seeds']))}; {closed}.",
        "",
        f"| | {one['metric']}, mean ± sd | student less this, points (95 %) |",
        "| --- | --- | --- |",
    ]
    for role, words in {"student": "student", **AGAINST}.items():
        if role in models:
            model, pair = models[role], ahead.get(role)
            lead = "" if pair is None else f"{points(pair['mean'])} ({points(pair['low'])} to {points(pair['high'])})"
            lines.append(f"| {words} | {model['mean']:.4f} ± {model['sd']:.4f} | {lead} |")
    return "\n".join(lines)


def points(share: float) -> str:
    return f"{share * 100:+.1f}"


if __name__ == "__main__":
    main()
