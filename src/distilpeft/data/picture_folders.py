"""Pictures that lie in a folder for each class, as data sets of pictures often come."""

from __future__ import annotations

from pathlib import Path

import datasets

from distilpeft.data.files import SPLIT_NAMES

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE, CLASS = "image", "label"
"""The columns that such a folder has: the path of a picture, and the name of its folder."""


def picture_parts(folder: Path) -> dict[str, datasets.Dataset] | None:
    """The parts of a folder with a folder for each class, or with such folders for each split; None if it has none."""
    inside = _folders(folder)
    if inside and all(one.name.lower() in SPLIT_NAMES for one in inside):
        parts = {one.name: _rows(one) for one in inside}
    else:
        parts = {"train": _rows(folder)}
    return {name: rows for name, rows in parts.items() if rows is not None} or None


def _rows(folder: Path) -> datasets.Dataset | None:
    pictures = [(str(file), one.name) for one in _folders(folder) for file in sorted(one.iterdir())
                if file.suffix.lower() in ENDINGS and not file.name.startswith(".")]  # fmt: skip
    if not pictures:
        return None
    paths, names = zip(*pictures, strict=True)
    return datasets.Dataset.from_dict({IMAGE: list(paths), CLASS: list(names)})


def _folders(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith((".", "_")))
