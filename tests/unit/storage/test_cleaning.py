"""What `clean` finds and removes, on folders that are made up: no run is needed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
from support import reports

from distilpeft import api, cli
from distilpeft.errors import InputError
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.files import replace_link, sealed
from distilpeft.machine.locks import Lock, in_use
from distilpeft.storage import cleaning, records
from distilpeft.storage.cleaning import Scope


def name(stage: str, number: int) -> str:
    return f"{stage}-{number:012x}"


def made(run: Path, stage: str, number: int, size: int = 1000) -> Path:
    """A published artifact with one file besides its manifest."""
    folder = run / name(stage, number)
    (folder / "model").mkdir(parents=True)
    (folder / "model/weights").write_bytes(bytes(size))
    (folder / "manifest.json").write_text("{}")
    return folder


def partial(run: Path, stage: str, number: int) -> Path:
    folder = run / f"{name(stage, number)}.partial"
    (folder / "checkpoints").mkdir(parents=True)
    return folder


def refer(file: Path, folders: list[Path], **values: object) -> None:
    """Write down that a plan leads to these folders."""
    artifacts = [Artifact("", folder, {}, {}) for folder in folders]
    records.save(file, artifacts, values)


def report(run: Path, folders: list[Path]) -> None:
    """A finished run's report, which refers to these folders."""
    found = reports.two_runs()[0]
    artifacts = {f"step {at}": folder.name for at, folder in enumerate(folders)}
    run.mkdir(exist_ok=True)
    (run / "report.json").write_text(json.dumps(sealed({**found.as_json(), "artifacts": artifacts})))


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()} - {".locks", "report.json", "plan.json"}


