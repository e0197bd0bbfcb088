"""Files for tools around the code: they can be read, and name what exists."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

import distilpeft

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (distilpeft.__version__, PROJECT["license"])
    assert {"cff-version", "title", "message", "authors"} <= set(citation)


def test_issue_forms_have_a_name_a_description_and_fields():
    forms = [file for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml"]
    assert forms
    for file in forms:
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form), file.name
        assert all({"type", "id", "attributes"} <= set(field) for field in form["body"]), file.name


def test_the_container_installs_extras_that_exist():
    (extras,) = [
        line.partition("=")[2]
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("ARG EXTRAS=")
    ]
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
