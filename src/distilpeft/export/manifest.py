"""The manifest of an exported folder: what its files are and whether they are complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilpeft.errors import InputError
from distilpeft.machine.files import digest_file, read_sealed
from distilpeft.recipe.export import FORMS

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an exported folder says of itself.

    Raises:
        InputError: it is none, or of a form that this version does not know.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: no exported model here (no {MANIFEST}); give a folder such as runs/quickstart/student"
        )
    found = read_sealed(folder / MANIFEST, "export it again")
    if found.get("format") not in FORMS:
        raise InputError(f"{folder / MANIFEST}: format {found.get('format')!r} is none of {', '.join(FORMS)}")
    return found


def check_files(folder: Path, manifest: Mapping[str, Any], *leave: str) -> None:
    """Compare a bundle's files with its manifest, but for those to `leave`.

    Raises:
        InputError: one is missing or altered.
    """
    for name, recorded in manifest.get("files", {}).items():
        if name not in leave and (not (folder / name).is_file() or digest_file(folder / name) != recorded["sha256"]):
            raise InputError(f"{folder / name}: missing or altered since it was exported; export it again")
