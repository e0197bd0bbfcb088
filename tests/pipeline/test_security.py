"""Nothing that is loaded can run code, and nothing secret is written down."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from support import commands, tiny

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path({mark!r}).write_text("ran")
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path) -> Path:
    """A recipe whose teacher is of a class that its own folder brings."""
    recipe = commands.workspace(tmp_path, distil__ce_only_baseline=False, student={
        "from_config": {"model": str(tmp_path / "plain"), "overrides": {"num_hidden_layers": 1}}
    })  # fmt: skip
    tiny.save_pretrained(tmp_path / "plain")
    base = tmp_path / "base"
    (base / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    config = json.loads((base / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto}))
    return recipe


def test_code_in_a_models_folder_is_not_run(with_code, capfd):
    assert commands.run(with_code, "--until", "teacher") == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "teacher.trust_remote_code" in error
    assert not (with_code.parent / "mark").exists()


def test_code_is_run_if_the_recipe_says_so_with_a_warning(with_code, capfd):
    done = commands.run(with_code, "--until", "targets", "--set", "teacher.trust_remote_code=true")
    output = "".join(capfd.readouterr())
    assert done == 0, output
    assert (with_code.parent / "mark").exists()
    assert "warning: teacher.trust_remote_code: code that comes with" in " ".join(output.split())


def test_a_student_may_not_be_cut_from_a_teacher_with_code_of_its_own(tmp_path, capfd):
    recipe = commands.workspace(tmp_path)
    capfd.readouterr()
    assert commands.run(recipe, "--set", "teacher.trust_remote_code=true") == 2
    assert "teacher.trust_remote_code: the student would need" in capfd.readouterr().err


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return Path.write_text, (self._mark, "ran")


def test_pickled_weights_are_not_read(tmp_path, capfd):
    recipe = commands.workspace(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save({"trap": Trap(tmp_path / "mark")}, tmp_path / "base" / "pytorch_model.bin")
    torch.load(tmp_path / "base" / "pytorch_model.bin", weights_only=False)  # noqa: TID251 - the trap works
    (tmp_path / "mark").unlink()
    capfd.readouterr()
    assert commands.run(recipe) == 2
    assert "has no weights (*.safetensors)" in capfd.readouterr().err
    assert not (tmp_path / "mark").exists()


@pytest.mark.thorough
def test_no_secret_of_the_environment_is_written_anywhere(tmp_path, monkeypatch):
    secrets = {
        "HF_TOKEN": "hf_verysecretone",
        "WANDB_API_KEY": "verysecrettwo",
        "MLFLOW_TRACKING_PASSWORD": "secretthree",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    recipe = commands.workspace(tmp_path, tracking=["tensorboard"])
    assert commands.run(recipe) == 0
    for file in (tmp_path / "runs").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [name for name, value in secrets.items() if value.encode() in content], file


@pytest.mark.parametrize("name", ["../evil", "a/b", "/etc/x", "..", ".hidden", "A", "", "a\x00b", "a b"])
def test_a_runs_name_cannot_leave_the_folder_of_runs(tmp_path, name, capfd):
    recipe = commands.workspace(tmp_path)
    capfd.readouterr()
    assert commands.run(recipe, "--set", f"name={json.dumps(name)}") == 2
    assert "name" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name == "runs"] == []


def is_pickle(file: Path) -> bool:
    """Whether a file is a pickle's stream, or torch's archive of one."""
    content = file.read_bytes()
    archived = zipfile.is_zipfile(file) and any(name.endswith(".pkl") for name in zipfile.ZipFile(file).namelist())
    return archived or (content[:1] == b"\x80" and content[-1:] == b".")


@pytest.mark.thorough
def test_a_run_has_no_file_that_is_a_pickle(tmp_path):
    """Neither in what is published, nor in checkpoints of a run that was killed."""
    recipe = commands.workspace(tmp_path)
    commands.run_apart(recipe, "--until", "teacher", before=commands.signal_at("teacher", 9, "SIGKILL"))
    partial = make_plan(load_recipe(recipe), tmp_path / "runs").artifacts["teacher"].partial
    assert list(partial.rglob("optimizer.safetensors"))
    assert commands.run(recipe) == 0
    for file in (tmp_path / "runs").rglob("*"):
        if file.is_file():
            assert file.suffix not in (".pt", ".pkl", ".pth", ".ckpt"), file
            assert not is_pickle(file), file
