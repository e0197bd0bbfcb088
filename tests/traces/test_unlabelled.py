"""Trap 35: rows without a label change neither the labels' weight nor the trajectory, however they are split.

A divergence over all rows and a cross-entropy over those with a label, each a sum that is divided once by its own count
over the whole batch, for every kind of task that has labels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import commands, pupils
from support.pupils import LR, Pupil, Trace, trace

from distilpeft.data.batches import epoch_batches
from distilpeft.distillation.losses import Loss
from distilpeft.machine.runtime import Runtime

KINDS = tuple(kind for kind in pupils.KINDS if kind != "embedding")
LABELLED = 12  # of the first 30 rows; seq2seq and language models encode one row as one


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    for kind in KINDS:
        pupils.workspace(folder / kind, kind, labelled=LABELLED)
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


@pytest.mark.thorough
def test_two_processes_are_one_for_every_kind(workspaces, whole, tmp_path):
    settings = {"folder": str(workspaces), "kinds": KINDS, "micro_batch_size": 3, "num_processes": 2}
    found = commands.run_script(Path(pupils.__file__), settings, tmp_path, 2)
    assert {f"{kind} sgd" for kind in KINDS} <= found.keys()
    for name, made in found.items():
        pupils.expect_same(made, whole[name], name)


def mixed_batch(pupil: Pupil) -> np.ndarray:
    batches = epoch_batches(pupil.lengths_N, pupils.BATCH, pupils.SEED, 0)
    return next(batch for batch in batches if 0 < (batch < pupil.rows.num_labelled).sum() < len(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_is_divided_once_by_its_own_count(workspaces, whole, kind):
    """By two sums of the task itself: the divergence of every row, and the cross-entropy of rows that have a label."""
    pupil = Pupil(Runtime(), workspaces / kind / "tiny.yaml")
    pupil.student.eval()  # as BatchNorms are frozen in the traces
    batches = epoch_batches(pupil.lengths_N, pupils.BATCH, pupils.SEED, 0)
    assert whole[f"{kind} sgd"][0][0] == pytest.approx(total(pupil, batches[0]), rel=2e-5)


@torch.no_grad()
def total(pupil: Pupil, ids: np.ndarray) -> float:
    """The loss of a batch, put together from parts."""
    loss, task, counts, sums = pupil.loss, pupil.task, {}, {}
    groups = {"labelled": ids[ids < pupil.rows.num_labelled], "unlabelled": ids[ids >= pupil.rows.num_labelled]}
    for name, rows in groups.items():
        counts[name] = sums[name] = sums[f"{name} labels"] = 0.0
        if len(rows):
            batch = pupil.rows.load_batch(rows)
            for key in ("labelled_L", "unlabelled_U"):
                del batch[key]
            soft = task.soft(pupil.teacher, batch)
            counts[name] = task.count_rows(batch)
            sums[name] = float(task.loss_sum(pupil.student, batch, replace(loss, alpha=1.0), soft))
            sums[f"{name} labels"] = float(task.loss_sum(pupil.student, batch, Loss(), None))
    every = counts["labelled"] + counts["unlabelled"]
    divergence = (sums["labelled"] + pupils.UNLABELLED_WEIGHT * sums["unlabelled"]) / every
    return loss.alpha * divergence + (1 - loss.alpha) * sums["labelled labels"] / max(counts["labelled"], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_any_label_teaches_what_the_teacher_knows(workspaces, kind):
    pupil = Pupil(Runtime(), workspaces / kind / "tiny.yaml")
    pupil.student.eval()  # as BatchNorms are frozen in the traces
    ids = np.arange(pupil.rows.num_labelled, pupil.rows.num_labelled + 4)
    batch = pupil.rows.load_batch(ids)
    assert pupil.task.count_labelled(batch) == 0
    loss = pupil.loss_sum(pupil.student, batch) / pupil.task.count_rows(batch)
    loss.backward()
    assert loss.item() == pytest.approx(total(pupil, ids), rel=2e-5)
    gradients = [p.grad for p in pupil.student.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("causal_lm", "seq2seq")])
def test_no_label_of_a_row_without_one_can_leak_into_the_loss(workspaces, kind):
    """What stands where the label would be is changed to something else: nothing changes."""
    pupil = Pupil(Runtime(), workspaces / kind / "tiny.yaml")
    batch = pupil.rows.load_batch(mixed_batch(pupil))
    with torch.no_grad():
        before = float(pupil.loss_sum(pupil.student, batch))
        flat = batch["labels_N"].reshape(-1)
        flat[batch["unlabelled_U"]] = 1
        after = float(pupil.loss_sum(pupil.student, batch))
        flat[batch["labelled_L"]] = (flat[batch["labelled_L"]] + 1) % 2
        other = float(pupil.loss_sum(pupil.student, batch))
    assert after == before
    assert other != before