def removed(run: Path, **options: object) -> set[str]:
    return {item.path.name for item in api.clean(run, **options)}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a report of a student, and an older student and teacher."""
    folder = tmp_path / "runs/tiny"
    report(folder, [made(folder, "teacher", 1), made(folder, "targets", 2), made(folder, "distil", 3)])
    for stage in ("teacher", "distil", "evaluate"):
        made(folder, stage, 0xA)
    return folder


def test_what_the_report_refers_to_stays_and_older_artifacts_go(run):
    (run / "notes.txt").write_text("mine")
    (run / "distil-mine").mkdir()
    assert removed(run) == {name("teacher", 0xA), name("distil", 0xA), name("evaluate", 0xA)}
    kept = {name("teacher", 1), name("targets", 2), name("distil", 3), "notes.txt", "distil-mine"}
    assert names(run) == kept
    assert removed(run) == set()


def test_an_unfinished_run_keeps_its_steps_and_can_be_resumed(run):
    work = partial(run, "distil", 0xB)
    refer(run / "plan.json", [run / name("teacher", 1), run / name("evaluate", 0xA), run / name("distil", 0xB)])
    assert removed(run) == {name("teacher", 0xA), name("distil", 0xA)}
    assert work.is_dir()
    (kept,) = cleaning.look(Scope(run)).kept
    assert (kept.path, kept.why) == (work, "interrupted; the next run resumes it")


def test_interrupted_work_goes_once_nothing_refers_to_it_or_it_is_done(run):
    refer(run / "plan.json", [run / name("distil", 3)])
    partial(run, "distil", 3)
    partial(run, "export", 0xC)
    assert {name("distil", 3) + ".partial", name("export", 0xC) + ".partial"} <= removed(run)


def test_soft_targets_that_nothing_refers_to_and_tokens_go_with_caches_only(run):
    old = made(run, "targets", 0xD)
    (run / "cache").mkdir()
    assert old.name not in removed(run)
    assert [item.path for item in cleaning.look(Scope(run)).kept] == [old]
    assert removed(run, caches=True) == {old.name, "cache"}
    assert (run / name("targets", 2)).is_dir(), "the report's own stay"


def test_links_are_neither_followed_nor_removed(run, tmp_path):
    elsewhere = made(tmp_path / "other", "distil", 0xE)
    (run / name("distil", 0xE)).symlink_to(elsewhere)
    (run / "cache").symlink_to(elsewhere)
    (run / name("evaluate", 0xA) / "away").symlink_to(elsewhere)
    assert name("distil", 0xE) not in removed(run, caches=True)
    assert (elsewhere / "model/weights").is_file()
    assert (run / name("distil", 0xE)).is_symlink()


def test_a_run_that_is_a_link_is_refused(run, tmp_path):
    (tmp_path / "runs/linked").symlink_to(run)
    with pytest.raises(InputError, match=r"linked: a link; give the folder that it leads to, .*/runs/tiny"):
        api.clean(tmp_path / "runs/linked")


def test_the_bundles_that_links_lead_to_stay(run):
    linked = made(run, "bundle", 0xF)
    (run / "exports").mkdir()
    replace_link(run / "exports/onnx", f"../{linked.name}/model")
    assert linked.name not in removed(run)


def sweep(run: Path, *, table: bool = True) -> None:
    """Two points on one teacher, of which the second is the best; each has a student, its scores and an export."""
    folder = run / "sweep-0123456789ab"
    for at in (0, 1):
        point = [made(run, stage, 0x10 + at) for stage in ("distil", "evaluate", "export")]
        refer(folder / f"plans/{at}.json", [run / name("teacher", 1), *point], **{"distil.temperature": at + 1.0})
    if table:
        rows = [{"values": {"distil.temperature": at + 1.0}} for at in (0, 1)]
        (folder / "sweep.json").write_text(json.dumps({"points": rows, "best_by_validation": 1}))


def test_the_points_of_a_sweep_stay(run):
    sweep(run)
    assert removed(run) == {name("teacher", 0xA), name("distil", 0xA), name("evaluate", 0xA)}


def test_keep_best_removes_the_models_of_the_other_points_and_keeps_their_scores(run):
    sweep(run)
    old = {name("teacher", 0xA), name("distil", 0xA), name("evaluate", 0xA)}
    assert removed(run, keep="best") == old | {name("distil", 0x10), name("export", 0x10)}
    assert {name("evaluate", 0x10), name("teacher", 1), name("distil", 0x11), name("export", 0x11)} <= names(run)


def test_keep_best_removes_no_model_of_a_sweep_that_has_no_best_point_yet(run):
    sweep(run, table=False)
    assert removed(run, keep="best") == {name("teacher", 0xA), name("distil", 0xA), name("evaluate", 0xA)}


def test_keep_best_reads_the_table_of_a_search_too(run):
    folder = run / "search-0123456789ab"
    for at in (0, 1):
        refer(folder / f"plans/{at}.json", [made(run, "distil", 0x20 + at)], lr=0.1 * (at + 1))
    trials = [{"number": at, "values": {"lr": 0.1 * (at + 1)}} for at in (0, 1)]
    table = {"trials": trials, "best": 0}
    (folder / "search.json").write_text(json.dumps(table))
    assert name("distil", 0x21) in removed(run, keep="best")
    assert (run / name("distil", 0x20)).is_dir()
    (folder / "search.json").write_text(json.dumps({**table, "best": None}))
    assert removed(run, keep="best") == set()


def test_a_sweep_that_does_not_say_what_it_refers_to_is_refused(run):
    folder = run / "sweep-0123456789ab"
    folder.mkdir()
    (folder / "sweep.json").write_text("{}")
    before = names(run)
    with pytest.raises(InputError, match=r"does not say which .*; run the same sweep again, which repeats nothing"):
        api.clean(run)
    assert names(run) == before


def test_a_folder_that_records_nothing_is_refused(tmp_path):
    folder = tmp_path / "runs/tiny"
    made(folder, "teacher", 1)
    with pytest.raises(InputError, match="records no run, report or sweep that says what to keep; give the recipe"):
        api.clean(folder)
    assert names(folder) == {name("teacher", 1)}
    with pytest.raises(InputError, match=r"not the folder of a run; `distilpeft runs` lists them"):
        api.clean(tmp_path)


def test_nothing_is_removed_from_any_run_while_somebody_works_on_one(run, tmp_path):
    other = tmp_path / "runs/other"
    report(other, [made(other, "teacher", 1)])
    made(other, "teacher", 2)
    before = names(run), names(other)
    with in_use(other), pytest.raises(InputError, match=rf"other: process {os.getpid()} on .* is working on it"):
        api.clean(run, other)
    step = Lock(other, name("distil", 7))
    assert step.acquire()  # as a process of another version holds it: without the lock that all share
    with pytest.raises(InputError, match=rf"is working on {name('distil', 7)}; clean it when that is done"):
        api.clean(run, other)
    step.release()
    assert (names(run), names(other)) == before
    assert removed(other) == {name("teacher", 2)}


def test_what_is_referred_to_between_the_question_and_the_answer_stays(run):
    def agree(found: object) -> bool:
        refer(run / "plan.json", [run / name("distil", 0xA)])
        return True

    assert name("distil", 0xA) not in {item.path.name for item in api.clean(run, agree=agree)}
    assert (run / name("distil", 0xA)).is_dir()


def test_a_process_that_is_killed_while_it_deletes_leaves_no_half_artifact(run):
    here, there = multiprocessing.Pipe()

    def die(path: Path, **_: object) -> None:
        (path / "model/weights").unlink()
        there.send(path.name)
        os.kill(os.getpid(), signal.SIGKILL)

    def clean() -> None:
        with mock.patch("shutil.rmtree", die):
            api.clean(run)

    process = multiprocessing.get_context("fork").Process(target=clean)
    process.start()
    begun = here.recv()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert begun.endswith(".removed")
    for folder in run.iterdir():
        assert not (folder / "manifest.json").exists() or (folder / "model/weights").exists() or folder.name == begun
    assert {item.why for item in cleaning.look(Scope(run)).items} == {"its removal was interrupted"}
    assert begun in removed(run)
    assert names(run) == {name("teacher", 1), name("targets", 2), name("distil", 3)}


def test_a_file_with_two_names_is_counted_once(run):
    export, bundle = made(run, "export", 0x30, 4000), run / name("bundle", 0x30)
    bundle.mkdir()
    os.link(export / "model/weights", bundle / "weights")
    found = {item.path.name: item.bytes for item in cleaning.look(Scope(run)).items}
    assert (found[export.name], found[bundle.name]) == (2000 + len("{}"), 2000)


def verb(*arguments: object) -> int:
    with mock.patch.object(sys, "argv", ["distilpeft", "clean", *map(str, arguments)]):
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0


def test_the_command_lists_first_and_removes_only_with_yes_or_an_answer(run, capsys):
    before = names(run)
    assert verb(run, "--dry-run") == 0
    said = capsys.readouterr().out
    assert name("distil", 0xA) in said
    assert "to remove: 3 folders, 3 kB" in said
    assert verb(run) == 2
    said = capsys.readouterr()
    assert "to remove: 3 folders, 3 kB" in said.out
    assert said.err.strip() == (
        "error: --yes: needed to remove anything where nobody can be asked; --dry-run only lists it"
    )
    assert names(run) == before
    with mock.patch("sys.stdin.isatty", return_value=True), mock.patch("typer.confirm", return_value=False):
        assert verb(run) == 0
    assert names(run) == before
    assert verb(run, "--yes") == 0
    assert "removed: 3 folders, 3 kB" in capsys.readouterr().out
    assert verb(run) == 0
    assert "nothing to remove" in capsys.readouterr().out
