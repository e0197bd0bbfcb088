"""Workers: what they return, whose fault stops whom, what a signal does, and which share of the machine each gets."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from support import errands

from distilpeft.errors import Crash, GateError, InputError, StoppedBySignal
from distilpeft.machine import host, processes


def spread(count, function, *arguments):
    console = Console(file=io.StringIO(), width=200)
    return processes.spread(count, function, arguments, console), console.file.getvalue()


def test_each_worker_has_its_number_and_its_share_of_processors(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found, said = spread(2, errands.environment, "OMP_NUM_THREADS")
    assert found == [(1, str(max(1, host.num_cpus() // 2))), (2, str(max(1, host.num_cpus() // 2)))]
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
        host.take_share(index, count)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == share
        assert os.environ["OMP_NUM_THREADS"] == "5", "the user's own number stays"


def test_gpus_that_the_driver_lists_are_shared_where_none_are_named(monkeypatch):
    monkeypatch.setattr(host, "gpu_names", lambda: ["H100", "H100"])
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    for index, share in ((0, "0"), (1, "1"), (2, "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "to be put back")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        host.take_share(index, 3)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == share


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("input", InputError, "bad row"),
        ("gate", GateError, "not finite"),
        ("bug", Crash, r"process 2 of 3: Traceback (.|\n)*KeyError: 'x'"),
    ],
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
    with pytest.raises(StoppedBySignal, match="run the same command to resume") as stopped:
        spread(2, errands.wait_for_a_signal, tmp_path)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is handler


def test_a_killed_worker_is_told_and_the_others_results_count():
    found, said = spread(3, errands.killed, [2])
    assert found == [1, 3]
    assert said.strip() == "worker 2 was killed (exit code -9); others take its work"


def test_ranks_know_each_other_and_the_first_one_answers(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    found = processes.joined(2, errands.meet, (tmp_path,), tmp_path / "logs")
    assert found == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": str(max(1, host.num_cpus() // 2)),
    }
    assert (tmp_path / "port-0").read_text() == (tmp_path / "port-1").read_text()
    assert "RANK" not in os.environ


def test_only_the_first_rank_prints_the_others_write_logs(tmp_path, capfd):
    processes.joined(2, errands.speak, (), tmp_path / "logs")
    assert capfd.readouterr().out.split() == ["rank", "0", "speaks"]
    assert (tmp_path / "logs" / "rank-1.log").read_text().split() == ["rank", "1", "speaks"]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("input", InputError, "bad row"), ("gate", GateError, "not finite"), ("bug", Crash, "process 2 of 3: Traceback")],
)
def test_the_first_fault_of_a_rank_is_the_one_that_is_told(tmp_path, kind, error, message):
    """The others only say that they have lost it."""
    with pytest.raises(error, match=message):
        processes.joined(3, errands.lose, (kind, tmp_path), tmp_path / "logs")


def test_a_killed_rank_is_told_and_the_others_stop_even_if_they_hear_no_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"process 2 of 2 was killed \(exit code -9; .*the others were stopped"):
        processes.joined(2, errands.hang, (tmp_path,), tmp_path / "logs")
    assert time.monotonic() - begin < 45
    assert not alive(int((tmp_path / "pid").read_text()))


def test_ranks_do_not_outlive_whoever_started_them(tmp_path):
    starter = multiprocessing.get_context("spawn").Process(target=errands.start_ranks, args=(tmp_path,))
    starter.start()
    pids = [int(wait_for(tmp_path / f"pid-{rank}")) for rank in (0, 1)]
    starter.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return file.read_text()


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("devices", "gpus", "visible", "rank", "expected"),
    [
        ("auto", 0, None, None, 1),
        ("auto", 8, None, None, 8),
        ("auto", 8, "2,3", None, 2),
        ("auto", 8, "", None, 1),
        ("cpu", 8, None, None, 1),
        (4, 8, None, None, 4),
        (4, 0, None, None, 4),
        ("auto", 8, None, "0", 1),
        (4, 0, None, "3", 1),
    ],
)
def test_the_devices_of_a_recipe_are_so_many_processes(monkeypatch, devices, gpus, visible, rank, expected):
    """Under torchrun, which has set RANK, nothing is started."""
    monkeypatch.setattr(host, "gpu_names", lambda: ["H100"] * gpus)
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("RANK", rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert host.num_processes(devices) == expected


def test_more_devices_than_there_are_is_a_mistake(monkeypatch):
    monkeypatch.setattr(host, "gpu_names", lambda: ["H100"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="devices: 2: this machine has 1 GPU"):
        host.num_processes(2)


def test_all_workers_killed_is_a_fault_that_says_what_to_do():
    with pytest.raises(InputError, match=r"all workers died \(exit codes -9, -9; .*fewer jobs"):
        spread(2, errands.killed, [1, 2])
