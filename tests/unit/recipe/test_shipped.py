"""Recipes that come with the package: found by name, listed with what they need, and copied with their scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distilpeft import cli
from distilpeft.errors import InputError
from distilpeft.recipe.shipped import copy, find, folder, shipped
from distilpeft.recipe.yaml_file import load_recipe


def test_every_recipe_says_what_it_is_for_and_the_quickstart_is_first():
    found = shipped()
    assert found[0].name == "quickstart"
    assert {one.name for one in found} == {file.stem for file in folder().glob("*.yaml")}
    for one in found:
        assert 20 < len(one.purpose) < 300, one.name
        assert all(script.is_file() for script in one.scripts), one.name
        assert all(command.startswith(("pip install", "python recipes/")) for command in one.setup), one.setup


def test_a_recipe_is_found_by_its_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").name == "quickstart"
    tree = yaml.safe_load(find("quickstart").read_text())
    (tmp_path / "quickstart").write_text(yaml.safe_dump({**tree, "name": "mine"}))
    assert load_recipe("quickstart").name == "mine"


@pytest.mark.parametrize("name", ["quickstar", "../recipes/quickstart", "", "quick start"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(InputError, match="give the path of a recipe file, or a name from distilpeft recipes"):
        load_recipe(name)


def test_a_copy_brings_the_scripts_that_its_header_names(tmp_path):
    written = copy("names_wikitext", tmp_path / "new")
    assert [str(file.relative_to(tmp_path / "new")) for file in written] == [
        "names_wikitext.yaml", "recipes/make_name_tags.py", "recipes/packaged.py",
    ]  # fmt: skip
    assert load_recipe(written[0]).name == "names_wikitext"
    assert copy("names_wikitext", tmp_path / "new") == written, "what is there and equal stays"
    copy("topics_questions", tmp_path / "new")  # shares packaged.py
    written[0].write_text("name: mine")
    with pytest.raises(InputError, match=r"names_wikitext\.yaml: is there already; nothing was copied"):
        copy("names_wikitext", tmp_path / "new")
    assert written[0].read_text() == "name: mine"
    with pytest.raises(InputError, match="there is no 'nothing'"):
        copy("nothing", tmp_path)


def test_the_terminal_lists_and_copies(tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["distilpeft", *arguments])
        cli.main()
        return capsys.readouterr().out

    assert "names_wikitext" in run("recipes")
    assert "$ python recipes/make_name_tags.py" in run("recipes")
    assert run("recipes", "copy", "quickstart", "--out", str(tmp_path)).strip() == str(tmp_path / "quickstart.yaml")
    assert run("--version").strip() == run("version").strip()


@pytest.mark.slow
def test_a_wheel_brings_the_recipes_and_its_types(tmp_path):
    """Built and unpacked as pip would, away from the checkout."""
    root = Path(__file__).parents[3]
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    unpack = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run(unpack, check=True)
    assert (site / "distilpeft/py.typed").is_file()
    code = "from distilpeft.recipe.shipped import folder, shipped; print(folder(), len(shipped()))"
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    where, count = done.stdout.split()
    assert Path(where) == site / "distilpeft/recipes"
    assert int(count) == len(shipped())
