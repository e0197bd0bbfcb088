"""What `distilpeft check` prints of the rows."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console
from support import commands, tiny

from distilpeft.planning.check import show
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe

LONG = " ".join(tiny.PLAIN * 4)


def checked(folder, width: int, *changes: str) -> list[str]:
    recipe = commands.workspace(folder)
    rows = [(f"{LONG} {tiny.PLAIN[at % 5]} {tiny.PLAIN[at % 7]} {at}", str(at % 2)) for at in range(200)]
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    console = Console(file=io.StringIO(), width=width)
    show(make_plan(load_recipe(recipe, list(changes)), folder / "runs"), console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [50, 80, 200])
def test_no_count_of_a_class_makes_room_for_an_example(tmp_path, width):
    lines = checked(tmp_path, width)
    at = next(index for index, line in enumerate(lines) if line.split()[:4] == ["class", "train", "validation", "test"])
    counts = [[int(cell) for cell in line.split()[1:4]] for line in lines[at + 2 : at + 4]]
    assert [sum(column) for column in zip(*counts, strict=True)] == [120, 40, 40]
    assert max(len(line) for line in lines[at : at + 4]) <= width


def test_rows_without_labels_are_counted_and_every_student_has_its_own(tmp_path):
    lines = checked(tmp_path, 200, "data.labelled=30", "distil.ce_only_epochs=7")
    assert any("30 training rows have a label" in line and "labels 90 rows without" in line for line in lines)
    cells = {line.split()[0]: line.split()[1:4] for line in lines if line.strip().startswith("distil/")}
    assert cells == {
        "distil/student_ce_only": ["0/1", "30", "14"], "distil/student": ["0/1", "120", "16"],
        "distil/student_ce_only_long": ["0/1", "30", "16"], "distil/student_hard_labels": ["0/1", "120", "16"],
    }  # fmt: skip
