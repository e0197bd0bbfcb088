"""The documents say what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from distilpeft.planning import recipe_reference
from distilpeft.recipe import Recipe
from distilpeft.recipe.export import LIMITS, Limits
from distilpeft.report import reference as report_reference

ROOT = Path(__file__).parents[2]


def test_the_recipe_reference_is_the_schemas():
    """Make it anew with: distilpeft schema --markdown > docs/recipes.md."""
    assert (ROOT / "docs/recipes.md").read_text(encoding="utf-8") == recipe_reference.markdown()


def test_the_description_of_the_report_is_the_schemas():
    """Regenerate it with: python -m distilpeft.report.reference docs/report.md."""
    text = (ROOT / "docs/report.md").read_text(encoding="utf-8")
    assert text == report_reference.filled(text)


def test_every_key_of_the_report_has_a_meaning():
    assert "None" not in report_reference.markdown()


def test_the_limits_of_exports_are_those_of_the_code():
    text = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    table = text.partition("<!-- limits -->\n")[2].partition("<!-- /limits -->")[0]
    rows = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()}
    for name, cells in rows.items():
        style = ".1%" if name in ("top1_agreement", "metric_kept") else "g" if name == "kl" else ".0e"
        for exactness, cell in zip(("exact", "half", "int8", "int4"), cells, strict=True):
            values = [
                getattr(LIMITS[family, exactness], name) for family in ("classes", "values", "vectors", "language")
            ]
            shown = ["-" if value is None else format(value, style) for value in values]
            assert cell == ("-" if set(shown) == {"-"} else " / ".join(shown)), name
    assert set(rows) == {field.name for field in fields(Limits)}


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.rglob("docs/**/*.md")]), ids=lambda page: page.name)
def test_every_link_between_documents_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        if target.endswith("reference/api.md"):  # the site writes it from docstrings
            continue
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *ROOT.rglob("docs/**/*.md")]), ids=lambda page: page.name)
def test_every_key_in_a_yaml_example_exists(page):
    known = set(re.findall(r"^\| `([a-z_]+)`", recipe_reference.markdown(), re.M)) | {"train", "validation", "test"}
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for section, keys in yaml.safe_load(block).items():
            assert section in Recipe.model_fields
            assert set(keys) <= known, set(keys) - known


def test_the_file_map_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in (ROOT / "src/distilpeft").iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert f"`{path.name}`" in text, path.name
        if (path / "__init__.py").is_file():
            assert f"`{path.name}/`" in text, path.name
