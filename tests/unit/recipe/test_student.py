"""The recipe's `student.vocabulary`: what it takes, and what it cannot go with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support import tiny, tiny_lm

from distilpeft.errors import InputError
from distilpeft.recipe import Recipe
from distilpeft.recipe.recipe import result_settings
from distilpeft.recipe.yaml_file import load_recipe

CUT = {"student__vocabulary": {"from": "data"}}


def load(folder: Path, tree: dict) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path)


def test_a_cut_vocabulary_is_in_keys_only_where_it_is_asked_for_and_survives_a_round_trip(tmp_path):
    plain, cut = (load(tmp_path, tiny.recipe_tree(tmp_path, **more)) for more in ({}, CUT))
    assert "vocabulary" not in result_settings(plain.student)
    assert result_settings(cut.student)["vocabulary"] == {"from": "data", "min_count": 1, "max_size": None}
    assert Recipe.model_validate(cut.model_dump(mode="json", exclude_unset=True)) == cut


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"student__vocabulary": {"min_count": 2}}, "student.vocabulary.from: field required"),
        ({"student__vocabulary": {"from": "text"}}, "student.vocabulary.from: input should be 'data'"),
        ({"student__vocabulary": {"from": "data", "min_count": 0}}, "student.vocabulary.min_count"),
        ({"student": {"from_config": {"model": "x"}, "vocabulary": {"from": "data"}}}, "is for pretrained students"),
        (
            {**CUT, "targets": {"mode": "online"}, "distil__features": {"hidden": {"weight": 1}}},
            "student.vocabulary: does not go with distil.features",
        ),
    ],
)
def test_what_it_cannot_be_is_refused_in_one_line(tmp_path, changes, fault):
    with pytest.raises(InputError, match=fault):
        load(tmp_path, tiny.recipe_tree(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"student__vocabulary": {"from": "data", "min_count": 2}},
            "student.vocabulary.min_count: causal_lm is taught",
        ),
        (
            {"student__vocabulary": {"from": "data", "max_size": 400}},
            "student.vocabulary.max_size: causal_lm is taught",
        ),
        ({**CUT, "task": {"kind": "causal_lm", "text": "text"}}, "goes with pairs and chats without pack"),
        ({**CUT, "targets": {"source": "elsewhere"}}, "targets.source: holds soft targets over all tokens"),
        ({**CUT, "task": {"kind": "seq2seq", "source": "a", "target": "b"}}, "is not for seq2seq"),
    ],
)
def test_language_models_keep_the_tokens_of_their_rows(tmp_path, changes, fault):
    load(tmp_path, tiny_lm.recipe_tree(tmp_path, **CUT))
    with pytest.raises(InputError, match=fault):
        load(tmp_path, tiny_lm.recipe_tree(tmp_path, **changes))
