"""`distilpeft selftest`: the proof that users can run, and that it would find what it is there to find."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from rich.console import Console

from distilpeft import cli
from distilpeft.tasks.language.causal_lm import CausalLMTask
from distilpeft.training import selftest


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outcome(*arguments: str) -> int:
    with mock.patch.object(sys, "argv", ["distilpeft", "selftest", *arguments]):
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0


@pytest.mark.thorough
def test_every_split_on_one_and_two_processes_is_the_float64_full_batch(capsys):
    assert outcome() == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "24 of 24 splits are right" in printed
    assert printed.count(" ok") == 24


def few(monkeypatch) -> None:
    monkeypatch.setattr(selftest, "MICRO_BATCH_SIZES", (3,))


def wrong(capsys) -> bool:
    code = outcome("--processes", "1")
    return code == 1 and "WRONG" in capsys.readouterr().out


def test_a_mean_of_means_is_found(monkeypatch, capsys):
    """Trap 3."""
    few(monkeypatch)
    plain = CausalLMTask.loss_sum

    def mean(task, model, batch, *how):
        return plain(task, model, batch, *how) / max(1, task.count_rows(batch)) * 8

    monkeypatch.setattr(CausalLMTask, "loss_sum", mean)
    assert wrong(capsys)


def test_a_mask_that_is_not_shifted_with_the_labels_is_found(monkeypatch, capsys):
    """Trap 7."""
    few(monkeypatch)
    plain = CausalLMTask.collate

    def unshifted(task, rows, tokenizer):
        batch = plain(task, rows, tokenizer)
        return {**batch, "at_N": batch["at_N"] + 1}

    monkeypatch.setattr(CausalLMTask, "collate", unshifted)
    assert wrong(capsys)


def test_attention_across_packed_documents_is_found(monkeypatch, capsys):
    few(monkeypatch)
    plain = CausalLMTask.collate

    def leaking(task, rows, tokenizer):
        batch = plain(task, rows, tokenizer)
        ids = batch["inputs"]["input_ids"]
        return {**batch, "inputs": {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}}

    monkeypatch.setattr(CausalLMTask, "collate", leaking)
    assert wrong(capsys)


def test_a_missing_temperature_squared_is_found(monkeypatch, capsys):
    """Trap 6."""
    few(monkeypatch)
    plain = CausalLMTask.loss_sum
    monkeypatch.setattr(
        CausalLMTask, "loss_sum",
        lambda task, *given: plain(task, *given) / selftest.LOSS.temperature**2,
    )  # fmt: skip
    assert wrong(capsys)


def test_a_nan_is_not_taken_for_a_pass():
    assert not selftest.Split(1, 1, "sgd", float("nan"), 0.0).good
    assert not selftest.Split(1, 1, "sgd", 0.0, float("nan")).good


def test_the_reference_is_in_float64_through_and_through():
    trace = selftest.reference("sgd")
    student, _ = selftest.models()
    assert any(float(torch.tensor(loss, dtype=torch.float32)) != loss for loss, _ in trace)
    outputs = student.double()(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert all(states.dtype == torch.float64 for states in (*outputs.hidden_states, outputs.logits))


def test_processes_that_cannot_start_are_an_error_not_a_pass(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(selftest.GateError, match="2 processes could not run"):
        selftest.run([2], Console(quiet=True))
