"""Break runs on purpose and see that nothing is lost and nothing silently wrong; each command prints a line per case.

    python tests/faults.py kills --count 100 --seed 1     # kill -9 at random instants; the same command ends the same
    python tests/faults.py flips --count 200 --seed 1     # flip a bit of a file; it is found before it is used
    python tests/faults.py full --seed 1                  # the disk is full at every place that writes
    python tests/faults.py inputs --count 500 --seed 1    # recipes, data, overrides and folders that make no sense

Exit code 1 if a case failed; `--out FILE` keeps the figures as JSON. The tests run the same with fewer cases.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support import commands, inputs
from support.cases import Case, Found

from distilpeft.data.sources import resolve
from distilpeft.errors import InputError
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.files import files_below
from distilpeft.planning.plan import Plan, make_plan
from distilpeft.recipe.yaml_file import load_recipe

ROOT = Path(__file__).parents[1]
STAGES = ("teacher", "targets", "distil", "export")
REAL = [
    "data.where={}", "data.split={train: 0.64, validation: 0.18, test: 0.18, seed: 7}",
    "teacher.fit={epochs: 1, batch_size: 32, micro_batch_size: 32, save_every: 2, monitor: log_loss}",
    "teacher.gate=warn", "distil.ce_only_baseline=false", "evaluate.teacher_full_precision=false",
    "distil.fit={epochs: 1, batch_size: 32, micro_batch_size: 32, save_every: 2, monitor: log_loss}",
    "export={formats: [safetensors, onnx], gate_rows: 64}",
]  # fmt: skip
"""The quickstart's models on so few rows that a whole run takes seconds."""
WAIT_S = 600.0


@dataclass
class Bench:
    """A run that is to be disturbed: the recipe with its settings, and how it ends when nothing happens."""

    recipe: Path
    settings: list[str]
    folder: Path

    def arguments(self, runs: Path, verb: str = "run", *more: str) -> list[str]:
        given = [part for one in self.settings for part in ("--set", one)]
        return ["distilpeft", verb, str(self.recipe), "--runs", str(runs), *given, *more]

    def plan(self, runs: Path) -> Plan:
        return make_plan(load_recipe(self.recipe, self.settings), runs)

    def files(self, runs: Path) -> dict[str, str]:
        """SHA-256 of every file of every published artifact, but for those that tell how fast the models were."""
        found = {}
        for made in self.plan(runs).artifacts.values():
            if made.done:
                made.verify()
                files = made.manifest()["files"].items()
                found |= {
                    f"{made.path.name}/{name}": told["sha256"] for name, told in files if not tells_time(made, name)
                }
        return found


def tells_time(made: Artifact, name: str) -> bool:
    """Whether a file has latencies in it."""
    return made.stage == "bundle" and name in ("model/README.md", "model/manifest.json")


def tiny(folder: Path, **changes: object) -> Bench:
    """Models and rows of the tests: seconds."""
    changes = {"teacher__lora__dropout": 0.1, "distil__ce_only_baseline": False} | changes
    return Bench(commands.workspace(folder, **changes), [], folder)


def real(folder: Path) -> Bench:
    """The quickstart's pretrained models, the teacher in NF4."""
    recipe = ROOT / "recipes" / "quickstart.yaml"
    source = resolve(str(load_recipe(recipe).data.source), "data.source").path
    with source.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(random.Random(0).sample(rows, 400))
    return Bench(recipe, [*REAL, f"data.source={folder / 'rows.csv'}"], folder)


def start(output: Path, argv: list[str], before: str = "", **environment: str) -> Any:
    """A process of the command line that has the libraries imported; what it prints goes into `output`."""
    output.unlink(missing_ok=True)
    told = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], **environment}  # the server may have begun with another
    process = commands.FORKS.Process(target=commands._child, args=(output, argv, before, told))
    process.start()
    return process


