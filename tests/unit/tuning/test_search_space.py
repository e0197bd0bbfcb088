"""What a search may choose from: how it is read, what is refused, what names it, which values are the recipe's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import commands

from distilpeft.errors import InputError
from distilpeft.tuning import search_space
from distilpeft.tuning.search_space import Range


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return commands.workspace(tmp_path_factory.mktemp("space"), distil__fit__max_steps=10)


def make(recipe, *ranges, over=(), overrides=(), trials=5):
    return search_space.make(recipe, ranges, over, overrides, recipe.parent / "runs", trials)


def test_ranges_are_read_as_the_recipe_reads_numbers(recipe):
    found = make(
        recipe, "distil.optim.lr=2e-5..1e-3:log", "distil.fit.batch_size=8..32", "distil.temperature=1..8",
        "distil.fit.validate_every=2..5", over=["student.from_teacher.layers=[0],[1]"],
    ).space  # fmt: skip
    assert found == {
        "distil.optim.lr": Range(2e-5, 1e-3, log=True, whole=False),
        "distil.fit.batch_size": Range(8, 32, log=False, whole=True),
        "distil.temperature": Range(1, 8, log=False, whole=False),
        "distil.fit.validate_every": Range(2, 5, log=False, whole=True),
        "student.from_teacher.layers": ([0], [1]),
    }


@pytest.mark.parametrize(
    ("ranges", "over", "message"),
    [
        (["distil.alpha"], [], "--search distil.alpha: write it as key=low..high"),
        (["distil.alpha=0.1"], [], "write it as key=low..high"),
        (["distil.alpha=0.1.."], [], "write it as key=low..high"),
        (["=0..1"], [], "write it as key=low..high"),
        (["distil.alpha=0.1..0.9:lin"], [], "write it as key=low..high"),
        (["distil.alpha=low..high"], [], "both ends have to be numbers"),
        (["distil.alpha=0.1,0.2..0.9"], [], "both ends have to be numbers"),
        (["distil.alpha=false..true"], [], "both ends have to be numbers"),
        (["distil.alpha=0.9..0.1"], [], "the first number has to be the smaller one"),
        (["distil.alpha=0.5..0.5"], [], "the first number has to be the smaller one"),
        (["distil.optim.lr=0..1e-3:log"], [], "a logarithmic range begins above 0"),
        (["distil.fit.batch_size=8..32.5"], [], "is a whole number"),
        (["distil.alpha=0.1..1.5"], [], "--search, at distil.alpha=1.5: "),
        (["distil.alhpa=0.1..1"], [], "did you mean distil.alpha"),
        (["distil.alpha=0.1..0.9", "distil.alpha=0.2..0.9"], [], "a key is given twice"),
        (["distil.alpha=0.1..0.9"], ["distil.alpha=0.1,0.2"], "a key is given twice"),
        (["distil.alpha=0.1..0.9"], ["name=a,b"], "share one folder"),
        (["distil.alpha=0.1..0.9"], ["distil.fit.monitor=accuracy,log_loss"], "cannot be compared"),
        (["benchmark.rounds=3..9"], [], "trains the same student as at benchmark.rounds=3"),
        (["distil.alpha=0.1..0.9"], ["student.from_teacher.layers=[0],[9]"], "layer 9 does not exist"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(recipe, ranges, over, message):
    with pytest.raises(InputError) as refused:
        make(recipe, *ranges, over=over)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (recipe.parent / "runs").exists()


def test_a_search_is_named_by_its_space_and_by_what_its_students_depend_on(recipe):
    one = make(recipe, "distil.alpha=0.1..0.9")
    assert make(recipe, "distil.alpha=0.1..0.9", trials=50).key == one.key, "more trials go on with it"
    assert make(recipe, "distil.alpha=0.1..0.9", overrides=["benchmark.rounds=7"]).key == one.key
    others = [
        make(recipe, "distil.alpha=0.1..0.8"),
        make(recipe, "distil.alpha=0.1..0.9:log"),
        make(recipe, "distil.alpha=0.1..0.9", over=["distil.temperature=1,2"]),
        make(recipe, "distil.alpha=0.1..0.9", overrides=["distil.fit.epochs=1"]),
        make(recipe, "distil.alpha=0.1..0.9", overrides=["teacher.lora.rank=2"]),
        make(recipe, "distil.alpha=0.1..0.9", overrides=["distil.fit.monitor=log_loss"]),
    ]
    assert len({one.key, *(other.key for other in others)}) == 1 + len(others)


def test_the_recipes_own_values_are_known_where_the_space_has_them(recipe):
    def own(*ranges, over=()):
        return search_space.own_values(make(recipe, *ranges, over=over))

    assert own("distil.optim.lr=1e-3..1e-2", over=["distil.temperature=1,2"]) == {
        "distil.optim.lr": 0.005, "distil.temperature": 2,
    }  # fmt: skip
    assert own("distil.optim.lr=1e-3..2e-3") is None
    assert own("distil.optim.lr=1e-3..1e-2", over=["distil.temperature=1,4"]) is None
    assert own("distil.fit.validate_every=1..3") is None, "the recipe has none"


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    return commands.language_workspace(tmp_path_factory.mktemp("language"), mode="cached", format="sampled")


def test_targets_that_serve_listed_temperatures_only_are_not_made_anew_for_every_trial(language):
    with pytest.raises(InputError, match=r"use --over distil.temperature=1,2,4 or --set targets.format=full"):
        make(language, "distil.temperature=1..4")
    make(language, "distil.temperature=1..4", overrides=["targets.format=full"])
    chosen = make(language, "distil.optim.lr=1e-4..1e-3", over=["distil.temperature=1,4"])
    plans = [chosen.plan({"distil.optim.lr": 2e-4, "distil.temperature": one}) for one in (1, 4)]
    assert len({plan.artifacts["targets"].key for plan in plans}) == 1
    assert len({plan.artifacts["distil/student"].key for plan in plans}) == 2
