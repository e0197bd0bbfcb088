"""The recipes that come with distilpeft: found by name, listed, and copied with the scripts that make their data."""

from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from distilpeft.errors import InputError

PACKAGE = Path(__file__).parents[1]
HELPER = "packaged.py"
"""What the scripts that make data share."""


def folder() -> Path:
    """Where the recipes are: in the installed package, or in the checkout that is installed in place."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parents[1] / "recipes"


@dataclass(frozen=True)
class Shipped:
    """A recipe of the package.

    Attributes:
        file: where it is.
        purpose: what it is for, in a sentence.
        setup: the commands that its data and models need first.
    """

    file: Path
    purpose: str
    setup: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is called."""
        return self.file.stem

    @property
    def scripts(self) -> tuple[Path, ...]:
        """Scripts that make its data."""
        named = re.findall(r"recipes/(\w+\.py)", "\n".join(self.setup))
        return tuple(self.file.parent / script for script in dict.fromkeys(named))


def shipped() -> list[Shipped]:
    """All of them, the quickstart first."""
    files = sorted(folder().glob("*.yaml"), key=lambda file: (file.stem != "quickstart", file.stem))
    return [_read(file) for file in files]


def _read(file: Path) -> Shipped:
    """A recipe's own comment: its first sentence, and the commands before `distilpeft`."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = [line[1:] for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    prose = " ".join(line.strip() for line in comment if not line.startswith("   "))
    commands = [line.strip() for line in comment if line.startswith("   ")]
    setup = tuple(re.sub(r"\s+#.*", "", line) for line in commands if line.startswith(("pip ", "python ")))
    return Shipped(file, re.split(r"(?<=[.;])(?: |$)", prose, maxsplit=1)[0].rstrip(".;"), setup)


def find(name: str) -> Path | None:
    """The file of a recipe by its name; None if there is none."""
    file = folder() / f"{name}.yaml"
    return file if re.fullmatch(r"[\w.-]+", name) and file.is_file() else None


def copy(name: str, out: Path) -> list[Path]:
    """Copy a recipe, with the scripts that make its data, into a folder.

    Args:
        name: of the recipe.
        out: the folder; made if it is not there.

    Returns:
        The files written: the recipe first.

    Raises:
        InputError: there is no such recipe, or another file of that name is there already.
    """
    source = next((one for one in shipped() if one.name == name), None)
    if source is None:
        raise InputError(f"recipes: there is no {name!r}; distilpeft recipes lists them")
    helpers = [source.file.parent / HELPER] if source.scripts else []
    # The header says `python recipes/NAME.py`, so the scripts go into such a folder.
    wanted = {out / source.file.name: source.file}
    wanted |= {out / "recipes" / script.name: script for script in (*source.scripts, *helpers)}
    taken = next((file for file, one in wanted.items() if file.exists() and not _is_same(file, one)), None)
    if taken is not None:
        raise InputError(f"{taken}: is there already; nothing was copied")
    for file, original in wanted.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, file)
    return list(wanted)


def _is_same(file: Path, original: Path) -> bool:
    return file.is_file() and file.read_bytes() == original.read_bytes()
