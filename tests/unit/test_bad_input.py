"""What users get wrong, through the real command line: exit code 2 and one line that names the place, before torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

ROWS = b"text,label\n" + b"".join(b"film %d,%s\n" % (n, b"good" if n % 2 else b"bad") for n in range(1, 11))
LINES = [b'{"text": "film %d", "label": %d}\n' % (n, n % 2) for n in range(10)]
JSONL = ("source: rows.csv", "source: rows.jsonl")
SPLIT = "split: {train: 0.6, validation: 0.2, test: 0.2}"


def instead(line: int, other: bytes) -> bytes:
    """Ten good lines of JSON, but for the 1-based `line`."""
    return b"".join([*LINES[: line - 1], other, *LINES[line:]])


def slices(train: str, validation: str, test: str) -> tuple[str, str]:
    return (SPLIT, f"train: {train}\n  validation: {validation}\n  test: {test}")


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        said: how the line on stderr begins (after `error: `), as a regular expression.
        edit: a piece of the small recipe and what stands in its place.
        files: files to write, or to remove (None).
        arguments: of the command line.
    """

    said: str
    edit: tuple[str, str] = ("", "")
    files: dict[str, bytes | None] = field(default_factory=dict)
    arguments: tuple[str, ...] = ("run", "recipe.yaml")


RECIPES = {
    "no such recipe": Case(r"nowhere\.yaml: No such file", arguments=("run", "nowhere.yaml")),
    "recipe is a folder": Case(r"base: Is a directory", arguments=("check", "base")),
    "not YAML": Case(r"recipe\.yaml:7: not valid YAML: ", ("labels: [bad, good]", "labels: [bad, good")),
    "a list": Case(r"recipe\.yaml:1: a recipe is a mapping", files={"recipe.yaml": b"- name\n- task\n"}),
    "empty recipe": Case(r"recipe\.yaml:1: a recipe is a mapping", files={"recipe.yaml": b""}),
    "not UTF-8": Case(r"recipe\.yaml: not UTF-8 text", files={"recipe.yaml": b"name: caf\xe9\n"}),
    "unknown key": Case(
        r"recipe\.yaml:23: distil\.temperatur: unknown key; did you mean distil\.temperature\?",
        ("temperature: 2", "temperatur: 2"),
    ),
    "duplicate key": Case(
        r"recipe\.yaml:24: distil\.alpha: this key is given twice", ("temperature: 2", "temperature: 2\n  alpha: 1")
    ),
    "bad type": Case(r"recipe\.yaml:14: teacher\.lora\.rank: ", ("rank: 4", "rank: many")),
    "true as a number": Case(r"recipe\.yaml:22: distil\.alpha: expected a number", ("alpha: 0.5", "alpha: true")),
    "alpha out of range": Case(r"recipe\.yaml:22: distil\.alpha: .*\(got 1\.5\)", ("alpha: 0.5", "alpha: 1.5")),
    "missing section": Case(r"recipe\.yaml:1: task: field required", files={"recipe.yaml": b"name: small\n"}),
    "missing key": Case(r"recipe\.yaml:21: distil\.alpha: field required", ("  alpha: 0.5\n", "")),
    "split and slices": Case(r"recipe\.yaml:7: data: give either", (SPLIT, SPLIT + "\n  train: train[:5]")),
    "neither split nor slices": Case(r"recipe\.yaml:7: data: give train, validation and test", (f"  {SPLIT}\n", "")),
    "unknown loss": Case(
        r"recipe\.yaml:23: distil\.loss: unknown key", ("temperature: 2", "loss: mse\n  temperature: 2")
    ),
    "unknown metric": Case(
        r"recipe\.yaml:1: evaluate\.metrics: 'f1' is none of accuracy",
        ("name: small", "evaluate: {metrics: [f1]}\nname: small"),
    ),
    "unknown monitor": Case(
        r"recipe\.yaml:18: teacher\.fit\.monitor: 'f1' is none of accuracy",
        ("batch_size: 4", "monitor: f1\n    batch_size: 4"),
    ),
    "unknown quantization": Case(r"recipe\.yaml:13: teacher\.quantize: ", ("nf4", "fp4")),
    "no adapter on nf4": Case(
        r"recipe\.yaml:11: teacher: lora: null tunes all weights", ("lora: {rank: 4}", "lora: null")
    ),
    "bad override": Case(
        r"--set distil\.alpha=2: distil\.alpha: ", arguments=("run", "recipe.yaml", "--set", "distil.alpha=2")
    ),
    "override without a value": Case(
        r"--set distil\.alpha: write it as section\.key=value",
        arguments=("run", "recipe.yaml", "--set", "distil.alpha"),
    ),
    "unknown option": Case(r"No such option: --fast", arguments=("run", "recipe.yaml", "--fast")),
    "unknown stage": Case(r"--until distill: one of teacher", arguments=("run", "recipe.yaml", "--until", "distill")),
    "no recipe": Case(r"Missing argument", arguments=("run",)),
}

