"""Examples: those for clusters can be read and name what exists; those in Python run on tiny models."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support import tiny, tiny_lm
from typer.main import get_command

from distilpeft.cli import app

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted(file for file in (ROOT / "docs" / "examples").iterdir() if file.suffix in (".sh", ".yaml"))


def scripts(file: Path) -> list[str]:
    """The shell text in an example."""
    text = file.read_text()
    if file.suffix == ".sh":
        return [text]
    found = []
    for document in yaml.safe_load_all(text):
        if document.get("kind") == "Job":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            found += container["args"]
        found += [document[name] for name in ("setup", "run") if name in document]
    return found


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_the_shell_of_an_example_can_be_read(file):
    assert scripts(file)
    for script in scripts(file):
        done = subprocess.run([shutil.which("bash"), "-n"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_names_a_verb_and_a_recipe_that_exist(file):
    text = file.read_text()
    verbs = re.findall(r"-m distilpeft (\w+)", text)
    recipes = re.findall(r"recipes/[\w.-]+\.yaml", text)
    assert verbs
    assert recipes
    assert all(verb in get_command(app).commands for verb in verbs)
    assert all((ROOT / recipe).is_file() for recipe in recipes)


def test_the_page_links_every_example():
    page = (ROOT / "docs" / "devices.md").read_text()
    assert [file.name for file in EXAMPLES if f"examples/{file.name}" not in page] == []


def script(name: str):
    return runpy.run_path(str(ROOT / "docs" / "examples" / name))["main"]


def test_one_s_own_loop_lowers_the_loss(tmp_path, capsys):
    for name, seed in (("teacher", 4), ("student", 5)):
        tiny_lm.model(seed=seed).save_pretrained(str(tmp_path / name))
    tiny_lm.tokenizer().save_pretrained(str(tmp_path / "teacher"))
    lines = [f"{pair['prompt']} {pair['completion']}" for pair in tiny_lm.pairs(160)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    script("own_loop.py")(*(str(tmp_path / name) for name in ("teacher", "student", "lines.txt")))
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_a_trainer_distils_a_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("teacher", 1), ("student", 2)):
        tiny.classifier(seed=seed).save_pretrained(name)
        tiny.tokenizer().save_pretrained(name)
    tiny.write_csv(tmp_path / "rows.csv", 40)
    script("trainer.py")("teacher", "student", "rows.csv")
    assert (tmp_path / "distilled" / "model.safetensors").is_file()