def finish(process: Any, output: Path) -> commands.Done:
    process.join(WAIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
    return commands.Done(process.exitcode, output.read_text(errors="replace"))


def run(bench: Bench, runs: Path, *more: str, verb: str = "run", **environment: str) -> commands.Done:
    output = bench.folder / "output.txt"
    return finish(start(output, bench.arguments(runs, verb, *more), **environment), output)


def undisturbed(bench: Bench, until: str) -> tuple[Path, dict[str, str], dict[str, float]]:
    """A whole run: its folder, the digests of what it made, and how long each stage took."""
    runs = bench.folder / "undisturbed"
    done = run(bench, runs, "--until", until)
    assert done.returncode == 0, done.output
    seconds: Counter[str] = Counter()
    for step, made in bench.plan(runs).artifacts.items():
        if made.done:
            seconds[step.partition("/")[0]] += made.manifest()["seconds"]
    return runs, bench.files(runs), dict(seconds)


def before_stage(bench: Bench, whole: Path, stage: str, runs: Path) -> None:
    """A folder in which everything before a stage is done, and the stage is not."""
    shutil.rmtree(runs, ignore_errors=True)
    made = bench.plan(whole).artifacts
    first = min(index for index, step in enumerate(made) if step.partition("/")[0] == stage)
    for step in list(made)[:first]:
        path = made[step].path
        if path.is_dir():
            shutil.copytree(path, runs / path.parent.name / path.name, copy_function=_link)


def _link(source: str, target: str) -> None:
    """Published files are never written again; if one were, its digest would tell."""
    os.link(source, target)


def kills(bench: Bench, found: Found, count: int, stages: tuple[str, ...] = STAGES) -> None:
    """kill -9 a run at a random instant of a random stage, then give the same command: it has to end the same."""
    rng = random.Random(found.seed)
    whole, wanted, seconds = undisturbed(bench, "export")
    found.more["undisturbed_s"] = seconds
    output, runs = bench.folder / "killed.txt", bench.folder / "runs"
    for number in range(count):
        stage = stages[number % len(stages)]
        before_stage(bench, whole, stage, runs)
        after = rng.uniform(0, seconds[stage])
        process = start(output, bench.arguments(runs, "run", "--until", "export"))
        began = _wait_for(output, f"] {stage}", process)
        process.join(after)
        process.kill()
        process.join()
        if not began:
            found.add(Case(f"{stage} after {after:.2f} s", "never began", output.read_text()[-500:]))
            continue
        killed = process.exitcode == -signal.SIGKILL
        at = _progress(output.read_text(errors="replace"))
        done = run(bench, runs, "--until", "export")
        what = f"{stage} killed after {after:.2f} s{at}" if killed else f"{stage}: had ended before {after:.2f} s"
        found.add(Case(what, f"exit {done.returncode}", _difference(bench, runs, wanted, done)))


def _difference(bench: Bench, runs: Path, wanted: dict[str, str], done: commands.Done) -> str:
    """How a run differs from the undisturbed one."""
    if done.returncode != 0:
        return done.output[-800:]
    files = bench.files(runs)
    other = sorted(name for name in files.keys() | wanted.keys() if files.get(name) != wanted.get(name))
    left = [path.name for path in (runs / bench.plan(runs).folder.name).glob("*.partial")]
    return f"differ: {other}" if other else f"left: {left}" if left else ""


def _wait_for(output: Path, text: str, process: Any) -> bool:
    begin = time.monotonic()
    while time.monotonic() - begin < WAIT_S:
        if output.is_file() and text in output.read_text(errors="replace"):
            return True
        if process.exitcode is not None:
            return False
        time.sleep(0.01)
    return False


def _progress(output: str) -> str:
    steps = re.findall(r"resuming after step (\d+)", output)
    return f" (resumed at {steps[-1]})" if steps else ""


def damage(file: Path, rng: random.Random) -> str:
    """Flip one bit of a file, as a file of its own: others may be the same one under another name."""
    content = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << (bit % 8)
    file.unlink()
    file.write_bytes(content)
    return f"{file.name}, bit {bit} of {8 * len(content)}"


CONSUMERS = {"teacher": "targets", "targets": "distil", "distil": "evaluate", "evaluate": "compare",
             "export": "benchmark", "benchmark": "bundle"}  # fmt: skip
"""Stage → the first one that reads what it has left."""
HEALED = ("rows", "tokens", "checkpoint", "shard")
"""What can be made again from what is there: the run says nothing or a line, and ends the same."""


class Flips:
    """A finished run, and copies of it in which one bit is another one."""

    def __init__(self, bench: Bench, found: Found) -> None:
        self._bench, self._found, self._rng = bench, found, random.Random(found.seed)
        self._whole, self._wanted, _ = undisturbed(bench, "bundle")
        done = run(bench, self._whole)  # the report
        assert done.returncode == 0, done.output
        self._runs = bench.folder / "runs"
        self._home = Path(os.environ["XDG_CACHE_HOME"])
        self._stopped = {
            "checkpoint": self._stop("teacher", commands.signal_at("teacher", 9, "SIGKILL"), "checkpoints/*/*"),
            "shard": self._stop("targets", KILL_AFTER_SHARDS, "shard-*"),
        }

    def _stop(self, stage: str, before: str, pattern: str) -> tuple[Path, str, str]:
        """A run that was killed in the middle of a stage."""
        runs, output = self._bench.folder / f"stopped-{stage}", self._bench.folder / "stopped.txt"
        before_stage(self._bench, self._whole, stage, runs)
        finish(start(output, self._bench.arguments(runs, "run", "--until", stage), before), output)
        partial = self._bench.plan(runs).artifacts[stage].partial
        assert list(partial.glob(pattern)), output.read_text()
        return runs, stage, pattern

    def kinds(self) -> list[str]:
        return [*CONSUMERS, *HEALED, "bundle", "report"]

    def flip(self, kind: str) -> None:
        """One bit of one file of a kind, and what the command says that uses it."""
        if kind in ("bundle", "report"):
            self._in_whole(kind)
        elif kind in self._stopped:
            self._in_stopped(kind)
        elif kind in HEALED:
            self._in_cache(kind)
        else:
            self._in_artifact(kind)

    def _pick(self, files: list[Path]) -> Path:
        return self._rng.choice(sorted(file for file in files if file.stat().st_size))

    def _in_artifact(self, stage: str) -> None:
        before_stage(self._bench, self._whole, CONSUMERS[stage], self._runs)
        steps = {step: made for step, made in self._bench.plan(self._runs).artifacts.items() if made.done}
        made = self._rng.choice([made for step, made in steps.items() if step.partition("/")[0] == stage])
        what = damage(self._pick(files_below(made.path)), self._rng)
        done = run(self._bench, self._runs, "--until", CONSUMERS[stage])
        self._refused(f"{stage}: {what}", done, what.partition(",")[0])

    def _in_whole(self, kind: str) -> None:
        """What users have in hand: the bundle, through `predict` and `push`, and the report."""
        folder = self._bench.plan(self._whole).folder
        files = [folder / "report.json"] if kind == "report" else files_below((folder / "student").resolve())
        file = self._pick(files)
        good, links = file.read_bytes(), file.stat().st_nlink
        what = damage(file, self._rng)
        argv = ["distilpeft", "report", str(folder)]
        if kind == "bundle":
            argv = ["distilpeft", "push", str(folder / "student"), "me/mine", "--dry-run"]
            if file.name != "README.md" and self._rng.random() < 0.5:
                argv = ["distilpeft", "predict", str(folder / "student"), "a good film"]
        output = self._bench.folder / "output.txt"
        done = finish(start(output, argv), output)
        file.write_bytes(good)
        self._refused(f"{kind} ({argv[1]}, {links} links): {what}", done, file.name)

    def _in_stopped(self, kind: str) -> None:
        stopped, stage, pattern = self._stopped[kind]
        shutil.rmtree(self._runs, ignore_errors=True)
        shutil.copytree(stopped, self._runs, symlinks=True)
        made = self._bench.plan(self._runs).artifacts[stage]
        what = damage(self._pick([file for file in made.partial.glob(pattern) if file.is_file()]), self._rng)
        self._healed(f"{kind}: {what}", stage)

    def _in_cache(self, kind: str) -> None:
        shutil.rmtree(self._runs, ignore_errors=True)
        folder = self._bench.plan(self._runs).folder
        cache = self._home / "distilpeft" / "rows"
        if kind == "tokens":
            shutil.copytree(self._bench.plan(self._whole).folder / "cache", cache := folder / "cache")
        what = damage(self._pick([file for file in cache.rglob("*") if file.suffix in (".arrow", ".json")]), self._rng)
        self._healed(f"{kind}: {what}", "teacher")

    def _refused(self, what: str, done: commands.Done, name: str) -> None:
        said = done.output.strip().splitlines()[-1] if done.output.strip() else ""
        right = done.returncode == 2 and "Traceback" not in done.output and said.startswith("error: ") and name in said
        self._found.add(
            Case(what, "refused" if right else f"exit {done.returncode}", "" if right else done.output[-600:])
        )

    def _healed(self, what: str, stage: str) -> None:
        done = run(self._bench, self._runs, "--until", stage)
        files = self._bench.files(self._runs) if done.returncode == 0 else {}
        right = bool(files) and all(self._wanted[name] == sha256 for name, sha256 in files.items())
        self._found.add(
            Case(what, "made again" if right else f"exit {done.returncode}", "" if right else done.output[-600:])
        )


KILL_AFTER_SHARDS = """
import os, signal
from distilpeft.distillation.store import Writer
write = Writer.write
def write_then_stop(self, shard, rows, measured):
    write(self, shard, rows, measured)
    os.kill(os.getpid(), signal.SIGKILL)
Writer.write = write_then_stop
"""


def flips(bench: Bench, found: Found, count: int) -> None:
    """Flip so many bits, of all kinds of files in turn: each has to be found before it is used."""
    flipped = Flips(bench, found)
    kinds = flipped.kinds()
    for number in range(count):
        flipped.flip(kinds[number % len(kinds)])
    found.more["kinds"] = dict(Counter(case.what.partition(":")[0].partition(" ")[0] for case in found.cases))


def library(folder: Path) -> Path:
    """full_disk.c, compiled."""
    made = folder / "full_disk.so"
    source = Path(__file__).with_name("full_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(made), str(source), "-ldl"], check=True)
    return made


def site(line: str) -> tuple[str, str]:
    """A call of the log: its kind, and its path with a star for what is random in it."""
    op, _, path = line.partition(" ")
    path = re.sub(r"(/\.tmp)\w{6}$", r"\1*", path)  # safetensors'
    path = re.sub(r"(/tmp)[a-z0-9_]{8}(?=/|$)", r"\1*", path)  # Python's
    path = re.sub(r"(/\.[^/]+\.)[a-z0-9_]{8}$", r"\1*", path)  # ours
    return op, re.sub(r"/\.shared-\w+$", "/.shared-*", path)


def full(bench: Bench, found: Found, most: int | None = None, only: str = "") -> None:
    """Let the disk be full from each place on that writes; then give the same command with a free one."""
    runs, home, log = bench.folder / "runs", Path(os.environ["XDG_CACHE_HOME"]), bench.folder / "log.txt"
    os.environ["LD_PRELOAD"] = str(library(bench.folder))
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    under = {"FAULT_UNDER": f"{runs}:{home}"}
    done = run(bench, runs, **under, FAULT_LOG=str(log))
    assert done.returncode == 0, done.output
    wanted = bench.files(runs)
    whole = bench.folder / "whole"
    runs.rename(whole)
    classes: dict[tuple[str, str], tuple[str, str]] = {}
    for op, path in map(site, log.read_text().splitlines()):
        classes.setdefault((op, re.sub(r"step-\d+|[0-9a-f]{12,}|\d+(?=\.npy)", "N", path)), (op, path))
    sites = list(classes.values())
    found.more["places"] = len(sites)
    if most is not None:
        sites = random.Random(found.seed).sample(sites, min(most, len(sites)))
    if only:
        sites = [place for place in sites if only in place[1]]
    for op, path in sites:
        _prepare(bench, whole, runs, home, path)
        done = run(bench, runs, **under, FAULT_OP=op, FAULT_PATH=path)
        what = f"{op} {path.removeprefix(str(bench.folder))}"
        said = done.output.strip().splitlines()[-1]
        if done.returncode == 0:
            found.add(Case(what, "not reached", _difference(bench, runs, wanted, done)))
            continue
        right = done.returncode == 2 and "Traceback" not in done.output and "No space left on device" in done.output
        try:
            bench.files(runs)  # whatever is published is whole
            again = _difference(bench, runs, wanted, run(bench, runs))
        except InputError as error:
            again = str(error)
        found.add(Case(what, f"exit {done.returncode}: {said[:160]}", again if right else done.output[-800:]))
    found.more["outcomes"] = dict(Counter(case.outcome.partition(":")[0] for case in found.cases))


def _prepare(bench: Bench, whole: Path, runs: Path, home: Path, path: str) -> None:
    """Everything before the stage in which a path is written; nothing at all for what all stages share."""
    stage = re.search(r"/([a-z]+)-[0-9a-f]{12}(\.partial)?(/|$)", path)
    if stage is None:
        shutil.rmtree(runs, ignore_errors=True)
    else:
        before_stage(bench, whole, stage.group(1), runs)
    if path.startswith(str(home)):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()


COMMANDS: dict[str, Callable[[Found, argparse.Namespace, Path], None]] = {
    "flips": lambda found, given, folder: flips(tiny(folder), found, given.count or 200),
    "full": lambda found, given, folder: full(tiny(folder), found, given.count, given.only),
    "kills": lambda found, given, folder: kills(real(folder), found, given.count or 100),
    "inputs": lambda found, given, folder: inputs.run(found, given.count or 1000, folder),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="of `full`: places whose path holds this")
    wanted = parser.parse_args()
    found, begin = Found(wanted.command, wanted.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="distilpeft-faults-") as folder:
        # One thread each, or those of two runs would wait for each other.
        home = str(Path(folder) / "home")
        os.environ |= {"XDG_CACHE_HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        COMMANDS[wanted.command](found, wanted, Path(folder))
    found.seconds = round(time.monotonic() - begin, 1)
    good = len(found.cases) - len(found.failed)
    sys.stdout.write(f"{wanted.command}: {good} of {len(found.cases)} in {found.seconds:.0f} s; {found.more}\n")
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(asdict(found), indent=1).replace(folder, "") + "\n")
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