MODELS = {
    "no such model": Case(r"teacher\.model: no such file or folder: nowhere", ("model: base", "model: ./nowhere")),
    "model folder without config": Case(r"teacher\.model: base has no config\.json", files={"base/config.json": None}),
    "damaged config": Case(r"base/config\.json: cannot be read", files={"base/config.json": b"{"}),
    "damaged weights": Case(r"base/model\.safetensors: not a readable", files={"base/model.safetensors": b"abc"}),
    "model folder without weights": Case(r"teacher\.model: ", files={"base/model.safetensors": None}),
    "package not installed": Case(
        r"teacher\.model: the Python package 'no_such_package' is not installed",
        ("model: base", "model: package:no_such_package/m"),
    ),
    "revision of a folder": Case(
        r"teacher\.model: revision is for hub ids", ("model: base", "model: base\n  revision: main")
    ),
    "layer beyond the depth": Case(
        r"student\.from_teacher\.layers: layer 2 does not exist; the teacher has layers 0\.\.1",
        ("layers: [1]", "layers: [0, 2]"),
    ),
    "no such LoRA target": Case(
        r"teacher\.lora\.target_modules: base has no module 'q_proj'; its matrices are ",
        ("lora: {rank: 4}", "lora: {target_modules: [q_proj]}"),
    ),
    "no such LoRA target in the student": Case(
        r"student\.lora\.target_modules: ",
        ("layers: [1]}", "layers: [1]}\n  lora: {target_modules: [q_proj]}"),
    ),
    "no such student": Case(
        r"student\.model: no such file or folder: nowhere", ("from_teacher: {layers: [1]}", "model: ./nowhere")
    ),
    "no such student architecture": Case(
        r"student\.from_config\.model: .* has no config\.json",
        ("from_teacher: {layers: [1]}", "from_config: {model: ./other}"),
        {"other/readme.txt": b""},
    ),
}

