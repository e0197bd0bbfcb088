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
from distilpeft.recipe.yaml_file import load_recipe

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
    report = json.loads(file.read_text(encoding="utf-8"))
    plan = make_plan(load_recipe(recipe), runs)
    made = {step: one.path.name for step, one in plan.steps().items()}
    if plan.missing() or not made.items() <= report["artifacts"].items():
        return None  # of a recipe that was changed since, or run with --set
    models = {model["role"]: model for model in report["models"]}
    exports = [model for role, model in models.items() if role.startswith("export:")]
    small = min(exports, key=lambda model: model["size_bytes"])
    roles = ("teacher", "student_ce_only", "student")
    return {
        "metric": report["metric"],
        "gain": gain(report),
        "scores": {role: models[role]["scores"][report["metric"]]["value"] for role in roles if role in models},
        "export": small["role"].removeprefix("export:"),
        "export_score": small["scores"][report["metric"]]["value"],
        "export_bytes": small["size_bytes"],
        "p50_ms": small["latency_ms"]["p50"],
        "memory_bytes": small["memory_bytes"],
        "seconds": sum(seconds(made) for made in plan.artifacts.values()),
        "test_rows": models["student"]["scores"][report["metric"]]["num_rows"],
        "environment": report["environment"],
    }


def gain(report: dict[str, Any]) -> dict[str, Any] | None:
    """Student less CE-only student, on the same rows; over seeds, if there were several."""
    seeds = report["seeds"]
    pairs = seeds["comparisons"] if seeds else report["comparisons"]
    for pair in pairs:
        if (pair["role"], pair["against"]) == ("student", "student_ce_only"):
            value = pair["mean"] if seeds else pair["difference"]
            return {
                "value": value,
                "low": pair["low"],
                "high": pair["high"],
                "seeds": len(seeds["seeds"]) if seeds else 1,
            }
    return None


def seconds(made: Artifact) -> float:
    """How long a step took."""
    return float(made.manifest()["seconds"])


def table(found: dict[str, Any]) -> str:
    """A row per recipe that was run, then those that were not."""
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    titles = ("recipe", "for", "score", "teacher", "CE-only", "student", "student − CE-only", "smallest export",
              "its size and p50", "run")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for recipe in recipes:
        one = found.get(recipe.stem)
        if one is None:
            continue
        scores = [f"{one['scores'][role]:.4f}" if role in one["scores"] else "-"
                  for role in ("teacher", "student_ce_only", "student")]  # fmt: skip
        cells = (
            f"[{recipe.stem}]({recipe.name})", first_sentence(recipe), one["metric"], *scores,
            _gain(one["gain"]), f"{one['export']}: {one['export_score']:.4f}",
            f"{one['export_bytes'] / 1e6:.1f} MB, {one['p50_ms']:.1f} ms", f"{one['seconds'] / 60:.0f} min",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    where = sorted({one["environment"]["device"] for one in found.values()})
    lines += [
        "",
        f"Measured on {', '.join(where)}, two cores; scores of seed 17. Differences: on the same rows, with "
        "95 % intervals: of one seed over the rows, of several over rows and seeds. Runs may have shared the machine.",
        "",
    ]
    rest = [recipe for recipe in recipes if recipe.stem not in found]
    return "\n".join(
        [*lines, *(f"- [{one.stem}]({one.name}): {first_sentence(one)}. No figures here." for one in rest)]
    )


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
