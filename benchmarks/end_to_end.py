"""Where the time of a whole run goes, stage by stage.

    python benchmarks/end_to_end.py                 # of the finished runs/quickstart
    python benchmarks/end_to_end.py --fresh         # run the recipe in a folder of its own, and time the whole command
    python benchmarks/end_to_end.py --table         # Markdown from the result file, and into docs/peers.md

Seconds are those that the manifests tell of each step; with --fresh, what the command takes besides (imports, reading
the data, looking for what is done) is the rest.
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

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULT = HERE / "results" / "end_to_end_cpu.json"
PAGE = ROOT / "docs" / "peers.md"


def summed(run: Path) -> dict[str, Any]:
    """Seconds by stage, in the order of the stages; a training's is told by its model."""
    report = json.loads((run / "report.json").read_text())
    seconds: dict[str, float] = {}
    for step, folder in report["artifacts"].items():
        if step.startswith("seed "):
            continue
        name = step if step.startswith("distil/") else step.partition("/")[0]
        found = json.loads((run / folder / "manifest.json").read_text())["seconds"]
        seconds[name] = round(seconds.get(name, 0.0) + found, 2)
    return {"recipe": report["recipe"], "seconds": seconds, "environment": report["environment"]}


def fresh(recipe: Path) -> dict[str, Any]:
    """The same of a run from nothing, and the seconds of the whole command."""
    with tempfile.TemporaryDirectory() as runs:
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "distilpeft", "run", str(recipe), "--runs", runs], check=True)
        whole = time.monotonic() - begin
        return {**summed(Path(runs) / recipe.stem), "command_s": round(whole, 1)}


def table() -> str:
    found = json.loads(RESULT.read_text())
    seconds = found["seconds"]
    whole = found.get("command_s") or sum(seconds.values())
    rows = dict(seconds)
    if "command_s" in found:
        rows["besides: imports, reading rows"] = found["command_s"] - sum(seconds.values())
    lines = ["| stage | s | share |", "| --- | --- | --- |"]
    lines += [f"| {name} | {value:.0f} | {value / whole:.0%} |" for name, value in rows.items()]
    environment = found["environment"]
    where = f"{environment['device']}, {environment['threads']} threads, torch {environment['versions']['torch']}"
    return "\n".join([*lines, f"| together | {whole:.0f} | |", "", f"`{found['recipe']}` on {where}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs" / "quickstart")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.yaml")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        found = fresh(options.recipe) if options.fresh else summed(options.run)
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    text = table()
    page.insert(PAGE, "end_to_end", text)
    print(text)


if __name__ == "__main__":
    main()