DATA = {
    "no such data file": Case(r"data\.source: no such file or folder: rows\.csv", files={"rows.csv": None}),
    "data set that cannot be fetched": Case(
        r"data\.source: cannot load org/no-such-rows from the hub", ("source: rows.csv", "source: org/no-such-rows")
    ),
    "slices that overlap": Case(
        r"data\.validation: 1 rows of train are also in data\.train", slices("train[:6]", "train[5:8]", "train[8:]")
    ),
    "no such split": Case(
        r"data\.test: cannot slice 'test': .*train \(10 rows\)", slices("train[:6]", "train[6:]", "test")
    ),
    "CSV without the column": Case(
        r"task\.text: rows\.csv has no column 'text'; its columns are review, label",
        files={"rows.csv": ROWS.replace(b"text", b"review", 1)},
    ),
    "CSV with an empty text": Case(
        r"rows\.csv: row 4: column 'text' holds no text \(1 bad rows of 10: 4\)",
        files={"rows.csv": ROWS.replace(b"film 4", b"")},
    ),
    "CSV with a label outside the list": Case(
        r"rows\.csv: row 3: label 'fair' is none of task\.labels \(bad, good\)",
        files={"rows.csv": ROWS.replace(b"film 3,good", b"film 3,fair")},
    ),
    "CSV with a field too many": Case(
        r"rows\.csv: row 5: line 6 has 3 fields and the header 2; quote fields",
        files={"rows.csv": ROWS.replace(b"film 5,good", b"well, film 5,good")},
    ),
    "CSV with a field too few": Case(
        r"rows\.csv: row 5: the label is missing", files={"rows.csv": ROWS.replace(b"film 5,good", b"film 5")}
    ),
    "CSV with an open quote": Case(
        r"rows\.csv:4: a quote that opens in this row is never closed",
        files={"rows.csv": ROWS.replace(b"film 3", b'"film 3')},
    ),
    "CSV in another alphabet": Case(
        r"rows\.csv:7: not UTF-8 .*data\.encoding",
        files={"rows.csv": ROWS.replace(b"film 6", "фильм о любви и о войне, а также о том, что".encode("cp1251"))},
    ),
    "CSV that is UTF-8 but for a byte": Case(
        r"rows\.csv:7: not UTF-8",
        files={"rows.csv": ROWS.replace(b"film 6", b"caf\xe9 6").replace(b"film 2", "café 2".encode())},
    ),
    "compressed CSV that is none": Case(
        r"rows\.csv\.gz: cannot be decompressed", ("rows.csv", "rows.csv.gz"), {"rows.csv.gz": ROWS}
    ),
    "pointer of Git LFS": Case(
        r"rows\.csv: this is a Git LFS pointer",
        files={"rows.csv": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"},
    ),
    "pattern without a match": Case(
        r"data\.source: no data file matches the pattern nowhere-\*\.csv", ("rows.csv", "nowhere-*.csv")
    ),
    "unknown encoding": Case(
        r"recipe\.yaml:9: data\.encoding: 'klingon' is not an encoding that Python knows",
        ("source: rows.csv", "source: rows.csv\n  encoding: klingon"),
    ),
    "empty CSV": Case(r"rows\.csv: the file is empty", files={"rows.csv": b""}),
    "CSV with a header only": Case(r"(rows\.csv|data\.)", files={"rows.csv": b"text,label\n"}),
    "broken JSON line": Case(
        r"rows\.jsonl: row 3: not a JSON object: line 3: ",
        JSONL,
        {"rows.jsonl": instead(3, b'{"text": "film 2", "label": \n')},
    ),
    "broken JSON line after an empty line": Case(
        r"rows\.jsonl: row 3: not a JSON object: line 4: ",
        JSONL,
        {"rows.jsonl": b"\n" + instead(3, b'{"text": "film 2", "label": \n')},
    ),
    "JSON line that is no object": Case(
        r"rows\.jsonl: row 3: not a JSON object but a list", JSONL, {"rows.jsonl": instead(3, b"[1, 2]\n")}
    ),
    "JSON line that is not UTF-8": Case(
        r"rows\.jsonl:5: not UTF-8 text",
        JSONL,
        {"rows.jsonl": instead(5, b'{"text": "\xcf\xf0\xe8\xe2\xe5\xf2 caf\xc3\xa9", "label": 1}\n')},
    ),
    "JSON line without the label": Case(
        r"rows\.jsonl: row 5: the label is missing", JSONL, {"rows.jsonl": instead(5, b'{"text": "film"}\n')}
    ),
    "JSON line with a number for a text": Case(
        r"rows\.jsonl: row 5: column 'text' holds no text",
        JSONL,
        {"rows.jsonl": instead(5, b'{"text": 5, "label": 1}\n')},
    ),
    "parquet that is not parquet": Case(
        r"rows\.parquet: cannot be read: ", ("rows.csv", "rows.parquet"), {"rows.parquet": b"text,label\n"}
    ),
    "unknown kind of file": Case(
        r"data\.source: \./rows\.xlsx: a data file ends in one of ", ("rows.csv", "./rows.xlsx"), {"rows.xlsx": b"x"}
    ),
    "damaged saved data set": Case(
        r"data\.source: saved",
        ("rows.csv", "./saved"),
        {"saved/state.json": b"{", "saved/dataset_info.json": b"{"},
    ),
    "filter on a column that is not there": Case(
        r"data\.where\.stars: no such column; rows\.csv has text, label",
        ("source: rows.csv", "source: rows.csv\n  where: {stars: 5}"),
    ),
    "report of a folder without one": Case(r"base: no report\.json here", arguments=("report", "base")),
}

CASES = {**RECIPES, **MODELS, **DATA}
APART = ("unknown key", "bad override", "layer beyond the depth", "CSV with an empty text", "broken JSON line",
         "empty CSV", "report of a folder without one")  # fmt: skip
"""Each of these also runs in a process of its own, as users run it."""

RUNNER = """
import json, os, sys, traceback
from pathlib import Path
from distilpeft import cli

def no_torch(event, arguments):
    if event == "import" and arguments[0] == "torch":
        reached.append(1)
        raise ImportError("torch, for a mistake that could be seen without it")

sys.addaudithook(no_torch)
root = Path.cwd()
for name, arguments in json.loads(Path("cases.json").read_text()).items():
    os.chdir(root / name)
    for number, file in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    reached = []
    sys.argv = ["distilpeft", *arguments]
    code = 0
    try:
        cli.main()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    outcome = {"code": code, "torch": bool(reached) or "torch" in sys.modules}
    (root / name / "outcome.json").write_text(json.dumps(outcome))
"""


def lay_out(folder, case, fill_folder):
    fill_folder(folder)
    recipe = folder / "recipe.yaml"
    text = recipe.read_text()
    assert text.count(case.edit[0]) >= 1
    recipe.write_text(text.replace(*case.edit, 1))
    for name, content in case.files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, fill_folder):
    """What every case leaves, from one process that runs the command line once per case and cannot import torch."""
    root = tmp_path_factory.mktemp("cases")
    names = {name: f"case-{number}" for number, name in enumerate(CASES)}
    for name, case in CASES.items():
        lay_out(root / names[name], case, fill_folder)
    (root / "cases.json").write_text(json.dumps({names[name]: case.arguments for name, case in CASES.items()}))
    subprocess.run([sys.executable, "-c", RUNNER], cwd=root, timeout=300, check=True)
    return {
        name: {
            **json.loads((root / folder / "outcome.json").read_text()),
            "stdout": (root / folder / "stdout").read_text(),
            "stderr": (root / folder / "stderr").read_text(),
        }
        for name, folder in names.items()
    }


