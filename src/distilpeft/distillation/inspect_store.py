"""`distilpeft targets inspect`: what a store of soft targets holds, and whether it is complete. Works without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft.data.sources import model_folder, resolve_model
from distilpeft.distillation.store import STORE, SoftTargets
from distilpeft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_IDS = 6


def find(path: Path) -> Path:
    """A store: the folder itself, or the newest one of a run.

    Raises:
        InputError: there is none.
    """
    files = [path / STORE, *path.glob(f"targets-*/{STORE}")]
    stores = [file.parent for file in files if file.is_file() and file.parent.suffix != ".partial"]
    if not stores:
        raise InputError(f"{path}: no soft targets here; give their folder, or a run's, such as runs/quickstart")
    return max(stores, key=lambda folder: (folder / STORE).stat().st_mtime)


def show(path: Path, num_rows: int, console: Console) -> None:
    """Verify every file, then print figures and what the first rows hold.

    Raises:
        InputError: there is no store, or a file was altered; it is named.
    """
    folder = find(path)
    store = SoftTargets(folder)
    with console.status(f"checking {len(store.store['shards'])} shards"):
        store.verify()
    console.print(f"{folder}: complete; all checksums match", highlight=False, soft_wrap=True)
    for name, value in facts(store).items():
        console.print(f"  {name:<22} {value}", highlight=False, soft_wrap=True)
    tokenizer = _tokenizer(store)
    for row in np.flatnonzero(store.positions_R)[:num_rows].tolist():
        console.print(_examples(store, row, tokenizer))


def facts(store: SoftTargets) -> dict[str, str]:
    """The store in plain words."""
    content, layout = store.store, store.layout
    measured = content["measured"]
    entries = {
        "kind": layout.kind
        + (f", {layout.count} {'draws' if layout.kind == 'sampled' else 'ids'}" if layout.count else ""),
        "vocabulary": f"{layout.vocabulary} ids of {layout.id_bits} bits; values of {layout.value_bits} bits",
        "temperatures": ", ".join(f"{t:g}" for t in layout.temperatures) or "any",
        "rows, positions": f"{content['num_rows']}, {content['num_positions']} in {len(content['shards'])} shards",
        "bytes": f"{measured['bytes'] / 1e6:.2f} MB, {measured['bytes_per_token']:.2f} per token",
    }
    units = {
        "ids_per_token": "{:.2f}", "captured_mass": "{:.2%} of the teacher's probability at temperature 1",
        "entropy_nats": "{:.3f} nats per token", "log_p_error": "{:.5f} nats, weighed by probability",
        "log_p_max_error": "{:.5f} nats",
    }  # fmt: skip
    entries |= {name.replace("_", " "): text.format(measured[name]) for name, text in units.items() if name in measured}
    return entries | {f"of {name}": str(value) for name, value in content["bound"].items()}


def _examples(store: SoftTargets, row: int, tokenizer: PreTrainedTokenizerBase) -> Table:
    """The first positions of a row: the likeliest kept ids, or those drawn most often."""
    table = Table(title=f"row {row}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("position", justify="right")
    table.add_column("kept: log-probability")
    kept = store.row(row)
    edges = np.concatenate([[0], np.cumsum(kept.sizes_N)])
    for position in range(min(3, len(kept))):
        part = slice(edges[position], edges[position + 1])
        values = kept.values[position] if store.layout.kind == "full" else kept.values[part]
        ids = np.arange(len(values)) if store.layout.kind == "full" else kept.ids_M[part]
        best = np.argsort(-values, kind="stable")[:SHOWN_IDS]
        cells = [f"{_text(tokenizer, int(ids[i]))} {values[i]:.2f}" for i in best]
        table.add_row(str(position), "   ".join(cells))
    return table


def _text(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    return repr(tokenizer.decode([number], skip_special_tokens=False)) if tokenizer is not None else f"#{number}"


def _tokenizer(store: SoftTargets) -> Any:
    """The teacher's tokenizer, if its file is on this machine; classes have none."""
    record = store.store.get("tokenizer")
    if not record:
        return None
    try:
        folder = model_folder(resolve_model(record["model"], "tokenizer", record.get("revision")).reader)
    except InputError:
        return None
    if folder is None or not (folder / "tokenizer.json").is_file() or store.layout.vocabulary < 2**8:
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))
