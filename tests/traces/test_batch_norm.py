"""BatchNorm over processes: N of them with micro-batches of M rows are one with N * M, and that is torch's layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import commands, norms
from torch import nn
from torch.nn import functional as F

from distilpeft.data.batches import epoch_batches
from distilpeft.errors import InputError
from distilpeft.machine.runtime import Runtime
from distilpeft.training import batch_norm

SCRIPT = Path(norms.__file__)


def reference(frozen: bool = False) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Loss and grad_norm of every step, and the final state, in float64 with torch's own layers, whole batches."""
    model, (inputs, labels) = norms.net().double().train(), norms.rows()
    if frozen:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.eval()
    trace = []
    for epoch in range(norms.EPOCHS):
        for batch in epoch_batches(np.ones(norms.ROWS, dtype=np.int32), norms.BATCH, 5, epoch):
            loss = F.cross_entropy(model(inputs[batch].double()), labels[batch])
            model.zero_grad()
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
            trace.append((loss.item(), norm.item()))
    return trace, dict(model.state_dict())


def trained(folder: Path, processes: int, **settings: object) -> dict:
    given = {"batch_norm": "sync", "parallel": "ddp", "num_processes": processes, **settings}
    if processes == 1:
        norms.main(given, folder / "out.json")
        return json.loads((folder / "out.json").read_text())
    return commands.run_script(SCRIPT, given, folder, processes)


def expect(found: dict, expected: tuple[list[tuple[float, float]], dict[str, torch.Tensor]]) -> None:
    trace, state = expected
    assert len(found["trace"]) == len(trace)
    for line, (loss, norm) in zip(found["trace"], trace, strict=True):
        assert (line["loss"], line["grad_norm"]) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
    for name, tensor in state.items():
        torch.testing.assert_close(torch.tensor(found["state"][name]).double(), tensor.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("processes", [2, 4])
def test_sync_over_processes_is_one_process_with_the_whole_batch(tmp_path, processes, parallel):
    """The last batch has 6 rows; with micro-batches of 1 it takes two, and in the second two processes are idle."""
    found = trained(tmp_path, processes, micro_batch_size=8 // processes, parallel=parallel)
    assert (found["kinds"], found["parallel"]) == (["SyncBatchNorm"], parallel)
    expect(found, reference())


def test_a_process_without_rows_gives_no_statistics(tmp_path, monkeypatch):
    """Batches of 5, the last one of 2 rows for 4 processes: two stand in with a row that must not count."""
    monkeypatch.setattr(norms, "BATCH", 5)
    found = trained(tmp_path, 4, micro_batch_size=4, batch_size=5)
    expect(found, reference())


def test_local_statistics_are_those_of_each_process_and_another_result(tmp_path):
    found = trained(tmp_path, 2, micro_batch_size=4, batch_norm="local")
    assert found["kinds"] == ["BatchNorm1d"]
    with pytest.raises(AssertionError):
        expect(found, reference())


@pytest.mark.parametrize("processes", [1, 2])
def test_frozen_statistics_do_not_depend_on_any_split(tmp_path, processes):
    found = trained(tmp_path, processes, micro_batch_size=3, batch_norm="frozen")
    assert found["kinds"] == ["FrozenBatchNorm"]
    expect(found, reference(frozen=True))


def test_what_is_not_trained_keeps_its_statistics(tmp_path):
    """An adapter is saved without them: the model that is loaded would be another one than was tuned."""
    found = trained(tmp_path, 1, micro_batch_size=8, frozen_affine=True)
    assert found["kinds"] == ["BatchNorm1d", "FrozenBatchNorm"]
    assert found["state"]["norm.running_mean"] == [0.0, 0.0]
    assert found["state"]["layers.0.1.running_mean"] != [0.0, 0.0, 0.0]


def test_statistics_come_back_with_a_checkpoint(tmp_path):
    found = trained(tmp_path, 1, micro_batch_size=8)
    assert (tmp_path / "checkpoints" / "step-00000006").is_dir()
    again = trained(tmp_path, 1, micro_batch_size=8)  # goes on from there: nothing is left to do
    assert again["state"] == found["state"]


def test_local_statistics_in_shards_are_refused(monkeypatch):
    monkeypatch.setattr(batch_norm.dist, "is_initialized", lambda: True)
    with pytest.raises(InputError, match=r"fit\.batch_norm: local is for parallel: ddp"):
        batch_norm.convert(Runtime(parallel="fsdp2"), norms.net(), "local")
