"""What students of each size give on one teacher's soft targets: a table and a plot of docs/students.md.

    python benchmarks/frontier.py recipes/few_labels_trec.yaml
    python benchmarks/frontier.py recipes/quickstart.yaml
    python benchmarks/frontier.py --table                    # the page from the result file alone

Runs `distilpeft sweep` over the students below and three seeds. Scores are means over seeds; latencies hold on a
machine that does nothing else.
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

from distilpeft.tuning import frontier

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/frontier.json"
PAGE = ROOT / "docs/students.md"
PICTURES = ROOT / "docs/pictures"
THREE = "from_teacher: {layers: [0, 2, 4]}"
STUDENTS = [
    f"{{student: {{{THREE}}}}}",
    "{student: {from_teacher: {layers: [0]}}}",
    "{student: {from_teacher: {layers: [0, 2, 4], hidden: 256, ffn: 1024}}}",
    f"{{student: {{{THREE}, vocabulary: {{from: data}}}}}}",
    f"{{student: {{{THREE}, vocabulary: {{from: data, min_count: 2}}}}}}",
    "{student: {from_teacher: {layers: [0]}, vocabulary: {from: data, min_count: 2}}}",
    "{student: {static: {hidden: 256}}, distil.optim.lr: 3e-3}",
    "{student: {static: {dim: 64, hidden: 128}, vocabulary: {from: data}}, distil.optim.lr: 3e-3}",
]
SETTINGS = [
    "evaluate.seeds=[]", "evaluate.teacher_full_precision=false", "distil.ce_only_baseline=false", "distil.controls=[]",
    "export.formats=[onnx, onnx-int8]",
]  # fmt: skip


def main() -> None:
    parser = page.parser(__doc__)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--set", action="append", default=[], dest="changes")
    page.run_or_show(parser, run, lambda: show(json.loads(RESULT.read_text(encoding="utf-8"))))


def run(options: argparse.Namespace) -> None:
    """Sweep one recipe, keep what each size gives, and write the page."""
    over = [f"seed={','.join(map(str, options.seeds))}"]
    _, joint = sweeps.run(options, over, [*SETTINGS, *options.changes], STUDENTS)
    entry = {
        "metric": joint["metric"], "split": joint["split"], "changes": options.changes, "seeds": options.seeds,
        "frontier": joint["frontier"],
    }  # fmt: skip
    show(sweeps.keep(RESULT, options.recipe.stem, entry))


def show(found: dict[str, Any]) -> None:
    """Put tables and plots into the page."""
    parts = []
    for name, one in found.items():
        with tempfile.TemporaryDirectory() as scratch:
            frontier.draw(one["frontier"], one["metric"], Path(scratch))
            shutil.copy(Path(scratch) / f"{frontier.PLOT}.svg", PICTURES / f"frontier-{name}.svg")
        lines = [line for line in frontier.markdown(one["frontier"], one["metric"]) if not line.startswith("## ")]
        given = f"`{' '.join([name, *one['changes']])}`, seeds {', '.join(map(str, one['seeds']))}:"
        plot = f"![{one['metric']} by latency](pictures/frontier-{name}.svg)"
        parts += [given, "", "\n".join(lines).strip(), "", plot, ""]
    page.insert(PAGE, "frontier", "\n".join(parts).strip())


if __name__ == "__main__":
    main()
