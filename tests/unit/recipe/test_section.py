"""What every section of a recipe is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilpeft.errors import InputError
from distilpeft.recipe.yaml_file import load_recipe

RECIPE = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tracking=[tensorboard, tensorboard]", "tracking: the trackers must differ"),
        ("task.labels=[a, b, a]", "task.labels: the class names must differ"),
        ("targets.temperatures=[1, 2, 1]", "targets: the temperatures must differ"),
        ("evaluate.seeds=[1, 1]", "evaluate.seeds: the seeds must differ"),
        ("benchmark.devices=[cpu, cpu]", "benchmark.devices: the values must differ"),
        ("benchmark.threads=[1, 1]", "benchmark.threads: the values must differ"),
        ("benchmark.lengths=[data, 8, data]", "benchmark.lengths: the values must differ"),
        ("export.formats=[gguf, gguf-f16]", "export.formats: the formats must differ"),
    ],
)
def test_a_list_that_holds_a_value_twice_is_refused_at_its_key(change, message):
    with pytest.raises(InputError, match=message):
        load_recipe(RECIPE, [change])


def test_no_list_holds_nothing_twice():
    assert load_recipe(RECIPE, ["benchmark.threads=null"]).benchmark.threads is None
