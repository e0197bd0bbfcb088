"""Artifacts: published whole or not at all, verified byte by byte, named by everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from distilpeft.errors import InputError
from distilpeft.machine import artifact as module
from distilpeft.machine import files
from distilpeft.machine.artifact import MANIFEST, artifact
from distilpeft.machine.files import (
    digest_file,
    digest_json,
    is_whole,
    publish_folder,
    read_json,
    replace_link,
    seal_folder,
    write_json,
    write_text,
)

SETTINGS = {"lr": 0.1, "fit": {"epochs": 1, "batch_size": 4}}
INPUTS = {"data": "d1", "base": "b1"}


def started(folder: Path):
    made = artifact(folder, "teacher", 1, SETTINGS, INPUTS)
    (made.partial / "model").mkdir(parents=True)
    (made.partial / "model" / "weights.bin").write_bytes(b"0123456789")
    (made.partial / "log.txt").write_text("one line\n")
    return made


def published(folder: Path):
    made = started(folder)
    made.publish({"accuracy": 0.5}, {"python": "3"})
    return made


def fail(*_):
    raise OSError("no space left on device")


def test_a_published_artifact_holds_its_files_its_figures_and_no_partial_folder(tmp_path):
    made = published(tmp_path)
    assert made.done
    assert made.figures() == {"accuracy": 0.5}
    assert (made.path / "model" / "weights.bin").read_bytes() == b"0123456789"
    assert [entry.name for entry in tmp_path.iterdir()] == [made.path.name]
    made.verify()


def test_the_manifest_records_size_and_sha256_of_every_file(tmp_path):
    manifest = published(tmp_path).manifest()
    assert manifest["files"] == {
        "log.txt": {"bytes": 9, "sha256": hashlib.sha256(b"one line\n").hexdigest()},
        "model/weights.bin": {"bytes": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest()},
    }
    assert (manifest["settings"], manifest["inputs"], manifest["stage"]) == (SETTINGS, INPUTS, "teacher")


@pytest.mark.parametrize("step", ["fsync", "write_json", "digest_file"])
def test_a_publish_that_fails_leaves_no_artifact_and_keeps_the_work(tmp_path, monkeypatch, step):
    made = started(tmp_path)
    monkeypatch.setattr(files if step == "fsync" else module, step, fail)
    with pytest.raises(OSError, match="no space left"):
        made.publish({}, {})
    assert not made.done
    assert not made.path.exists()
    assert (made.partial / "model" / "weights.bin").read_bytes() == b"0123456789"


def test_a_publish_that_fails_at_the_rename_can_be_done_again_and_verifies(tmp_path, monkeypatch):
    made = started(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="no space left"):
            made.publish({"accuracy": 0.5}, {})
    assert not made.done
    made.publish({"accuracy": 0.75}, {})
    made.verify()
    assert made.figures() == {"accuracy": 0.75}
    assert sorted(made.manifest()["files"]) == ["log.txt", "model/weights.bin"]


def test_a_folder_is_published_by_one_rename_between_the_bytes_and_the_name_on_disk(tmp_path, monkeypatch):
    (tmp_path / "partial" / "deep").mkdir(parents=True)
    (tmp_path / "partial" / "deep" / "a").write_bytes(b"abc")
    seen = []
    monkeypatch.setattr(files, "fsync", lambda path: seen.append(path.relative_to(tmp_path).as_posix()))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda *names: seen.append("rename") or rename(*names))
    publish_folder(tmp_path / "partial", tmp_path / "final")
    assert sorted(seen[:3]) == ["partial", "partial/deep", "partial/deep/a"]
    assert seen[3:] == ["rename", "."]
    assert (tmp_path / "final" / "deep" / "a").read_bytes() == b"abc"


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_is_there_is_replaced_only_where_that_is_asked_for(tmp_path, replace):
    for name in ("partial", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with nullcontext() if replace else pytest.raises(OSError, match="not empty"):
        publish_folder(tmp_path / "partial", tmp_path / "final", replace=replace)
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["partial" if replace else "final"]


def test_figures_that_are_not_finite_are_never_published(tmp_path):
    made = started(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        made.publish({"accuracy": float("nan")}, {})
    assert not made.done


def test_a_folder_without_a_manifest_is_no_artifact_and_is_replaced(tmp_path):
    made = started(tmp_path)
    made.path.mkdir()
    (made.path / "old.txt").write_text("old")
    assert not made.done
    made.publish({}, {})
    assert not (made.path / "old.txt").exists()
    made.verify()


def flip(file: Path) -> None:
    file.write_bytes(b"0123456789"[:4] + b"X" + b"0123456789"[5:])


@pytest.mark.parametrize(
    "damage", [flip, lambda file: file.write_bytes(b"01234"), Path.unlink], ids=["flipped", "cut", "gone"]
)
def test_verify_names_the_file_that_is_altered_cut_or_missing(tmp_path, damage):
    made = published(tmp_path)
    file = made.path / "model" / "weights.bin"
    damage(file)
    with pytest.raises(InputError) as caught:
        made.verify()
    assert str(caught.value).startswith(f"{file}: ")
    assert f"delete {made.path}" in str(caught.value)


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path):
    made = artifact(tmp_path, "teacher", 1, {"lr": 0.1}, {})
    made.partial.mkdir()
    made.publish({"accuracy": 0.25, 3: [1, 2.5]}, {"python": "3"})
    good = (made.path / MANIFEST).read_bytes()
    assert made.figures() == {"accuracy": 0.25, "3": [1, 2.5]}
    for at in range(len(good)):
        flipped = bytearray(good)
        flipped[at] ^= 1 << (at % 8)
        (made.path / MANIFEST).write_bytes(flipped)
        with pytest.raises(InputError, match=r"delete .* to make it again"):
            made.figures()


def test_one_file_is_given_only_while_it_is_what_was_written(tmp_path):
    made = artifact(tmp_path, "teacher", 1, {}, {})
    made.partial.mkdir()
    (made.partial / "rows.npz").write_bytes(b"abc")
    made.publish({}, {})
    assert made.file("rows.npz").read_bytes() == b"abc"
    (made.path / "rows.npz").write_bytes(b"abd")
    (made.path / "other").write_bytes(b"x")
    for name in ("rows.npz", "other", "nowhere"):
        with pytest.raises(InputError, match=f"{name}: missing or altered since it was written; delete"):
            made.file(name)


def test_a_folder_is_whole_while_no_file_of_it_changes(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"abc")
    assert not is_whole(tmp_path)
    seal_folder(tmp_path)
    assert is_whole(tmp_path)
    (tmp_path / "deep" / "a").write_bytes(b"abd")
    assert not is_whole(tmp_path)
    (tmp_path / "deep" / "a").unlink()
    assert not is_whole(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_manifest_is_refused_with_the_folder_to_delete(tmp_path, content):
    made = published(tmp_path)
    (made.path / "manifest.json").write_text(content)
    with pytest.raises(InputError) as caught:
        made.manifest()
    assert str(made.path / "manifest.json") in str(caught.value)
    assert f"delete {made.path}" in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        ("distil", 1, SETTINGS, INPUTS),
        ("teacher", 2, SETTINGS, INPUTS),
        ("teacher", 1, {**SETTINGS, "lr": 0.2}, INPUTS),
        ("teacher", 1, {**SETTINGS, "fit": {"epochs": 2, "batch_size": 4}}, INPUTS),
        ("teacher", 1, {**SETTINGS, "new": None}, INPUTS),
        ("teacher", 1, SETTINGS, {**INPUTS, "data": "d2"}),
        ("teacher", 1, SETTINGS, {"data": "b1", "base": "d1"}),
    ],
)
def test_the_key_changes_with_stage_version_any_setting_and_any_input(tmp_path, other):
    assert artifact(tmp_path, *other).key != artifact(tmp_path, "teacher", 1, SETTINGS, INPUTS).key


def test_the_key_does_not_depend_on_the_order_of_settings_or_on_the_folder(tmp_path):
    turned = {"fit": {"batch_size": 4, "epochs": 1}, "lr": 0.1}
    one = artifact(tmp_path, "teacher", 1, SETTINGS, INPUTS)
    two = artifact(tmp_path / "elsewhere", "teacher", 1, turned, {"base": "b1", "data": "d1"})
    assert one.key == two.key
    assert one.path.name == f"teacher-{one.key}"


def test_a_failing_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    write_json(file, {"old": 1})
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_write_json_and_write_text_replace_what_was_there(tmp_path):
    write_json(tmp_path / "a.json", {"name": "käse", "n": [1, 2]})
    assert read_json(tmp_path / "a.json", "") == {"name": "käse", "n": [1, 2]}
    write_text(tmp_path / "a.json", "short\n")
    assert (tmp_path / "a.json").read_text() == "short\n"
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_digests_are_plain_sha256_and_canonical(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": "1"})


def test_a_link_is_made_and_moved_to_another_target(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        replace_link(tmp_path / "current", name)
        assert (tmp_path / "current" / "file").read_text() == name
    assert (tmp_path / "current").readlink() == Path("two")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["current", "one", "two"]


def test_a_link_is_replaced_even_after_an_interrupted_replacement(tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / ".current.new").symlink_to("one")
    replace_link(tmp_path / "current", "two")
    assert (tmp_path / "current").readlink() == Path("two")
