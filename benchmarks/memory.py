"""Whether memory grows with the data: caching soft targets and distilling on 10,000 and on 1,000,000 rows.

    python benchmarks/memory.py            # makes rows and tiny models in a temporary folder; 15 minutes on two cores
    python benchmarks/memory.py --table    # Markdown from the result file, and into docs/devices.md

Two commands, each a process of its own and begun from nothing but the rows: `distilpeft run` until `targets` (read,
check and tokenise all rows, tune a teacher for a few steps, keep the soft targets of all rows) and then until `distil`
(two students, for a few steps, on the order and the soft targets of all rows). Memory is VmHWM, the most that was ever
resident. It holds mapped pages of files, which the system drops when it needs the memory: sampled apart, as is what
belongs to the process alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import page
import yaml

RESULT = Path(__file__).parent / "results" / "memory_cpu.json"
PAGE = Path(__file__).parent.parent / "docs" / "devices.md"
WORDS = [f"word{index}" for index in range(200)]
EVERY_S = 0.05
FIELDS = {"VmHWM": "peak", "RssAnon": "own", "RssFile": "mapped"}


def save_model(folder: Path) -> None:
    """A tiny random classifier's body with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(str(folder))
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8,
            max_position_embeddings=16,
        )
    ).save_pretrained(str(folder))  # fmt: skip


def write_rows(file: Path, count: int, seed: int) -> None:
    """Texts of four to eight words, whose class is told by the first one."""
    rng = random.Random(seed)
    with file.open("w", encoding="utf-8") as out:
        for index in range(count):
            words = rng.choices(WORDS, k=rng.randint(3, 7))
            out.write(json.dumps({"text": " ".join([WORDS[index % 2], *words]), "label": index % 2}) + "\n")


def recipe(folder: Path) -> dict[str, Any]:
    fit = {"epochs": 1, "max_steps": 20, "batch_size": 64, "micro_batch_size": 64, "precision": "fp32"}
    return {
        "name": "memory",
        "task": {"kind": "text_classification", "text": "text", "label": "label", "labels": ["zero", "one"]},
        "data": {
            "source": {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "test")},
            "train": "train", "validation": "validation", "test": "test", "max_tokens": 16,
        },
        "teacher": {
            "model": str(folder / "base"), "quantize": "none", "lora": {"rank": 2, "alpha": 4}, "gate": "warn",
            "optim": {"lr": 0.01}, "fit": fit,
        },
        "targets": {"precision": "fp32", "micro_batch_size": 1024},
        "student": {"from_teacher": {"layers": [1]}},
        "distil": {"alpha": 0.5, "temperature": 2.0, "optim": {"lr": 0.01}, "fit": fit},
    }  # fmt: skip


def watched(command: list[str]) -> dict[str, float]:
    """Run a command; the most memory that its process ever held, in bytes, and seconds."""
    begin = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = dict.fromkeys(FIELDS.values(), 0.0)
    while child.poll() is None:
        for line in _status(child.pid):
            name = FIELDS.get(line.partition(":")[0])
            if name:
                most[name] = max(most[name], float(line.split()[1]) * 1024)
        time.sleep(EVERY_S)
    assert child.returncode == 0, f"exit code {child.returncode}: {' '.join(command)}"
    return {**most, "seconds": time.monotonic() - begin}


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return []


def run(options: argparse.Namespace) -> None:
    found = []
    for count in options.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_model(folder / "base")
            for seed, (split, rows) in enumerate({"train": count, "validation": 500, "test": 500}.items()):
                write_rows(folder / f"{split}.jsonl", rows, seed)
            (folder / "memory.yaml").write_text(yaml.safe_dump(recipe(folder)))
            for stage in ("targets", "distil"):
                command = [sys.executable, "-m", "distilpeft", "run", str(folder / "memory.yaml")]
                measured = watched([*command, "--runs", str(folder / "runs"), "--until", stage])
                found.append({"rows": count, "stage": stage, **measured})
                print(f"{count} rows, {stage}: {measured['peak'] / 1e6:.0f} MB", file=sys.stderr)
    versions = {name: metadata.version(name) for name in ("torch", "datasets", "transformers", "numpy")}
    result = {"environment": {"python": platform.python_version(), "versions": versions}, "runs": found}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"results in {RESULT}", file=sys.stderr)


def table() -> str:
    runs = json.loads(RESULT.read_text())["runs"]
    lines = ["| command | rows | peak | its own | mapped files | s |", "| --- " * 6 + "|"]
    titles = {"targets": "read, tokenise, cache", "distil": "distil"}
    for one in runs:
        sizes = " | ".join(f"{one[name] / 1e6:.0f} MB" for name in FIELDS.values())
        lines.append(f"| {titles[one['stage']]} | {one['rows']:,} | {sizes} | {one['seconds']:.0f} |")
    for stage, title in titles.items():
        first, last = [one for one in runs if one["stage"] == stage][:: max(1, len(runs) // 2 - 1)][:2]
        grown = ", ".join(f"{what} {(last[name] - first[name]) / 1e6:+.0f} MB" for name, what in
                          (("peak", "peak"), ("own", "its own")))  # fmt: skip
        lines += ["", f"{title[0].upper()}{title[1:]}, from {first['rows']:,} to {last['rows']:,} rows: {grown}."]
    return "\n".join(lines)


def main() -> None:
    parser = page.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    page.run_or_show(parser, run, lambda: page.show(PAGE, "memory", table()))


if __name__ == "__main__":
    main()
