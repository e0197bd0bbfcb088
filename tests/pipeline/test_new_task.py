"""A task of one's own: three files of the package are touched, and everything else follows."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import commands, tiny

import distilpeft

SECTION = '''
class YesNo(Texts):
    """A question with a text, and whether the answer is yes."""

    kind: Literal["yes_no"]
    traits: ClassVar[Kind] = Kind(("accuracy", "log_loss"))
    labels: ClassVar[tuple[str, str]] = ("no", "yes")
    label: str = Field(min_length=1, description="column with true or false")


TaskSection = '''
TASK = '''"""Yes or no."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets

from distilpeft.recipe.task import YesNo
from distilpeft.tasks import text_rows
from distilpeft.data.labels import LABEL, Fault
from distilpeft.tasks.single_label import SingleLabelTask
from distilpeft.tasks.task import Batch, Columns, InputReader, Label, Text


@dataclass(frozen=True)
class YesNoTask(SingleLabelTask):
    """Yes or no."""

    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    section: YesNo

    def features(self) -> datasets.Features:
        """Columns after `encode`."""
        return text_rows.features(self.section, label=datasets.Value("int64"))

    def model_options(self) -> dict[str, object]:
        """Two classes."""
        return text_rows.named(self.section.labels)

    def columns(self) -> list[tuple[str, str]]:
        """Text and label."""
        return [("text", self.section.text), ("label", self.section.label)]

    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Texts that are none."""
        return text_rows.text_faults(rows, self.section.text)

    def labels(self, rows: datasets.Dataset) -> Iterator[Label | Fault]:
        """0 or 1."""
        for cell in text_rows.cells(rows, self.section.label):
            known = {"True": 1, "False": 0}.get(str(cell))
            yield Fault(f"{cell!r} is neither true nor false") if known is None else known

    def label_feature(self) -> Any:
        """0 or 1."""
        return datasets.Value("int64")

    def nothing_to_learn(self, rows: datasets.Dataset) -> str | None:
        """All the same."""
        return "all are the same" if len(set(text_rows.cells(rows, LABEL))) == 1 else None

    def texts(self, rows: datasets.Dataset) -> Iterator[Text]:
        """The texts."""
        return text_rows.texts(self.section, rows)

    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Tokens, and 0 or 1."""
        return {**text_rows.encode(self.section, columns, tokenizer, max_tokens), "label": columns[LABEL]}

    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """A batch."""
        import torch

        return {"inputs": text_rows.inputs(columns, tokenizer), "labels_N": torch.tensor(columns["label"])}
'''
CHANGES = {
    "recipe/task.py": [("\nTaskSection = ", SECTION), ("    | Regression\n", "    | Regression\n    | YesNo\n")],
    "tasks/rows.py": [
        ('    "regression": RegressionTask,\n', '    "regression": RegressionTask,\n    "yes_no": YesNoTask,\n'),
        (
            "from distilpeft.tasks.token_classification",
            "from distilpeft.tasks.yes_no import YesNoTask\nfrom distilpeft.tasks.token_classification",
        ),
    ],
}
"""File → what is put in the place of what; beside these only `tasks/yes_no.py` is new."""


def with_the_task(folder: Path) -> Path:
    """A copy of the package that knows the task; the folder to import it from."""
    package = folder / "distilpeft"
    shutil.copytree(Path(distilpeft.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in CHANGES.items():
        text = (package / name).read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (package / name).write_text(text, encoding="utf-8")
    (package / "tasks/yes_no.py").write_text(TASK, encoding="utf-8")
    return folder


@pytest.mark.thorough
def test_a_new_task_takes_three_files_and_goes_from_rows_to_an_export_that_predicts(tmp_path):
    package = with_the_task(tmp_path / "package")
    tiny.save_model(tmp_path / "base")
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "good"), *((text, bool(label)) for text, label in tiny.rows(120))])
    tree = tiny.recipe_tree(
        tmp_path, task={"kind": "yes_no", "text": "text", "label": "good"}, teacher__quantize="none"
    )
    short = {"epochs": 1, "max_steps": 2, "batch_size": 16, "precision": "fp32"}
    tree["teacher"] |= {"fit": short, "gate": "warn"}
    tree["distil"]["fit"] = short
    tree["evaluate"] = {"metrics": ["accuracy"], "teacher_full_precision": False}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(commands.TESTS)])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    # `alone`: the gate starts no further process; the one below reads the export
    python("-c", "from support import commands; commands.alone()", "run", "tiny.yaml", "--until", "compare")
    (compared,) = (tmp_path / "runs/tiny").glob("compare-*/manifest.json")
    pairs = json.loads(compared.read_text())["figures"]["pairs"]
    assert ("student", "teacher", "accuracy") in {(pair["role"], pair["against"], pair["metric"]) for pair in pairs}
    (exported,) = (tmp_path / "runs/tiny").glob("export-*/model")
    answer = json.loads(python("-m", "distilpeft", "predict", str(exported), "a good film"))
    assert answer["label"] in ("no", "yes")
