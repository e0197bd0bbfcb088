"""Runs that are broken on purpose, as `python tests/faults.py` breaks more of them; nothing is lost, nothing silent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import commands, inputs
from support.cases import Found

from distilpeft.distillation.store import SoftTargets
from distilpeft.machine.artifact import MANIFEST
from distilpeft.machine.files import digest_file, read_sealed, sealed
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe


def told(found: Found) -> str:
    return "\n".join(f"{case.what}: {case.outcome} {case.fault}" for case in found.failed)


@pytest.fixture
def _home(tmp_path, monkeypatch):
    """A cache of the test's own: its files are spoilt."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.mark.usefixtures("_home")
@pytest.mark.thorough
def test_a_bit_that_flipped_is_found_before_it_is_used_whatever_file_it_is_in(tmp_path):
    found = Found("flips", seed=5)
    faults.flips(faults.tiny(tmp_path), found, 12)
    assert not found.failed, told(found)


@pytest.mark.slow
@pytest.mark.usefixtures("_home")
def test_a_run_of_pretrained_models_that_is_killed_anywhere_ends_in_the_same_bytes(tmp_path):
    found = Found("kills", seed=2)
    faults.kills(faults.real(tmp_path), found, 25)
    assert not found.failed, told(found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_disk_that_is_full_anywhere_ends_in_one_line_and_the_same_command_goes_on(tmp_path):
    """In a process of its own: the library that fills the disk has to be there when it starts."""
    command = [sys.executable, str(Path(faults.__file__)), "full", "--count", "25", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.thorough
def test_generated_bad_input_is_refused_with_one_located_line(tmp_path):
    found = Found("inputs", seed=4)
    inputs.run(found, 150, tmp_path, ("recipe", "text", "set", "data", "rows"))
    assert not found.failed, told(found)
    assert sum(case.outcome == "refused" for case in found.cases) > 100


@pytest.mark.slow
def test_spoilt_folders_of_runs_are_refused_with_one_located_line(tmp_path):
    found = Found("inputs", seed=4)
    inputs.run(found, 400, tmp_path, ("run",))
    assert not found.failed, told(found)


def spoil_adapter(recipe: Path) -> None:
    """Put NaN into the tuned teacher, and the manifest with it: as if it had been saved so."""
    made = make_plan(load_recipe(recipe), recipe.parent / "runs").artifacts["teacher"]
    file = made.path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, file)
    manifest = read_sealed(made.path / MANIFEST, "")
    manifest["files"]["adapter/adapter_model.safetensors"] = {
        "bytes": file.stat().st_size, "sha256": digest_file(file),
    }  # fmt: skip
    (made.path / MANIFEST).write_text(json.dumps(sealed(manifest)))


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_teacher_that_turned_nan_after_tuning_stops_the_run_before_distilling(tmp_path, mode, capfd):
    recipe = commands.workspace(tmp_path, targets={"mode": mode, "precision": "fp32"})
    assert commands.run(recipe, "--until", "teacher") == 0
    spoil_adapter(recipe)
    assert commands.run(recipe, "--until", "distil") == 3
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("stopped: ")
    assert "not finite" in error
    plan = make_plan(load_recipe(recipe), tmp_path / "runs")
    assert not plan.artifacts["distil/student"].done


def test_one_row_of_which_the_teacher_says_nan_is_named(tmp_path, capfd, monkeypatch):
    from distilpeft.tasks.text_classification import TextClassificationTask

    recipe = commands.workspace(tmp_path)
    soft = TextClassificationTask.soft

    def spoilt(task, model, batch):
        logits = soft(task, model, batch).clone()
        logits[torch.as_tensor(np.asarray(batch["row_ids_N"]) == 37)] = float("nan")
        return logits

    monkeypatch.setattr(TextClassificationTask, "soft", spoilt)
    assert commands.run(recipe, "--until", "targets") == 3
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error == "stopped: targets: the teacher's logits are not finite for row 37; see teacher.gate"


def test_bad_rows_are_left_out_counted_and_told_in_the_report(tmp_path, capfd):
    recipe = commands.workspace(tmp_path)
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    lines[5], lines[9] = ",1", "a fine film,splendid"
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    capfd.readouterr()
    assert commands.run(recipe) == 2
    assert "row 5: column 'text' holds no text (2 bad rows of 200: 5, 9)" in capfd.readouterr().err
    skip = ("--set", "data.on_bad_row=skip")
    assert commands.run(recipe, *skip, verb="check") == 0
    assert "2 rows of" in capfd.readouterr().out
    assert commands.run(recipe, *skip) == 0
    report = read_sealed(tmp_path / "runs" / "tiny" / "report.json", "")
    assert list(report["rows"]["skipped"].values()) == [2]
    assert "could not be used and were left out" in (tmp_path / "runs" / "tiny" / "report.md").read_text()
    stored = SoftTargets(make_plan(load_recipe(recipe, skip[1:]), tmp_path / "runs").artifacts["targets"].path)
    assert len(stored.positions_R) == round(0.6 * 198)


@pytest.mark.thorough
def test_a_clock_that_goes_backwards_changes_nothing(tmp_path):
    recipe = commands.workspace(tmp_path)
    assert commands.run_apart(recipe, "--until", "teacher").returncode == 0
    bench = faults.Bench(recipe, [], tmp_path)
    wanted = bench.files(tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "before")
    backwards = "import time\nnow = [2e9]\ntime.time = lambda: now.append(now.pop() - 100.0) or now[0]"
    done = commands.run_apart(recipe, "--until", "teacher", before=backwards)
    assert done.returncode == 0, done.output
    assert bench.files(tmp_path / "runs") == wanted


def test_deterministic_runs_are_equal_bit_for_bit_and_have_keys_of_their_own(tmp_path):
    recipe = commands.workspace(tmp_path, teacher__lora__dropout=0.1, deterministic=True)
    bench, found = faults.Bench(recipe, [], tmp_path), []
    for _ in range(2):
        done = commands.run_apart(recipe, "--until", "targets")
        assert done.returncode == 0, done.output
        found.append(bench.files(tmp_path / "runs"))
        shutil.rmtree(tmp_path / "runs")
    assert found[0] == found[1]
    loose = make_plan(load_recipe(recipe, ["deterministic=false"]), tmp_path / "runs")
    assert not {made.path.name for made in loose.artifacts.values()} & {name.partition("/")[0] for name in found[0]}


def test_an_operation_without_a_deterministic_form_stops_the_run_with_its_name(tmp_path):
    recipe = commands.workspace(tmp_path, deterministic=True)
    before = """
import torch
from distilpeft.tasks.text_classification import TextClassificationTask
def spoilt(*given):
    assert torch.are_deterministic_algorithms_enabled()
    raise RuntimeError("some_kernel_cuda does not have a deterministic implementation, but you set ...")
TextClassificationTask.loss_sum = spoilt
"""
    done = commands.run_apart(recipe, "--until", "teacher", before=before)
    assert done.returncode == 2, done.output
    assert "error: deterministic: some_kernel_cuda has no such form on this device; leave it out" in done.output


def test_check_says_what_deterministic_does_not_promise(tmp_path, capfd):
    recipe = commands.workspace(tmp_path)
    assert commands.run(recipe, "--set", "deterministic=true", "--set", "distil.fit.compile=true", verb="check") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "deterministic: the same weights, bit for bit" in said
    assert "bitsandbytes promises nothing of its nf4 kernels" in said
    assert "fit.compile gives the same only from the same cache" in said


def test_a_model_file_that_is_cut_short_is_named(tmp_path, capfd):
    recipe = commands.workspace(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    capfd.readouterr()
    assert commands.run(recipe) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert f"{file}: not a readable safetensors file" in error[0]


def test_a_read_only_folder_is_one_line_and_nothing_is_written(tmp_path):
    """Root may write anywhere, so the folder is mounted read-only, in a namespace of its own."""
    probe = (
        subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True)
        if shutil.which("unshare")
        else None
    )
    if probe is None or probe.returncode != 0:
        pytest.skip("this system has no mount namespaces for users")
    recipe = commands.workspace(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    mounted = f"""
import ctypes, os
from pathlib import Path
ids = os.getuid(), os.getgid()
libc, runs = ctypes.CDLL(None, use_errno=True), {os.fsencode(runs)!r}
assert libc.unshare(0x10020000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWUSER, CLONE_NEWNS
for name, line in (("setgroups", "deny"), ("uid_map", f"0 {{ids[0]}} 1"), ("gid_map", f"0 {{ids[1]}} 1")):
    Path("/proc/self", name).write_text(line)
for flags in (4096, 4096 | 32 | 1):  # MS_BIND; MS_REMOUNT, MS_RDONLY
    assert libc.mount(runs, runs, None, flags, None) == 0, os.strerror(ctypes.get_errno())
"""
    done = commands.run_apart(recipe, before=mounted)
    assert done.returncode == 2, done.output
    assert "Read-only file system" in done.output
    assert "Traceback" not in done.output
    assert not list(runs.iterdir())
