"""The files of a student's tokenizer: they cut texts where training did, whatever a process did before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import tiny
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from distilpeft.models.student import save_tokenizer
from distilpeft.recipe import Recipe

LONG = "good film " * 40


def recipe_of(folder: Path, **task: object) -> Recipe:
    tree = tiny.recipe_tree(folder)
    return Recipe.model_validate({**tree, "task": task} if task else tree)


@pytest.fixture
def recipe(tmp_path):
    return recipe_of(tmp_path)


def test_texts_are_cut_where_training_cut_them_by_transformers_and_by_tokenizers_alone(recipe, tmp_path):
    tokenizer = tiny.tokenizer()
    save_tokenizer(recipe, tokenizer, tmp_path / "one")
    most = recipe.data.max_tokens
    right = tokenizer(LONG, truncation=True, max_length=most)["input_ids"]
    assert len(right) == most < tokenizer.model_max_length == 64, "the tokenizer in hand keeps its own limit"
    assert Tokenizer.from_file(str(tmp_path / "one/tokenizer.json")).encode(LONG).ids == right
    loaded = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert loaded(LONG, truncation=True)["input_ids"] == right


def test_a_limit_below_max_tokens_stays(recipe, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 7
    save_tokenizer(recipe, tokenizer, tmp_path / "one")
    assert json.loads((tmp_path / "one/tokenizer_config.json").read_text())["model_max_length"] == 7
    assert len(Tokenizer.from_file(str(tmp_path / "one/tokenizer.json")).encode(LONG).ids) == 7


def test_files_do_not_depend_on_what_was_read_before(recipe, tmp_path):
    tokenizer = tiny.tokenizer()
    save_tokenizer(recipe, tokenizer, tmp_path / "one")
    again = AutoTokenizer.from_pretrained(tmp_path / "one")
    save_tokenizer(recipe, again, tmp_path / "two")
    again([LONG, "good"], truncation=True, max_length=5, padding=True)
    save_tokenizer(recipe, again, tmp_path / "three")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    settings = json.loads((tmp_path / "two/tokenizer_config.json").read_text())
    assert not {"max_length", "stride", "truncation_strategy"} & set(settings)


def test_language_models_keep_the_limit_that_they_came_with(tmp_path):
    recipe = recipe_of(tmp_path, kind="causal_lm", text="text")
    save_tokenizer(recipe, tiny.tokenizer(), tmp_path / "one")
    assert json.loads((tmp_path / "one/tokenizer_config.json").read_text())["model_max_length"] == 64
    assert json.loads((tmp_path / "one/tokenizer.json").read_text())["truncation"] is None
