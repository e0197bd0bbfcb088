"""What labels are worth: one recipe with 200 labels to all of them, and from where on distilling adds nothing.

    python benchmarks/label_budget.py recipes/few_labels_trec.yaml --labels 200 400 1000 2000 4643
    python benchmarks/label_budget.py --table        the page from the result file alone

Runs `distilpeft sweep --over data.labelled=...`. The plot goes next to the page, the figures into the result file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import page

from distilpeft.tuning.label_budget import fades

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/label_budget.json"
PAGE = ROOT / "docs/when-it-pays.md"
PLOT = "label-budget.svg"
COLUMNS = {
    "teacher": "teacher",
    "student_ce_only": "labels alone",
    "student_ce_only_long": "labels alone, as many steps",
    "student_labelled_rows": "teacher on labelled rows only",
    "student": "student",
}


def main() -> None:
    parser = page.parser(__doc__)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--labels", type=int, nargs="+")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--set", action="append", default=[], dest="changes")
    page.run_or_show(parser, run, lambda: show(json.loads(RESULT.read_text())))


def run(options: argparse.Namespace) -> None:
    """Run the sweep, keep its figures, and write the page."""
    over = f"data.labelled={','.join(map(str, options.labels))}"
    given = [part for change in options.changes for part in ("--set", change)]
    command = [sys.executable, "-m", "distilpeft", "sweep", str(options.recipe), "--over", over, *given]
    subprocess.run([*command, "--runs", str(options.runs)], check=True)
    (folder,) = sorted((options.runs / options.recipe.stem).glob("sweep-*"), key=lambda one: one.stat().st_mtime)[-1:]
    sweep = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    name = options.recipe.stem
    found[name] = {"changes": options.changes, **{key: sweep[key] for key in ("metric", "budget")}}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot = next(folder.rglob(PLOT))
    shutil.copyfile(plot, PAGE.parent / "figures" / f"label-budget-{name}.svg")
    show(found)


def show(found: dict[str, Any]) -> None:
    """Put the tables into the page."""
    page.insert(PAGE, "label_budget", "\n\n".join(table(name, one) for name, one in found.items()))


def table(name: str, one: dict[str, Any]) -> str:
    """One recipe: a row for each number of labels."""
    entries = one["budget"]
    roles = [role for role in COLUMNS if any(role in entry["scores"] for entry in entries)]
    titles = ["labels", *(COLUMNS[role] for role in roles), "student less labels alone, points (95 %)"]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for entry in entries:
        cells = [f"{entry['scores'][role]['value']:.3f}" if role in entry["scores"] else "" for role in roles]
        lead = entry["lead"]
        gain = "" if lead is None else f"{points(lead['value'])} ({points(lead['low'])} to {points(lead['high'])})"
        lines.append(f"| {' | '.join([str(entry['labels']), *cells, gain])} |")
    at = fades(entries)
    end = "The student is ahead of labels alone at every number of labels." if at is None else (
        f"From {at} labels on, the student is not ahead of labels alone beyond chance."
    )  # fmt: skip
    how = f" With `{'`, `'.join(one['changes'])}`." if one["changes"] else ""
    return "\n".join([f"`{name}`, {one['metric']}.{how}", "", *lines, "", end])


def points(share: float) -> str:
    return f"{share * 100:+.1f}"


if __name__ == "__main__":
    main()
