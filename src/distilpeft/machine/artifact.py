"""Artifacts: what a stage leaves behind, found again by a key that names everything it depends on.

A stage works in `<stage>-<key>.partial/`; when all is on disk (fsync) the folder is renamed to `<stage>-<key>/`.
The rename is the only way to publish, and `manifest.json` with the size and SHA-256 of every file is written
just before it: no manifest, no artifact. The key is a hash of the stage, its format version, the recipe settings
it reads and the digests of its inputs, so a changed teacher, row or setting can never meet old results.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from distilpeft.errors import InputError
from distilpeft.machine.files import (
    JsonObject,
    digest_file,
    files_below,
    names_in,
    publish_folder,
    read_sealed,
    sealed,
    write_json,
)

MANIFEST, PARTIAL = "manifest.json", ".partial"
LOG = "train_log.jsonl"
"""A line for each step of a training."""
Figures: TypeAlias = dict[str, Any]
"""What a stage measured: a JSON object, which its manifest keeps. Each stage describes its own."""
CHECKPOINTS = "checkpoints"
"""Folder of the training loop's checkpoints inside `partial`; dropped when the artifact is published."""


@dataclass(frozen=True)
class Artifact:
    """One stage's result, present or still to be made.

    Attributes:
        stage: the verb that makes it.
        path: its folder once published.
        settings: recipe settings that went into the key.
        inputs: name → digest or key of what it is made from.
    """

    stage: str
    path: Path
    settings: Mapping[str, object]
    inputs: Mapping[str, str]

    @property
    def key(self) -> str:
        """The hash part of the folder's name."""
        return self.path.name.rpartition("-")[2]

    @property
    def partial(self) -> Path:
        """The folder to work in until `publish`."""
        return self.path.with_name(self.path.name + PARTIAL)

    @property
    def done(self) -> bool:
        """Whether the artifact has been published."""
        return (self.path / MANIFEST).is_file()

    def manifest(self) -> JsonObject:
        """The published manifest.

        Raises:
            InputError: it cannot be read; the message says which folder to delete.
        """
        return read_sealed(self.path / MANIFEST, f"delete {self.path} to make it again")

    def figures(self) -> Figures:
        """The numbers that the stage measured."""
        figures: Figures = self.manifest()["figures"]
        return figures

    def verify(self) -> None:
        """Compare every file with its recorded size and SHA-256.

        Raises:
            InputError: a file is missing or altered; the message names it and what to do.
        """
        for name, recorded in self.manifest()["files"].items():
            self._check(name, recorded)

    def file(self, name: str) -> Path:
        """One of its files, which is what it was when it was written; see `verify`."""
        self._check(name, self.manifest()["files"].get(name))
        return self.path / name

    def _check(self, name: str, recorded: Mapping[str, object] | None) -> None:
        file = self.path / name
        if (
            recorded is None
            or not file.is_file()
            or file.stat().st_size != recorded["bytes"]
            or digest_file(file) != recorded["sha256"]
        ):
            raise InputError(f"{file}: missing or altered since it was written; delete {self.path} to make it again")

    def publish(self, figures: Mapping[str, object], environment: Mapping[str, object], seconds: float = 0.0) -> None:
        """Write the manifest over the files in `partial` and rename the folder into place, all fsynced.

        Args:
            figures: what the stage measured.
            environment: versions and hardware.
            seconds: the step has taken, since it was last resumed.
        """
        files = {
            file.relative_to(self.partial).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": digest_file(file),
            }
            for file in files_below(self.partial)
            if file != self.partial / MANIFEST and self.partial / CHECKPOINTS not in file.parents
        }
        manifest = {
            "stage": self.stage,
            "key": self.key,
            "settings": self.settings,
            "inputs": self.inputs,
            "figures": figures,
            "files": files,
            "environment": environment,
            "seconds": round(seconds, 2),
        }
        write_json(self.partial / MANIFEST, sealed(manifest))
        publish_folder(self.partial, self.path, replace=True)  # a folder there has no manifest: it is not an artifact
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)  # only now: until the rename they were the way back


def artifact(
    folder: Path, stage: str, version: int, settings: Mapping[str, object], inputs: Mapping[str, str]
) -> Artifact:
    """Name the artifact of `stage` (at format `version`) for these settings and inputs, below `folder`."""
    text = json.dumps([stage, version, settings, inputs], sort_keys=True, ensure_ascii=False)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Artifact(stage, folder / f"{stage}-{key}", settings, inputs)


class Published:
    """The artifacts that are done, as of the last look at their folders.

    A look lists a folder once, however many artifacts are asked for. A manifest is looked for only where a folder is
    new since the last look; an artifact found done stays done until its folder is gone.
    """

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}
        self._done: dict[Path, bool] = {}

    def look(self, folder: Path) -> None:
        """List a folder of artifacts again."""
        names = self._names[folder] = names_in(folder)
        self._done = {
            path: True for path, done in self._done.items() if done and (path.parent != folder or path.name in names)
        }

    def __contains__(self, one: Artifact) -> bool:
        """Whether an artifact was done at the last look at its folder."""
        path = one.path
        if path.name not in self._names.get(path.parent, ()):
            return False
        if path not in self._done:
            self._done[path] = one.done
        return self._done[path]
