"""Run a sweep for a benchmark, and keep what is wanted of it in a result file."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilpeft.recipe import Recipe
from distilpeft.tuning.sweep import key_of
from distilpeft.tuning.sweep_points import points


def run(
    options: argparse.Namespace, over: Sequence[str], changes: Sequence[str], single: Sequence[str] = ()
) -> tuple[Recipe, dict[str, Any]]:
    """`distilpeft sweep` of options.recipe in options.runs: the first point's recipe, and the content of sweep.json."""
    command = [sys.executable, "-m", "distilpeft", "sweep", str(options.recipe), "--runs", str(options.runs)]
    for name, values in (("--over", over), ("--point", single), ("--set", changes)):
        command += [part for value in values for part in (name, value)]
    subprocess.run(command, check=True)
    swept = points(options.recipe, over, changes, options.runs, single)
    folder = swept[0].plan.folder / f"sweep-{key_of(swept)}"
    return swept[0].plan.recipe, json.loads((folder / "sweep.json").read_text(encoding="utf-8"))


def keep(result: Path, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Put one recipe's entry among those of the result file; returns all of them."""
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    found[name] = entry
    result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found
