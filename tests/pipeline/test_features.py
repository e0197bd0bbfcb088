"""Inner terms in whole trainings: equal over splits, no part of what is saved, and refused where they cannot be."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open
from support import commands, equality, tiny

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

FEATURES = {"hidden": {"weight": 0.5}, "relations": {"weight": 2.0, "heads": 2}}
ONLINE = {"mode": "online", "precision": "fp32"}
WAYS = ((1, []), (1, ["distil.fit.micro_batch_size=3"]), (2, ["distil.fit.micro_batch_size=3"]))


def workspace(folder, **changes):
    """A student of half its teacher's width, so that there are matrices between."""
    tiny.save_model(folder / "small", hidden_size=32)
    settings = {
        **equality.EXACT, "targets": ONLINE, "distil__features": FEATURES, "student": {"model": str(folder / "small")}
    }  # fmt: skip
    return commands.workspace(folder, **{**settings, **changes})


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.thorough
def test_every_split_ends_in_the_same_student(tmp_path, parallel):
    ways = WAYS if parallel == "ddp" else (WAYS[0], WAYS[2])
    recipe = workspace(tmp_path, parallel=parallel, distil__optim={"kind": "sgd", "lr": 0.02})
    equality.assert_splits_are_equal(recipe, ways, first="teacher")
    made = make_plan(load_recipe(recipe), tmp_path / "runs0").artifacts["distil/student"]
    with safe_open(made.path / "model/model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "projection" in name]  # noqa: SIM118


@pytest.mark.thorough
def test_the_terms_change_the_student_and_not_the_baseline(tmp_path):
    recipe = workspace(tmp_path)
    found = []
    for settings in ([], ["distil.features=null"], ["distil.features={hidden: {weight: 2}}"]):
        assert commands.run(recipe, "--until", "distil", *(p for one in settings for p in ("--set", one))) == 0
        plan = make_plan(load_recipe(recipe, tuple(settings)), tmp_path / "runs")
        found.append({role: plan.artifacts[f"distil/{role}"] for role in ("student", "student_ce_only")})
    start = found[0]["student"].figures()["start"]
    assert start == {"from": str(tmp_path / "small"), "new_weights": ["classifier.bias", "classifier.weight"]}
    assert len({one["student"].key for one in found}) == 3
    assert len({one["student_ce_only"].key for one in found}) == 1
    logs = [
        [json.loads(line)["loss"] for line in (one["student"].path / "train_log.jsonl").read_text().splitlines()]
        for one in found
    ]
    assert logs[0][0] > logs[1][0]
    assert logs[2][0] > logs[1][0]
    # the term itself falls: the same rows come first in every run
    assert logs[2][-1] - logs[1][-1] < logs[2][0] - logs[1][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": {"precision": "fp32"}}, "distil.features: is learnt from the running teacher: set targets.mode"),
        ({"student__gradient_checkpointing": True}, "does not go with student.gradient_checkpointing"),
        ({"distil__features": {}}, "distil.features: give hidden, relations, or both"),
        ({"distil__features": {"hidden": {"layers": {7: 0}}}}, "layer 7 does not exist; the student has 0..1"),
        ({"distil__features": {"relations": {"heads": 5}}}, "5 heads do not divide the student's width, 32"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_trained(tmp_path, capsys, changes, message):
    recipe = workspace(tmp_path, **changes)
    assert commands.run(recipe, "--until", "distil") == 2
    told = capsys.readouterr()
    assert message in told.err + told.out
    assert not list((tmp_path / "runs").glob("tiny/teacher-*/manifest.json"))
