"""The catalogue of recipes, from the reports of their runs.

    python benchmarks/catalogue.py            # take in every finished run of a recipe under runs/, and write the page
    python benchmarks/catalogue.py --table    # the page from the result file alone

Figures are of the machine that ran them; time is what all stages took, from an empty folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

import page

from distilpeft.machine.artifact import Artifact
from distilpeft.planning.plan import make_plan
from distilpeft.planning.roles import STUDENT
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.report import build, verdict
from distilpeft.report.schema import Report

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "catalogue.json"
PAGE = ROOT / "recipes" / "README.md"


def first_sentence(recipe: Path) -> str:
    """What the recipe is for: its comment, up to the first full stop or semicolon."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), recipe.read_text(encoding="utf-8").splitlines())
    return re.split(r"[.;](?: |$)", " ".join(line.lstrip("# ") for line in comment))[0]


def take(recipe: Path, runs: Path) -> dict[str, Any] | None:
    """The figures of a finished run; None if there is none."""
    file = runs / recipe.stem / "report.json"
    if not file.is_file():
        return None
    whole = build.load(file.parent)
    report = whole.as_json()
    plan = make_plan(load_recipe(recipe), runs)
    made = {step: one.path.name for step, one in plan.steps().items()}
    if plan.missing() or not made.items() <= report["artifacts"].items():
        return None  # of a recipe that was changed since, or run with --set
    models = {model["role"]: model for model in report["models"]}
    found = gain(whole)
    on_labels = found["against"] if found else "student_ce_only"
    exports = [model for role, model in models.items() if role.startswith("export:")]
    small = min(exports, key=lambda model: model["size_bytes"])
    roles = {"teacher": "teacher", "labels alone": on_labels, "student": "student"}
    over = {one["role"]: one["mean"] for one in (report["seeds"] or {"models": ()})["models"]}
    return {
        "metric": report["metric"],
        "gain": found,
        "labels": [report["rows"]["train"], report["rows"]["unlabelled"]],
        "scores": {
            name: over.get(role, models[role]["scores"][report["metric"]]["value"])
            for name, role in roles.items()
            if role in models
        },
        "export": small["role"].removeprefix("export:"),
        "export_score": small["scores"][report["metric"]]["value"],
        "export_bytes": small["size_bytes"],
        "p50_ms": small["latency_ms"]["p50"],
        "memory_bytes": small["memory_bytes"],
        "seconds": sum(seconds(made) for made in plan.artifacts.values()),
        "test_rows": models["student"]["scores"][report["metric"]]["num_rows"],
        "environment": report["environment"],
    }


def gain(whole: Report) -> dict[str, Any] | None:
    """The student's lead over the better of those on labels alone, on the same rows; over the seeds, if several."""
    other = verdict.on_labels(whole)
    lead = verdict.lead(whole, STUDENT, other) if other else None
    if lead is None:
        return None
    return {"against": other, "value": lead.value, "low": lead.low, "high": lead.high, "seeds": lead.seeds}


def seconds(made: Artifact) -> float:
    """How long a step took."""
    return float(made.manifest()["seconds"])


def table(found: dict[str, Any]) -> str:
    """A row per recipe that was run, then those that were not."""
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    titles = ("recipe", "for", "rows with a label, without", "score", "teacher", "labels alone", "student",
              "student less labels alone (95 %)", "smallest export", "its size and p50")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for recipe in recipes:
        one = found.get(recipe.stem)
        if one is None:
            continue
        scores = [f"{one['scores'][name]:.4f}" if name in one["scores"] else "-"
                  for name in ("teacher", "labels alone", "student")]  # fmt: skip
        cells = (
            f"[{recipe.stem}]({recipe.name})", first_sentence(recipe), _rows(one["labels"]), one["metric"], *scores,
            _gain(one["gain"]), f"{one['export']}: {one['export_score']:.4f}",
            f"{one['export_bytes'] / 1e6:.1f} MB, {one['p50_ms']:.1f} ms",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    where = sorted({one["environment"]["device"] for one in found.values()})
    gains = [one["gain"] for one in found.values() if one["gain"] is not None]
    ahead, behind = sum(one["low"] > 0 for one in gains), sum(one["high"] < 0 for one in gains)
    lines += [
        "",
        f"Of {len(gains)} recipes with labels, the student is ahead of labels alone beyond chance in {ahead}, and "
        f"behind in {behind}; in the others there is no difference beyond chance. Labels alone: the better of two, "
        "trained for its own epochs and, where some rows have no label, for as many steps as the student. Differences "
        "are on the same rows, and over seeds where there are several; scores are then means. Measured on "
        f"{', '.join(where)}, two cores; exports of the first seed. Runs may have shared the machine.",
        "",
    ]
    rest = [recipe for recipe in recipes if recipe.stem not in found]
    return "\n".join(
        [*lines, *(f"- [{one.stem}]({one.name}): {first_sentence(one)}. No figures here." for one in rest)]
    )


def _rows(labels: list[int] | None) -> str:
    """Training rows with a label, and without."""
    return "-" if labels is None else f"{labels[0]}" if not labels[1] else f"{labels[0]}, {labels[1]}"


def _gain(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    seeds = f", {found['seeds']} seeds" if found["seeds"] > 1 else ""
    return f"{found['value']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}{seeds})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if not options.table:
        for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
            one = take(recipe, options.runs)
            if one is not None:
                found[recipe.stem] = one
                print(f"{recipe.stem}: taken in")
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    page.insert(PAGE, "catalogue", table(found))


if __name__ == "__main__":
    main()
