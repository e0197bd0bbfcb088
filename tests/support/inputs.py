"""Generated bad input, and what the command line answers: one located line and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from distilpeft import cli
from support import bad_inputs, commands, tiny_lm, tiny_tasks
from support.cases import Case, Found

SHARES = {"recipe": 0.3, "text": 0.1, "set": 0.1, "data": 0.2, "rows": 0.25, "run": 0.05}
"""Of all examples; a spoilt folder is asked three things."""


KINDS = (
    "multi_label_classification", "regression", "token_classification", "question_answering", "seq2seq", "embedding",
    "causal_lm",
)  # fmt: skip


def ask(*argv: str) -> tuple[int | None, list[str], float]:
    """The command line in this process: exit code (None: a traceback), lines on stderr, seconds."""
    out, err, begin = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", [*argv]):
        try:
            cli.main()
            code: int | None = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except Exception:
            code = None
            traceback.print_exc()
    return code, err.getvalue().strip().splitlines(), time.monotonic() - begin


def judged(what: str, code: int | None, lines: list[str], places: Sequence[str]) -> Case:
    """Refused with one line that names one of the places, or good after all."""
    said = lines[-1] if lines else ""
    if code == 0:
        return Case(what, "good")
    if code is None:
        return Case(what, "traceback", " | ".join(lines[-6:]))
    located = len(lines) == 1 and said.startswith("error: ") and any(place in said for place in places)
    return Case(what, "refused", "" if code == 2 and located else f"exit {code}: {lines}")


def language(folder: Path) -> Path:
    """The recipe of a language model, and its rows."""
    recipe = commands.language_workspace(folder)
    tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.pairs(20))
    return recipe


class Inputs:
    """Bad input of every kind, beside a good recipe with good rows."""

    def __init__(self, found: Found, folder: Path) -> None:
        self._found, self._folder, self._bad = found, folder, folder / "bad.yaml"
        self.recipe = commands.workspace(folder, 40)
        self.tree = yaml.safe_load(self.recipe.read_text())
        self._run = folder / "runs" / "tiny"
        self.slowest: dict[str, float] = {}
        self._rows: dict[str, tuple[Path, list[dict[str, Any]]]] = {}

    def strategy(self, kind: str) -> Any:
        """What to generate."""
        if kind == "run":
            if not self._run.exists():
                assert commands.run(self.recipe) == 0
            manifests = [path.relative_to(self._run).as_posix() for path in sorted(self._run.glob("*/manifest.json"))]
            others = ["report.json", "student/manifest.json", "student/tokenizer.json", "student/config.json"]
            return bad_inputs.spoilt_folders([*manifests, *others * 3])
        return {
            "recipe": bad_inputs.recipes(self.tree),
            "text": bad_inputs.damaged(self.recipe.read_bytes()),
            "set": bad_inputs.OVERRIDES,
            "data": bad_inputs.data_files(),
            "rows": st.sampled_from(KINDS).flatmap(
                lambda kind: st.tuples(st.just(kind), bad_inputs.spoilt_rows(self._good_rows(kind)))
            ),
        }[kind]

    def _good_rows(self, kind: str) -> list[dict[str, Any]]:
        """Some rows of a kind of task; its recipe is made beside them."""
        if kind not in self._rows:
            folder = self._folder / kind
            folder.mkdir()
            recipe = language(folder) if kind == "causal_lm" else tiny_tasks.workspace(folder, kind)
            lines = (folder / "rows.jsonl").read_text().splitlines()[:20]
            self._rows[kind] = recipe, [json.loads(line) for line in lines]
        return self._rows[kind][1]

    def of_rows(self, made: tuple[str, list[dict[str, Any]]]) -> None:
        kind, rows = made
        file = self._folder / "bad.jsonl"
        file.write_bytes(bad_inputs.as_jsonl(rows))
        recipe = str(self._rows[kind][0])
        self._ask("rows", f"{kind} {rows}", ["bad.", "data.", "task."], "check", recipe, "--set", f"data.source={file}")

    def _ask(self, kind: str, what: str, places: Sequence[str], *argv: str) -> None:
        code, lines, seconds = ask("distilpeft", *argv)
        case = judged(f"{kind}: {what[:160]}", code, lines, places)
        if case.outcome == "refused":
            self.slowest[kind] = max(self.slowest.get(kind, 0.0), round(seconds, 3))
        self._found.add(case)

    def of_recipe(self, made: dict[str, Any]) -> None:
        self._bad.write_text(yaml.safe_dump(made, allow_unicode=True))
        self._ask("recipe", json.dumps(made, default=str), ["bad.yaml", *self.tree], "check", str(self._bad))

    def of_text(self, content: bytes) -> None:
        self._bad.write_bytes(content)
        self._ask("text", repr(content), ["bad.yaml", *self.tree], "check", str(self._bad))

    def of_set(self, override: str) -> None:
        self._ask("set", repr(override), ["--set", *self.tree], "check", str(self.recipe), "--set", override)

    def of_data(self, made: tuple[str, bytes]) -> None:
        ending, content = made
        file = self._folder / f"bad.{ending}"
        file.write_bytes(content)
        source = f"data.source={file}"
        what = f"{ending} {content!r}"
        self._ask("data", what, ["bad.", "data."], "check", str(self.recipe), "--set", source)

    def of_run(self, made: tuple[str, bytes | None]) -> None:
        name, content = made
        good = (self._run / name).read_bytes()
        bad_inputs.put(self._run / name, content)
        what = f"{name} = {content!r}"
        self._ask("run", f"report, {what}", [str(self._folder)], "report", str(self._run))
        self._ask("run", f"predict, {what}", [str(self._folder)], "predict", str(self._run / "student"), "a good film")
        if not (content is None and name.endswith("manifest.json")):  # without it, the step would be done again
            runs = str(self._folder / "runs")
            self._ask("run", f"run, {what}", [str(self._folder)], "run", str(self.recipe), "--runs", runs)
        (self._run / name).write_bytes(good)

    def run(self, kind: str, count: int) -> None:
        """Ask of so many examples of a kind."""
        of_kind: Callable[[Any], None] = getattr(self, f"of_{kind}")

        def function(example: Any) -> None:  # hypothesis takes no methods
            of_kind(example)

        options = settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        given(self.strategy(kind))(seed(self._found.seed)(options(function)))()


def run(found: Found, count: int, folder: Path, kinds: Sequence[str] = tuple(SHARES)) -> None:
    """Generate about so many examples, of all kinds, and look at every answer."""
    asked = Inputs(found, folder)
    for kind in kinds:
        asked.run(kind, max(1, round(count * SHARES[kind])))
    found.more |= {"outcomes": dict(Counter(case.outcome for case in found.cases)), "slowest_refusal_s": asked.slowest}
