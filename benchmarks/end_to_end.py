"""Where the time of a whole run goes, stage by stage.

    python benchmarks/end_to_end.py                 # of runs/sentiment_reviews; runs the recipe if there is none
    python benchmarks/end_to_end.py --fresh         # run the recipe in a folder of its own, and time the whole command
    python benchmarks/end_to_end.py --table         # Markdown from the result file, and into docs/peers.md

Seconds are those that the manifests tell of each step; the steps of repeats with other seeds are one line. A step that
was stopped and resumed tells only what it took since. With --fresh the whole command is timed as well, and what it took
besides its steps (imports, reading rows, looking for what is done, the report) is a line of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import page

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "end_to_end_cpu.json"
PAGE = ROOT / "docs" / "peers.md"


def summed(run: Path) -> dict[str, Any]:
    """Seconds by stage, in the order of the run; a student's training is told by its role."""
    report = json.loads((run / "report.json").read_text())
    seconds: dict[str, float] = {}
    counted = set()
    for step, folder in report["artifacts"].items():
        if folder in counted:  # two steps may share what they make
            continue
        counted.add(folder)
        manifest = json.loads((run / folder / "manifest.json").read_text())
        if "seconds" not in manifest:
            sys.exit(f"{run / folder}: made before manifests told seconds; use --fresh")
        seconds[stage(step)] = round(seconds.get(stage(step), 0.0) + manifest["seconds"], 2)
    return {"recipe": report["recipe"], "seconds": seconds, "environment": report["environment"]}


def stage(step: str) -> str:
    if step.startswith("seed "):
        return "repeats with other seeds"
    return step if step.startswith("distil/") else step.partition("/")[0]


def do(recipe: Path, runs: Path) -> float:
    """Run the recipe; seconds of the whole command."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "distilpeft", "run", str(recipe), "--runs", str(runs)], check=True)
    return time.monotonic() - begin


def fresh(recipe: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as runs:
        command_s = do(recipe, Path(runs))
        (report,) = Path(runs).glob("*/report.json")
        return {**summed(report.parent), "command_s": round(command_s, 2)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.fresh:
        return fresh(options.recipe)
    if not (options.run / "report.json").is_file():
        do(options.recipe, options.run.parent)
    return summed(options.run)


def table(found: dict[str, Any]) -> str:
    rows = dict(found["seconds"])
    whole = found.get("command_s", sum(rows.values()))
    if "command_s" in found:
        rows["besides: imports, reading rows, the report"] = whole - sum(rows.values())
    lines = ["| stage | s | share |", "| --- | --- | --- |"]
    lines += [f"| {name} | {value:.1f} | {value / whole:.1%} |" for name, value in rows.items()]
    told = found["environment"]
    where = f"{told['device']}, {told['threads']} threads, torch {told['versions']['torch']}"
    return "\n".join([*lines, f"| together | {whole:.1f} | |", "", f"`{found['recipe']}` on {where}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs" / "sentiment_reviews")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "sentiment_reviews.yaml")
    parser.add_argument("--out", type=Path, help="another result file; its table is printed and goes into no page")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    file = options.out or RESULT
    if not options.table:
        found = measure(options)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    text = table(json.loads(file.read_text()))
    if options.out is None:
        page.insert(PAGE, "end_to_end", text)
    print(text)


if __name__ == "__main__":
    main()
