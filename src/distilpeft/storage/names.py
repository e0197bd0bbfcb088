"""Which names in a run's folder are ours, and what they stand for; everything else is left alone."""

from __future__ import annotations

import re
from pathlib import Path

from distilpeft.machine.artifact import PARTIAL
from distilpeft.machine.files import names_in
from distilpeft.machine.locks import LOCKS
from distilpeft.planning.plan import CACHE
from distilpeft.planning.roles import STAGES

REMOVED = ".removed"
"""The ending of what is being deleted."""
_ARTIFACT = re.compile(rf"({'|'.join(STAGES)})-[0-9a-f]{{12}}")
_REMOVED = re.compile(rf"(?:{_ARTIFACT.pattern}(?:\{PARTIAL})?|{CACHE})\.[0-9a-f]{{8}}\{REMOVED}")


def is_artifact(name: str) -> bool:
    """Whether a folder's name is an artifact's."""
    return _ARTIFACT.fullmatch(name) is not None


def is_partial(name: str) -> bool:
    """Whether a folder's name is that of an artifact in progress."""
    return name.endswith(PARTIAL) and is_artifact(name.removesuffix(PARTIAL))


def is_removed(name: str) -> bool:
    """Whether a folder's name is that of something whose deletion was begun."""
    return _REMOVED.fullmatch(name) is not None


def stage_of(name: str) -> str:
    """The stage of an artifact, by its folder's name."""
    return name.partition("-")[0]


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's; a link to one is not."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = names_in(folder)
    return LOCKS in names or any(is_artifact(name) for name in names)
