"""What people read is in the usual words of the field; CONTRIBUTING.md has the list."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = (
    "anyhow", "anew", "told", "tells of", "so many", "beside", "likewise", "mend", "mended", "held against",
    "at work on", "goes on", "going on", "go on",
)  # fmt: skip
UNUSUAL = re.compile(rf"\b({'|'.join(WORDS)})\b")


def spoken(file: Path) -> Iterator[tuple[int, str]]:
    """Every text in a module that a user may see: all but docstrings, and of the command line those too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documents = {
        id(part.value)
        for node in ast.walk(tree)
        if isinstance(body := getattr(node, "body", None), list)
        for part in body
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and (id(node) not in documents or file.parent.name == "cli"):
            yield node.lineno, node.value


@pytest.mark.parametrize("folder", sorted(part.name for part in (ROOT / "src/distilpeft").iterdir() if part.is_dir()))
def test_messages_and_help_have_none_of_the_unusual_words(folder):
    found = [
        f"{file.name}:{line}: {match.group()}: {text}"
        for file in sorted((ROOT / "src/distilpeft" / folder).rglob("*.py"))
        for line, text in spoken(file)
        if (match := UNUSUAL.search(text))
    ]
    assert not found, "\n".join(found)


PAGES = [
    ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(file for kind in ("*.yaml", "*.ipynb") for file in (ROOT / "recipes").glob(kind)),
]  # fmt: skip


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_the_documents_and_recipes_have_none_either(file):
    found = [line for line in file.read_text(encoding="utf-8").splitlines() if UNUSUAL.search(line)]
    assert not found, "\n".join(found)


def test_the_list_is_the_one_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"| {word} |" in text for word in WORDS), [word for word in WORDS if f"| {word} |" not in text]
