"""A run over two machines, as two network namespaces joined by a cable: torchrun, gloo, one shared folder.

The student of two hosts is that of one process; when one host is killed the other one stops with a line, and the same
commands go on from the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import commands

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

SGD = "{kind: sgd, lr: 0.05, schedule: constant}"  # AdamW would make more of differences in rounding
OVERRIDES = (
    "teacher.fit={epochs: 12, batch_size: 16, micro_batch_size: 8, precision: fp32, save_every: 5, keep: last}",
    f"teacher.optim={SGD}", f"distil.optim={SGD}", "distil.fit.keep=last", "teacher.gate=warn",
)  # fmt: skip
SETTINGS = tuple(part for override in OVERRIDES for part in ("--set", override))
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """(namespace, interface) of two hosts that see only each other."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    made = [(f"distilpeft-{os.getpid()}-{index}", f"dp{os.getpid() % 10000}-{index}") for index in (0, 1)]
    try:
        ip("link", "add", made[0][1], "type", "veth", "peer", "name", made[1][1])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        for (name, interface), address in zip(made, ADDRESSES, strict=True):
            ip("netns", "add", name)
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        for name, _ in made:
            kill(name)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def pids(name: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", name).split()]


def kill(name: str) -> None:
    """Everything that runs on a host, at once."""
    found = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True).stdout
    for pid in found.split():
        os.kill(int(pid), signal.SIGKILL)


def start(hosts: list[tuple[str, str]], recipe: Path, *settings: str) -> list[subprocess.Popen]:
    """The same command on both hosts, but for the host's number."""
    started = []
    for rank, (name, interface) in enumerate(hosts):
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
        torchrun += ["--master_addr", ADDRESSES[0], "--master_port", "29577"]
        arguments = commands.arguments_of(recipe, [*SETTINGS, "--until", "distil", *settings])[1:]
        source = str(commands.TESTS.parent / "src")
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
        with (recipe.parent / f"host{rank}.txt").open("w") as out:
            command = ["ip", "netns", "exec", name, sys.executable, *torchrun, "-m", "distilpeft", *arguments]
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
    return started


def said(recipe: Path) -> list[str]:
    return [(recipe.parent / f"host{rank}.txt").read_text() for rank in (0, 1)]


def made(recipe: Path, step: str):
    return make_plan(load_recipe(recipe, OVERRIDES), recipe.parent / "runs").artifacts[step]


def expect_same(recipe: Path, alone: Path) -> None:
    for step, file in (("teacher", "adapter/adapter_model.safetensors"), ("distil/student", "model/model.safetensors")):
        ours, theirs = made(recipe, step), made(alone, step)
        assert ours.manifest()["environment"]["num_processes"] == 2
        assert theirs.manifest()["environment"]["num_processes"] == 1
        traces = [
            [json.loads(line) for line in (one.path / "train_log.jsonl").read_text().splitlines()]
            for one in (ours, theirs)
        ]
        for here, there in zip(*traces, strict=True):
            assert (here["loss"], here["grad_norm"]) == pytest.approx((there["loss"], there["grad_norm"]), rel=1e-4)
        for name, tensor in load_file(theirs.path / file).items():
            torch.testing.assert_close(load_file(ours.path / file)[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_hosts_are_one_run_and_one_that_dies_stops_the_other_which_then_goes_on(hosts, tmp_path):
    for name in ("alone", "run"):
        (tmp_path / name).mkdir()
    alone, recipe = (commands.workspace(tmp_path / name, noise=0.2) for name in ("alone", "run"))
    assert commands.run_apart(alone, *SETTINGS, "--until", "distil").returncode == 0

    first, second = start(hosts, recipe)
    deadline = time.monotonic() + 120
    while not list(recipe.parent.glob("runs/tiny/teacher-*.partial/checkpoints/step-*[0-9]")):
        assert time.monotonic() < deadline, "\n".join(said(recipe))
        time.sleep(0.02)
    kill(hosts[1][0])
    begin = time.monotonic()
    assert first.wait(timeout=60) != 0
    took = time.monotonic() - begin
    second.wait(timeout=10)
    told = said(recipe)[0]
    sys.stdout.write(f"the other host stopped after {took:.1f} s and said:\n{told}\n")
    assert told.count("stopped: another process of this run has ended") == 1
    assert "distilpeft/train.py" not in told, "no traceback of ours"
    assert pids(hosts[0][0]) == [], "nobody is left"
    assert not made(recipe, "teacher").done

    again = start(hosts, recipe)
    assert [one.wait(timeout=180) for one in again] == [0, 0], "\n".join(said(recipe))
    assert "teacher: resuming after step " in said(recipe)[0]
    sys.stdout.write(f"then:\n{said(recipe)[0]}\n")
    expect_same(recipe, alone)


def test_machines_that_do_not_share_the_runs_folder_are_refused(tmp_path):
    recipe = commands.workspace(tmp_path)
    done = commands.apart(
        [
            (
                tmp_path / f"output{rank}.txt",
                ["distilpeft", "run", str(recipe), "--runs", str(tmp_path / f"runs{rank}")],
                "",
                environment,
            )
            for rank, environment in commands.ranked(2)
        ]
    )
    assert [one.returncode for one in done] == [2, 2]
    assert "1 of 2 processes do not see what the first one writes there" in done[0].output
    assert "Traceback" not in done[0].output + done[1].output
    assert not list(tmp_path.glob("runs*/tiny/.shared-*"))
