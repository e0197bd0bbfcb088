"""How differences in a metric are written."""

from __future__ import annotations

import pytest

from distilpeft.recipe.task import gap, gap_unit


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("accuracy", 0.0123, "+1.23 points"),
        ("accuracy", -0.00004, "0.00 points"),
        ("macro_f1", -0.00006, "-0.01 points"),
        ("nats_per_token", 0.5, "+0.5000 nats"),
        ("log_loss", -0.00001, "0.0000"),
    ],
)
def test_shares_differ_by_points_and_what_rounds_to_zero_has_no_sign(metric, value, shown):
    assert gap(metric, value) + gap_unit(metric) == shown
