"""The manifest of an exported folder: what its files are and whether they are complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Required, TypedDict, cast

from distilpeft.errors import InputError
from distilpeft.machine.files import digest_file, read_sealed
from distilpeft.recipe.export import FORMS

MANIFEST = "manifest.json"


class FileEntry(TypedDict):
    """A file of a bundle."""

    bytes: int
    sha256: str


class ExportManifest(TypedDict, total=False):
    """What an exported folder says of itself: how to open it, and how to read its answers.

    Keys beyond the required ones belong to some tasks or formats, or to a finished bundle.
    """

    format: Required[str]  # a name of `recipe.export.FORMS`
    file: Required[str]  # that holds the model; "." for a folder that transformers loads
    name: Required[str]  # the recipe's
    task: Required[str]  # a name of `recipe.task.KINDS`
    auto_class: Required[str]  # of transformers
    max_tokens: int  # texts are cut to this many tokens
    pad_token_id: int | None
    labels: list[str]  # class names; the position is the class id
    pair: bool  # two texts a row
    typed: bool  # the model tells them apart by token types
    no_answer: bool  # of question answering, with the next two
    stride: int
    longest_answer: int
    eos_token_ids: list[int]  # of language models
    chat: bool  # prompts go through the chat template
    decoder_start_token_id: int  # of encoder-decoders, with the next two
    prefix: str
    max_new_tokens: int
    pictures: dict[str, Any]  # settings of `pictures.Reader`
    shape: tuple[int, int, int]  # of a picture, [C, H, W]
    pooling: str  # of embeddings
    ignored_ids: list[int]  # of static students: tokens that do not count
    forms: dict[str, str]  # of a bundle of several: form → its file
    files: dict[str, FileEntry]  # of a finished bundle, with the next two
    scores: dict[str, dict[str, Any]]
    provenance: dict[str, Any]


def read_manifest(folder: Path) -> ExportManifest:
    """What an exported folder says of itself.

    Raises:
        InputError: it is not one, or of a form that this version does not know.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: no exported model here (no {MANIFEST}); give a folder such as runs/quickstart/student"
        )
    manifest = read_sealed(folder / MANIFEST, "export it again")
    if manifest.get("format") not in FORMS:
        raise InputError(f"{folder / MANIFEST}: format {manifest.get('format')!r} is none of {', '.join(FORMS)}")
    return cast("ExportManifest", manifest)


def check_files(folder: Path, manifest: ExportManifest, *leave: str) -> None:
    """Compare a bundle's files with its manifest, but for those to `leave`.

    Raises:
        InputError: one is missing or altered.
    """
    for name, recorded in manifest.get("files", {}).items():
        if name not in leave and (not (folder / name).is_file() or digest_file(folder / name) != recorded["sha256"]):
            raise InputError(f"{folder / name}: missing or altered since it was exported; export it again")
