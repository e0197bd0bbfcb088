"""What refactoring must leave equal: see tests/golden/make.py."""

from __future__ import annotations

import json

import pytest
from golden import make


@pytest.fixture(scope="module")
def made():
    return make.runs_apart()


def test_every_shipped_recipe_leads_to_the_same_artifact_keys():
    assert make.differences(json.loads(make.PLANS.read_text()), make.plans()) == []


def test_a_tiny_run_of_every_task_leaves_the_same_files_byte_for_byte(made):
    golden = json.loads(make.RUNS.read_text())
    if golden["made_with"] != made["made_with"]:
        pytest.skip(f"made elsewhere: {make.differences(golden['made_with'], made['made_with'])}")
    assert make.differences(make.exact(golden["runs"]), make.exact(made["runs"])) == []


def test_a_tiny_run_of_every_task_has_the_same_losses_scores_and_weights_within_a_percent(made):
    assert make.far_apart(json.loads(make.RUNS.read_text())["runs"], made["runs"]) == []
