"""The documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from distilpeft import reference
from distilpeft.recipe import Recipe

ROOT = Path(__file__).parents[2]


def test_the_recipe_reference_is_the_schemas():
    """Make it anew with: distilpeft schema --markdown > docs/recipes.md."""
    assert (ROOT / "docs/recipes.md").read_text(encoding="utf-8") == reference.markdown()


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_every_link_between_documents_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_every_key_in_a_yaml_example_exists(page):
    known = set(re.findall(r"^\| `([a-z_]+)`", reference.markdown(), re.M)) | {"train", "validation", "test"}
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for section, keys in yaml.safe_load(block).items():
            assert section in Recipe.model_fields
            assert set(keys) <= known, set(keys) - known


def test_the_file_map_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in (ROOT / "src/distilpeft").glob("*.py"):
        if not path.name.startswith("__"):
            assert f"`{path.name}`" in text, path.name
