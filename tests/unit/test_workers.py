"""Workers: what they return, whose fault stops whom, what a signal does, and which share of the machine each gets."""

from __future__ import annotations

import io
import os
import signal
import threading
import time

import errands
import pytest
from rich.console import Console

from distilpeft import machine, workers
from distilpeft.errors import GateError, InputError, StoppedBySignal


def spread(count, function, *arguments):
    console = Console(file=io.StringIO(), width=200)
    return workers.spread(count, function, arguments, console), console.file.getvalue()


def test_each_worker_has_its_number_and_its_share_of_processors(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found, said = spread(2, errands.environment, "OMP_NUM_THREADS")
    assert found == [(1, str(max(1, machine.num_cpus() // 2))), (2, str(max(1, machine.num_cpus() // 2)))]
    assert said == ""
    assert "OMP_NUM_THREADS" not in os.environ, "the first process keeps all"


@pytest.mark.parametrize(
    ("visible", "count", "shares"),
    [("0,1", 2, ["0", "1"]), ("3", 2, ["3", "3"]), ("GPU-a,GPU-b,GPU-c", 2, ["GPU-a", "GPU-b"]), ("", 1, [""])],
)
def test_each_worker_has_one_gpu_of_those_that_are_visible(monkeypatch, visible, count, shares):
    for index, share in enumerate(shares):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        machine.take_share(index, count)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == share
        assert os.environ["OMP_NUM_THREADS"] == "5", "the user's own number stays"


def test_gpus_that_the_driver_lists_are_shared_where_none_are_named(monkeypatch):
    monkeypatch.setattr(machine, "gpu_names", lambda: ["H100", "H100"])
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    for index, share in ((0, "0"), (1, "1"), (2, "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "to be put back")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        machine.take_share(index, 3)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == share


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("input", InputError, "bad row"), ("gate", GateError, "not finite"), ("bug", RuntimeError, "worker 2 has a bug")],
)
def test_the_first_fault_stops_the_others_and_is_raised(tmp_path, kind, error, message):
    with pytest.raises(error, match=message):
        spread(3, errands.fault, kind, tmp_path)
    assert {"stopped-1", "stopped-3"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_ends_in_its_exit_code(tmp_path, number, code):
    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(StoppedBySignal, match="the same command goes on") as stopped:
        spread(2, errands.wait_for_a_signal, tmp_path)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is handler


def test_a_killed_worker_is_told_and_the_others_results_count():
    found, said = spread(3, errands.killed, [2])
    assert found == [1, 3]
    assert said.strip() == "worker 2 was killed (exit code -9); others take its work"


def test_all_workers_killed_is_a_fault_that_says_what_to_do():
    with pytest.raises(InputError, match=r"all workers died \(exit codes -9, -9; .*fewer jobs"):
        spread(2, errands.killed, [1, 2])
