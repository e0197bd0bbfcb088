"""What labels are worth: a recipe's sweep over `data.labelled`, as a table and a plot of docs/when-it-pays.md.

    python benchmarks/budget.py recipes/few_labels_trec.yaml --labels 200 500 1000 2000 4642 --set ...
    python benchmarks/budget.py --table                    # the page from the result file alone

Runs `distilpeft sweep` for what is missing. What was changed stands behind the recipe's name in the result file. Of
several seeds (`evaluate.seeds`) scores are means; the lead's intervals move rows and seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import page
import sweeps

from distilpeft.tuning import label_budget

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/label_budget.json"
PAGE = ROOT / "docs/when-it-pays.md"
PICTURES = ROOT / "docs/pictures"


def main() -> None:
    parser = page.parser(__doc__)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--labels", type=int, nargs="+", default=[200, 500, 1000, 2000])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--set", action="append", default=[], dest="changes")
    page.run_or_show(parser, run, lambda: show(json.loads(RESULT.read_text(encoding="utf-8"))))


def run(options: argparse.Namespace) -> None:
    """Sweep one recipe, keep what the sweep says of labels, and write the page."""
    over = [f"data.labelled={','.join(map(str, options.labels))}"]
    recipe, joint = sweeps.run(options, over, options.changes)
    entry = {
        "metric": joint["metric"], "split": joint["split"], "changes": options.changes,
        "seeds": sorted({recipe.seed, *recipe.evaluate.seeds}), "budget": joint["budget"],
    }  # fmt: skip
    show(sweeps.keep(RESULT, options.recipe.stem, entry))


def show(found: dict[str, Any]) -> None:
    """Put tables and plots into the page."""
    parts = []
    for name, one in found.items():
        with tempfile.TemporaryDirectory() as scratch:
            label_budget.draw(one["budget"], one["metric"], Path(scratch))
            shutil.copy(Path(scratch) / f"{label_budget.PLOT}.svg", PICTURES / f"labels-{name}.svg")
        seeds = f"seed{'s' * (len(one['seeds']) > 1)} {', '.join(map(str, one['seeds']))}"
        given = f"`{' '.join([name, *one['changes']])}`, {seeds}:"
        lines = label_budget.markdown(one["budget"], one["metric"])
        table = [line for line in lines if not line.startswith("## ")]
        parts += [
            given,
            "",
            "\n".join(table).strip(),
            "",
            f"![{one['metric']} by number of labels](pictures/labels-{name}.svg)",
            "",
        ]
    page.insert(PAGE, "budget", "\n".join(parts).strip())


if __name__ == "__main__":
    main()
