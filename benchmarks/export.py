"""A run's models and exports beside its student in eager PyTorch, three times over: how far can it be trusted?

    distilpeft run recipes/sentiment_reviews.yaml
    python benchmarks/export.py                       # 7 to 15 minutes; results/export_cpu.json
    python benchmarks/export.py --table               # Markdown from the result file, into docs and README

The measurement is `distilpeft benchmark RUN --repeat 3` at twice the usual precision, each time in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import page

HERE = Path(__file__).parent
RESULT = HERE / "results" / "export_cpu.json"
DOCS = HERE.parent / "docs"
PRECISION = 0.05
STUDENT, INT8 = "student", "export:onnx-int8"


def run(options: argparse.Namespace) -> None:
    report = json.loads((options.run / "report.json").read_text())
    command = [sys.executable, "-m", "distilpeft", "benchmark", str(options.run), "--repeat", str(options.repeats)]
    command += ["--set", f"benchmark.precision={PRECISION}"]
    subprocess.run([*command, "--out", str(RESULT)], check=True)
    result = json.loads(RESULT.read_text())
    del result["targets"]  # paths of this machine
    result["sizes"] = {model["role"]: model["size_bytes"] for model in report["models"]}
    result["ways"] = {f"export:{form}": made["way"] for form, made in report["exports"].items() if "way" in made}
    result["recipe"] = report["recipe"]
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def cells(result: dict[str, Any], role: str, size: int) -> list[dict[str, Any]]:
    """A model's figures at a batch size, of every repeat."""
    return [
        cell
        for repeat in result["repeats"]
        for arm in repeat["arms"]
        for cell in arm["cells"]
        if arm["role"] == role and cell["batch_size"] == size
    ]


def roles(result: dict[str, Any]) -> list[str]:
    return [arm["role"] for arm in result["repeats"][0]["arms"]]


def sizes(result: dict[str, Any]) -> list[int]:
    return [cell["batch_size"] for cell in result["repeats"][0]["arms"][0]["cells"]]


def exports_table(result: dict[str, Any]) -> str:
    """The exports: what they cost and keep."""
    scores = result["scores"]
    lines = [
        "| model | accuracy | of the student's | MB | memory MB | ms, 1 row | x (95 %) | x, 32 rows |",
        "| --- " * 8 + "|",
    ]
    memory = {arm["role"]: arm["memory_bytes"] for arm in result["repeats"][-1]["arms"]}
    for role in [STUDENT, *(role for role in roles(result) if role.startswith("export:"))]:
        one, many = (cells(result, role, size) for size in sizes(result))
        way = f" ({result['ways'][role]})" if role in result["ways"] else ""
        found = (
            role.removeprefix("export:") + way,
            f"{scores[role]:.4f}",
            f"{scores[role] / scores[STUDENT]:.1%}",
            f"{result['sizes'][role] / 1e6:.1f}",
            f"{memory[role] / 1e6:.0f}",
            f"{median(cell['latency_ms']['p50'] for cell in one):.2f}",
            spread(one[-1]["ratio"]),
            spread(many[-1]["ratio"]),
        )
        lines.append(f"| {' | '.join(found)} |")
    return "\n".join([*lines, "", f"{where(result)}; x: the last of three repeats."])


def spread(ratio: dict[str, float] | None) -> str:
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "1"


def repeats_table(result: dict[str, Any]) -> str:
    """The ratios of every repeat, and how far they are apart."""
    titles = ["model", "rows", *(f"repeat {at + 1}" for at in range(len(result["repeats"]))), "apart", "p50 ms"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for role in roles(result):
        for size in sizes(result):
            every = cells(result, role, size)
            if role != STUDENT:
                values = [cell["ratio"]["value"] for cell in every]
                times = " / ".join(f"{cell['latency_ms']['p50']:.1f}" for cell in every)
                found = [
                    role,
                    str(size),
                    *(f"{value:.3f}" for value in values),
                    f"{max(values) / min(values) - 1:.1%}",
                    times,
                ]
                lines.append(f"| {' | '.join(found)} |")
    apart = result["agreement"]["apart"].values()
    noise = [f"{repeat['noise']['spread']:.0%}" for repeat in result["repeats"]]
    lines += ["", f"{where(result)}. Times as fast as the student in PyTorch; the ratios of the repeats are at most "
              f"{max(apart):.1%} apart, {median(apart):.1%} in the median; the student's own latency spread by "
              f"{', '.join(noise)} within a repeat (interquartile range over median)."]  # fmt: skip
    return "\n".join(lines)


def where(result: dict[str, Any]) -> str:
    environment, settings = result["environment"], result["settings"]
    machine = f"{environment['device']}, {environment['threads']} threads"
    return f"{result['recipe']} on {machine}, {settings['rounds']} rounds at least"


def sentence(result: dict[str, Any]) -> str:
    before, after = (result["sizes"][role] / 1e6 for role in (STUDENT, INT8))
    faster = cells(result, INT8, 1)[-1]["ratio"]["value"]
    return (
        f"As int8 ONNX the student is {after:.1f} MB instead of {before:.1f} and {faster:.1f}x as fast at batch 1, "
        f"with {result['scores'][INT8] / result['scores'][STUDENT]:.1%} of its accuracy "
        "([measured](docs/export.md#int8-that-holds))."
    )


def show() -> None:
    """Put the tables and the sentence into the pages."""
    result = json.loads(RESULT.read_text())
    page.insert(DOCS / "export.md", "export", exports_table(result))
    page.insert(HERE.parent / "README.md", "export", sentence(result))
    page.show(DOCS / "benchmark.md", "export", repeats_table(result))


def main() -> None:
    parser = page.parser(__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/sentiment_reviews"))
    parser.add_argument("--repeats", type=int, default=3)
    page.run_or_show(parser, run, show)


if __name__ == "__main__":
    main()
