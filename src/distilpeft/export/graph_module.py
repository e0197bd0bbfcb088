"""Exported folders as modules: what transformers loads, and graphs that answer as a transformers model would.

So evaluation and timing treat an export like any other model.

    B  rows    S  positions    C  classes    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from distilpeft.data.sources import Source
from distilpeft.export.generation import write_rows
from distilpeft.export.manifest import read_manifest
from distilpeft.export.runtimes import GraphRunner, load_exported, open_runner
from distilpeft.machine.runtime import Runtime
from distilpeft.models.pair import Loaded, Pair
from distilpeft.recipe.export import FORMS
from distilpeft.tasks.rows import RowReader

LOGITS_BYTES = 256 << 20
"""Bytes of the logits of all positions that a graph of a language model may give at once."""


class _Same(nn.Identity):
    """A head for what are logits already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_features = width


class _Output(SimpleNamespace):
    """What transformers models return: attributes, of which `in` tells the names."""

    def __contains__(self, name: str) -> bool:
        return name in vars(self)


class Graph(nn.Module):
    """A graph with the face of a transformers model.

    To the fused scores of language models its last hidden states are the logits, and its head changes nothing.
    """

    def __init__(self, runner: GraphRunner, device: torch.device, ends: Sequence[int] = ()) -> None:
        super().__init__()
        self.runner, self.device = runner, device
        self.generation_config = GenerationConfig(decoder_start_token_id=runner.start, eos_token_id=list(ends) or None)
        self.head = _Same(runner.width)
        self.logit_shape = (1.0, None, False)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """`logits` of [B, C], or [B, S, V]."""
        arrays = {name: array.cpu().numpy() for name, array in inputs.items() if isinstance(array, Tensor)}
        return _Output(logits=torch.from_numpy(self.runner.run(arrays)[0]).to(self.device))

    def base_model(self, **inputs: Any) -> SimpleNamespace:
        """`last_hidden_state`: see above."""
        return SimpleNamespace(last_hidden_state=self(**inputs).logits)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels [B, T] moved on by one behind the token that answers begin with."""
        first = torch.full_like(labels[:, :1], self.generation_config.decoder_start_token_id)
        return torch.cat([first, labels[:, :-1].clamp(min=0)], dim=1)  # behind a row's end is no target

    def generate(self, generation_config: Any, **inputs: Tensor) -> list[list[int]]:
        """What it makes of each source: always the likeliest token, whatever the settings say of beams."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
        ends = self.generation_config.eos_token_id or ()
        return write_rows(self.runner, arrays, generation_config.max_new_tokens, ends)

    def get_output_embeddings(self) -> nn.Module:
        """See above."""
        return self.head


def rows_at_once(model: nn.Module, rows: int, max_tokens: int) -> int:
    """At most `rows`, and of a graph as many as have logits of `LOGITS_BYTES`."""
    if not isinstance(model, Graph):
        return rows
    return max(1, min(rows, LOGITS_BYTES // (4 * max_tokens * model.runner.width)))


def open_exported(folder: Path, device: torch.device) -> Any:
    """An exported folder as a frozen module.

    Args:
        folder: with manifest.json.
        device: for what transformers loads; graphs go where their runtime puts them.
    """
    manifest = read_manifest(folder)
    if FORMS[manifest["format"]].runtime == "transformers":
        return load_exported(folder, manifest, device)
    runner = open_runner(folder, torch.get_num_threads())
    assert isinstance(runner, GraphRunner)
    return Graph(runner, device, manifest.get("eos_token_ids", ())).eval()


def load_export(runtime: Runtime, pair: Pair, folder: Path) -> Loaded:
    """An exported folder in its own runtime, as a frozen module."""
    tokenizer = pair.load_reader(Source(str(folder), folder))
    model = open_exported(folder, runtime.device)
    if not isinstance(model, Graph):
        pair.task.prepare(model)
    return Loaded(model, RowReader(tokenizer, pair.student_reader.digest))
