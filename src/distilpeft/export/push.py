"""`distilpeft push`: an exported folder to a hub repository, after its files and its card were checked."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from distilpeft.errors import InputError
from distilpeft.export.manifest import MANIFEST, check_files, read_manifest
from distilpeft.machine.files import files_below

CARD = "README.md"


def push(folder: Path, repo: str, console: Console, *, private: bool, dry_run: bool) -> None:
    """Upload a bundle.

    Args:
        folder: the bundle.
        repo: `owner/name`.
        console: for what is done.
        private: make the repository private if it is not there yet.
        dry_run: check everything, say what would be uploaded, and upload nothing.

    Raises:
        InputError: the bundle is not complete, its card is not valid, the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo}: not a repository's name: {' '.join(str(error).split())[:200]}") from None
    files = checked_files(folder)
    check_card(folder / CARD)
    for name, size in files.items():
        console.print(f"  {name}  {size / 1e6:.1f} MB", highlight=False)
    total = sum(files.values()) / 1e6
    if dry_run:
        console.print(f"would go to {repo}: {len(files)} files, {total:.1f} MB; nothing was uploaded", highlight=False)
        return
    console.print(f"uploading {len(files)} files, {total:.1f} MB, to {repo}", highlight=False)
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(files), commit_message="Upload by distilpeft"
        )
    except (OSError, ValueError) as error:  # what huggingface_hub raises for the network, a token, a right
        raise InputError(f"{repo}: the hub rejected the upload: {' '.join(str(error).split())[:300]}") from None
    console.print(f"done: {commit.commit_url}", highlight=False)


def checked_files(folder: Path) -> dict[str, int]:
    """Name → bytes of a bundle's files, each compared with its checksum.

    Raises:
        InputError: one is missing, altered, or not in the manifest.
    """
    manifest = read_manifest(folder)
    if "files" not in manifest:
        raise InputError(f"{folder}: an export before its bundle was made; give a folder below runs/NAME/exports")
    listed = manifest["files"]
    names = {file.relative_to(folder).as_posix() for file in files_below(folder)} - {MANIFEST}
    for name in sorted(names - set(listed)):
        raise InputError(f"{folder / name}: not of this bundle; move it elsewhere")
    check_files(folder, manifest)
    return {name: int(recorded["bytes"]) for name, recorded in listed.items()} | {
        MANIFEST: (folder / MANIFEST).stat().st_size
    }


def check_card(path: Path) -> None:
    """Read the card's metadata as the hub does.

    Raises:
        InputError: it is not valid.
    """
    from huggingface_hub import ModelCard

    try:
        metadata = ModelCard.load(path).data
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: its metadata is not a hub card's: {' '.join(str(error).split())[:200]}") from None
    if not metadata.pipeline_tag or not metadata.eval_results:
        raise InputError(f"{path}: its metadata has no pipeline_tag or no scores")
