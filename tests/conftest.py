"""What all tests share: no network, no cache outside the session's own folder, and a small recipe with its files."""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
import socket
import struct
import tempfile
from pathlib import Path

import hypothesis  # noqa: F401 - before gc.freeze in support.commands: it looks for what refers to an object
import pytest

_HOME = tempfile.mkdtemp(prefix="distilpeft-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE"):
    os.environ.pop(_name, None)
os.environ.update(
    {"HF_HOME": _HOME, "XDG_CACHE_HOME": _HOME, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
)  # before anything imports datasets

RECIPE = """\
name: small
task:
  kind: text_classification
  text: text
  label: label
  labels: [bad, good]
data:
  source: rows.csv
  split: {train: 0.6, validation: 0.2, test: 0.2}
  max_tokens: 16
teacher:
  model: base
  quantize: nf4
  lora: {rank: 4}
  optim: {lr: 1e-3}
  fit:
    epochs: 1
    batch_size: 4
student:
  from_teacher: {layers: [1]}
distil:
  alpha: 0.5
  temperature: 2
  optim: {lr: 1e-3}
  fit: {epochs: 1, batch_size: 4}
"""
ROWS = "text,label\n" + "".join(f"film {number},{'good' if number % 2 else 'bad'}\n" for number in range(1, 11))


LONGEST = (
    "test_golden.py", "test_export.py", "test_tasks.py", "test_onnx.py", "test_language.py", "test_kinds.py",
    "test_sweep.py", "test_run.py", "test_search.py", "test_selftest.py", "test_stops.py", "test_new_task.py",
    "test_seq2seq.py", "test_cached.py",
)  # fmt: skip
"""Files that start first, so that with `--dist loadfile` no process is left alone with a long one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the rest stays in its order."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    connect = socket.socket.connect

    def loopback_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reached for the network: {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", loopback_only)
        yield


def _safetensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def _fill(folder: Path) -> Path:
    """The small recipe, its rows and a model folder whose files were written without torch."""
    base = folder / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 8}))
    shapes: dict[str, tuple[int, ...]] = {"bert.embeddings.word_embeddings.weight": (16, 8)}
    for layer in range(2):
        for name in ("attention.self.query", "attention.self.value", "output.dense"):
            shapes[f"bert.encoder.layer.{layer}.{name}.weight"] = (8, 8)
            shapes[f"bert.encoder.layer.{layer}.{name}.bias"] = (8,)
    (base / "model.safetensors").write_bytes(_safetensors(shapes))
    words = {"[PAD]": 0, "[UNK]": 1, "film": 2, **{str(number): number + 2 for number in range(1, 11)}}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    (base / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model})
    )
    (folder / "rows.csv").write_text(ROWS)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def safetensors_bytes():
    """Function: name → shape to the bytes of a safetensors file full of zeros."""
    return _safetensors


@pytest.fixture(scope="session")
def fill_folder():
    """Function: put recipe.yaml, rows.csv and base/ into a folder."""
    return _fill


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with recipe.yaml, rows.csv and base/ in it."""
    _fill(tmp_path / "workplace")
    monkeypatch.chdir(tmp_path / "workplace")
    return tmp_path / "workplace"
