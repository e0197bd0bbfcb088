"""Examples for clusters: their syntax, and that their commands and recipes exist. They are not run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from distilpeft.cli import app

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").iterdir())


def scripts(file: Path) -> list[str]:
    """The shell text in an example."""
    text = file.read_text()
    if file.suffix == ".sh":
        return [text]
    found = []
    for document in yaml.safe_load_all(text):
        if document.get("kind") == "Job":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            found += container["args"]
        found += [document[name] for name in ("setup", "run") if name in document]
    return found


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_the_shell_of_an_example_can_be_read(file):
    assert scripts(file)
    for script in scripts(file):
        done = subprocess.run([shutil.which("bash"), "-n"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_names_a_verb_and_a_recipe_that_exist(file):
    text = file.read_text()
    verbs = re.findall(r"-m distilpeft (\w+)", text)
    recipes = re.findall(r"recipes/[\w.-]+\.yaml", text)
    assert verbs
    assert recipes
    assert all(verb in get_command(app).commands for verb in verbs)
    assert all((ROOT / recipe).is_file() for recipe in recipes)


def test_the_page_links_every_example():
    page = (ROOT / "docs" / "devices.md").read_text()
    assert [file.name for file in EXAMPLES if f"examples/{file.name}" not in page] == []
