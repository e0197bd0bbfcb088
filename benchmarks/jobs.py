"""How much sooner a sweep ends with worker processes: the same points, teacher and cache ready, with and without them.

    python benchmarks/jobs.py recipes/sentiment_reviews.yaml --jobs 2

Every turn runs the sweep in a fresh copy of the folder, once with each number of workers, in turn first and second.
Leaves benchmarks/results/jobs_cpu.json and rewrites docs/sweep.md between its jobs markers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from page import insert

from distilpeft.machine.host import cpu_name, num_cpus

ROOT = Path(__file__).parents[1]
OVER = ["--over", "student.from_teacher.layers=[0,5],[0,1,3,5]"]
SHORT = ["--set", "distil.fit.epochs=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready"
        distilpeft("run", options.recipe, ready, *SHORT, "--until", "targets")
        seconds: dict[int, list[float]] = {1: [], options.jobs: []}
        for turn in range(options.turns):
            for jobs in sorted(seconds, reverse=bool(turn % 2)):
                seconds[jobs].append(timed(options.recipe, ready, Path(folder) / "runs", jobs))
                print(f"turn {turn + 1}: {jobs} workers: {seconds[jobs][-1]:.1f} s", flush=True)
    one, many = (median(seconds[jobs]) for jobs in sorted(seconds))
    result = {"recipe": options.recipe.stem, "machine": f"{cpu_name()} x{num_cpus()}", "over": OVER, "seconds": seconds}
    path = ROOT / "benchmarks/results/jobs_cpu.json"
    path.write_text(json.dumps({**result, "jobs": options.jobs, "ratio": round(one / many, 3)}, indent=2) + "\n")
    insert(ROOT / "docs/sweep.md", "jobs", text(options, one, many))
    print(f"result: {path}")


def distilpeft(verb: str, recipe: Path, runs: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "distilpeft", verb, str(recipe), "--runs", str(runs), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def timed(recipe: Path, ready: Path, runs: Path, jobs: int) -> float:
    """Seconds of the sweep in a copy of the folder that has teacher and cache."""
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(ready, runs)
    begin = time.monotonic()
    distilpeft("sweep", recipe, runs, *SHORT, *OVER, "--jobs", str(jobs))
    return time.monotonic() - begin


def text(options: argparse.Namespace, one: float, many: float) -> str:
    return (
        f"`benchmarks/jobs.py`, two students of the {options.recipe.stem}, an epoch each, "
        f"teacher and cache ready, on {cpu_name()} x{num_cpus()}: {one:.0f} s alone, {many:.0f} s with {options.jobs} "
        f"workers, {one / many:.2f}× as fast (medians of {options.turns})."
    )


if __name__ == "__main__":
    main()