def refused(code, stdout, stderr, case):
    assert "Traceback" not in stdout + stderr
    lines = stderr.splitlines()
    assert lines
    assert re.match(rf"error: {case.said}", lines[-1]), stderr
    assert len(lines) == 1, stderr
    assert code == 2
    assert stdout == ""


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_refused_with_one_line_that_names_the_place(name, outcomes):
    found = outcomes[name]
    refused(found["code"], found["stdout"], found["stderr"], CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_found_before_torch_is_imported(name, outcomes):
    assert not outcomes[name]["torch"]


@pytest.mark.parametrize("name", APART)
def test_a_mistake_is_refused_in_a_process_of_its_own(name, tmp_path, fill_folder):
    lay_out(tmp_path / "case", CASES[name], fill_folder)
    command = [sys.executable, "-m", "distilpeft", *CASES[name].arguments]
    ended = subprocess.run(
        command, cwd=tmp_path / "case", capture_output=True, text=True, timeout=60, env=dict(os.environ), check=False
    )
    refused(ended.returncode, ended.stdout, ended.stderr, CASES[name])


def test_the_recipe_that_the_mistakes_are_made_in_is_good(workplace):
    command = [sys.executable, "-m", "distilpeft", "check", "recipe.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "the recipe and its data are good" in ended.stdout
