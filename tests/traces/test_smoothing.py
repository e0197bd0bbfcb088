"""Trap 31: with smoothed labels loss and grad_norm are the same for every split, for every kind of task.

A batch's padding is part of how it is split. Smoothed over columns that stand for it, the first loss of question
answering was 383,164 instead of 1.116, and another one for every micro-batch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import commands, pupils
from support.pupils import KINDS, LR, SMOOTHING, UNSMOOTHED, Pupil, Trace, trace

from distilpeft.data.batches import epoch_batches
from distilpeft.distillation.losses import Loss
from distilpeft.machine.runtime import Runtime

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoothing")
    for kind in KINDS:
        pupils.workspace(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def whole(workspaces) -> dict[str, Trace]:
    """The traces of whole batches in one process."""
    return pupils.whole_traces(workspaces, KINDS)


@pytest.mark.parametrize("optimizer", list(LR))
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_and_accumulation_do_not_matter(workspaces, whole, kind, optimizer):
    pupils.expect_same(
        trace(Runtime(), workspaces / kind / "tiny.yaml", 3, optimizer), whole[f"{kind} {optimizer}"], kind
    )


def test_two_processes_are_one_for_every_kind(workspaces, whole, tmp_path):
    settings = {"folder": str(workspaces), "kinds": KINDS, "micro_batch_size": 3, "num_processes": 2}
    found = commands.run_script(Path(pupils.__file__), settings, tmp_path, 2)
    assert {f"{kind} sgd" for kind in KINDS} | {"question_answering adamw", "causal_lm adamw"} == found.keys()
    for name, made in found.items():
        pupils.expect_same(made, whole[name], name)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNSMOOTHED])
def test_smoothing_moves_the_first_loss_a_little_and_is_at_work(workspaces, whole, kind):
    """Not by a hundred thousand: 5 % of a cross-entropy go from the label to the mean over what can be one."""
    pupil = Pupil(Runtime(), workspaces / kind / "tiny.yaml")
    assert pupil.loss.label_smoothing == SMOOTHING
    first = epoch_batches(pupil.lengths_N, pupils.BATCH, pupils.SEED, 0)[0]
    batch = pupil.rows.load_batch(first)
    pupil.loss = Loss(pupil.loss.alpha, pupil.loss.temperature)
    with torch.no_grad():
        plain = float(pupil.loss_sum(pupil.student.train(), batch)) / pupil.task.count_rows(batch)
    smoothed = whole[f"{kind} sgd"][0][0]
    assert smoothed == pytest.approx(plain, rel=0.1)
    assert smoothed != pytest.approx(plain, rel=1e-6)
