"""Exported folders, each in its own runtime: arrays in, arrays out.

An ONNX or OpenVINO folder is opened without torch and without transformers; the other forms as any user of transformers
would. The parity gate, evaluation, timing, `distilpeft predict` and greedy generation all come through here. Started as
`python -m distilpeft.runners`, it answers the gate's calls in a process that has seen nothing but the exported files.

    B  rows    S  positions    P  positions in the cache    C  classes    V  vocabulary
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distilpeft.data.vocabulary import TYPES
from distilpeft.errors import InputError
from distilpeft.machine.files import digest_file, read_sealed
from distilpeft.recipe.export import FORMS
from distilpeft.recipe.task import KINDS
from distilpeft.tasks.outputs import logits_of, pooled

MANIFEST = "manifest.json"
START = "decoder_start_token_id"
PAST = "past_key_values."
DECODER = "decoder_input_ids"
PIXELS = "pixel_values"
Inputs = Mapping[str, NDArray[Any]]
STEPS = 4
"""Single tokens after a cut, in calls that go through the cache; the rest follows at once."""


class Runner(Protocol):
    """A loaded model.

    Attributes:
        start: the token that answers begin with, of a model that reads a whole source first; else None. Such a model
            takes `decoder_input_ids` [B, T] with the source, and in later calls only new ones, beside the source's
            mask; its logits are of these.
    """

    start: int | None

    def run(self, inputs: Inputs, cache: Any = None, *, last: bool = False) -> tuple[NDArray[Any], Any]:
        """Logits [B, C], or [B, S, V] and what was computed of these positions.

        Args:
            inputs: input_ids [B, S] and attention_mask [B, P + S], int64.
            cache: what an earlier call returned, of P positions.
            last: only the last position's logits are wanted; a runtime that can spares itself the others.
        """


class GraphRunner:
    """A graph in any runtime: names, empty caches, and several documents in one row.

    Args:
        compute: feeds → outputs, logits first.
        caches: its cache inputs: name, (heads, units of a head), dtype.
        width: logits of a row or position.
        typed: whether it takes token_type_ids, of which there are none but 0 where a call has none.
        start: see `Runner`.
    """

    def __init__(
        self,
        compute: Callable[[dict[str, NDArray[Any]]], Sequence[NDArray[Any]]],
        caches: Sequence[tuple[str, tuple[int, int], Any]],
        width: int,
        *,
        typed: bool = False,
        start: int | None = None,
    ) -> None:
        self._compute, self._caches, self.width, self._typed = compute, caches, width, typed
        self.start = start

    def run(self, inputs: Inputs, cache: Any = None, *, last: bool = False) -> tuple[NDArray[Any], Any]:
        """See `Runner`; rows with position_ids hold several documents, which go through one by one."""
        del last  # the graph computes all
        if "position_ids" in inputs:
            return _unpacked(self, inputs), None
        if DECODER in inputs:
            return self._answer(inputs, cache)
        logits, *cached = self._compute(self.feed(inputs, cache))
        return np.asarray(logits, dtype=np.float32), cached or None

    def _answer(self, inputs: Inputs, cache: Any) -> tuple[NDArray[Any], Any]:
        """Such a graph keeps nothing: what came before is its cache, and goes in again."""
        given = dict(inputs)
        if cache is not None:
            given |= {"input_ids": cache["input_ids"], DECODER: np.concatenate([cache[DECODER], inputs[DECODER]], 1)}
        (logits,) = self._compute(self.feed(given))
        return np.asarray(logits, dtype=np.float32)[:, -inputs[DECODER].shape[1] :], given

    def feed(self, inputs: Inputs, cache: Any = None) -> dict[str, NDArray[Any]]:
        """What the graph itself takes: the inputs, and a cache even if it is empty."""
        if PIXELS in inputs:
            return {PIXELS: inputs[PIXELS]}
        found = {name: inputs[name] for name in ("input_ids", "attention_mask", DECODER) if name in inputs}
        if self._typed:
            found[TYPES] = inputs.get(TYPES, np.zeros_like(found["input_ids"]))
        rows = len(found["input_ids"])
        for at, (name, (heads, units), dtype) in enumerate(self._caches):
            found[name] = np.zeros((rows, heads, 0, units), dtype) if cache is None else cache[at]
        return found


def open_onnx(file: Path, threads: int = 0, start: int | None = None) -> GraphRunner:
    """An ONNX graph in onnxruntime, on a GPU if it can.

    Args:
        file: the graph.
        threads: of the runtime; 0 leaves their number to it.
        start: see `Runner`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    caches = [
        (one.name, (one.shape[1], one.shape[3]), dtypes[one.type])
        for one in session.get_inputs()
        if one.name.startswith(PAST)
    ]
    typed = any(one.name == TYPES for one in session.get_inputs())
    width = _known(session.get_outputs()[0].shape[-1])
    return GraphRunner(lambda feed: session.run(None, feed), caches, width, typed=typed, start=start)


def _known(size: Any) -> int:
    """A dimension of a graph; 1 for one that depends on the input, such as an answer's start among the tokens."""
    return size if isinstance(size, int) else 1


def _openvino_runner(file: Path, threads: int, start: int | None) -> GraphRunner:
    import openvino

    # OpenVINO computes fp32 models in bf16 where the processor has it, unless told otherwise.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    model = openvino.Core().compile_model(str(file), "CPU", settings)
    caches = [
        (one.get_any_name(), (shape[1].get_length(), shape[3].get_length()), np.float32)
        for one in model.inputs
        for shape in [one.get_partial_shape()]
        if one.get_any_name().startswith(PAST)
    ]

    def compute(feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        found = model(feed)
        return [np.array(found[output]) for output in model.outputs]

    typed = any(one.get_any_name() == TYPES for one in model.inputs)
    last = model.outputs[0].get_partial_shape()[-1]
    return GraphRunner(compute, caches, last.get_length() if last.is_static else 1, typed=typed, start=start)


class TransformersRunner:
    """A model in transformers; a language model's calls leave a cache."""

    def __init__(self, model: Any, *, caching: bool) -> None:
        self.model, self._caching = model, caching
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._bare = bare
        config: Any = getattr(bare, "config", None)
        self.start = config.decoder_start_token_id if getattr(config, "is_encoder_decoder", False) else None
        self._trims = self.start is None and "logits_to_keep" in inspect.signature(bare.forward).parameters

    def compile(self) -> None:
        """Have torch.compile translate the model; the first calls of new shapes take long."""
        self.model.compile(dynamic=True)

    def move(self) -> None:
        """Copy the weights to another place in the processor's memory; on a GPU they stay."""
        import torch

        tensors = [one for one in (*self.model.parameters(), *self.model.buffers()) if one.device.type == "cpu"]
        total = sum(one.numel() * one.element_size() for one in tensors)
        # What was freed last is given out first: without something in between the same pages would come back.
        between = torch.ones(int(np.random.default_rng().integers(0, 2 * total + 1)), dtype=torch.uint8)
        copies = [one.data.clone() for one in tensors]
        for one, copy in zip(tensors, copies, strict=True):
            one.data = copy
        del between

    def write(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """What an encoder-decoder makes of a source, as its generation settings say."""
        import torch

        source = torch.tensor([list(ids)], device=self.model.device)
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=source, attention_mask=torch.ones_like(source), max_new_tokens=max_new_tokens, max_length=None
            )
        told: list[int] = found[0].tolist()
        return told

    def run(self, inputs: Inputs, cache: Any = None, *, last: bool = False) -> tuple[NDArray[Any], Any]:
        """See `Runner`."""
        import torch

        tensors = {name: torch.from_numpy(np.asarray(array)).to(self.model.device) for name, array in inputs.items()}
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True} if self._caching else {}
        if last and self._trims:
            options["logits_to_keep"] = 1
        if self.start is not None and cache is not None:
            options["encoder_outputs"], options["past_key_values"] = cache
        with torch.inference_mode():
            found = self.model(**tensors, **options)
        if self.start is not None:
            source = options.get("encoder_outputs", (found.encoder_last_hidden_state,))
            return found.logits.float().cpu().numpy(), (source, found.past_key_values)
        pooling = getattr(self._bare, "pooling", None)
        if pooling is not None:
            return pooled(found.last_hidden_state, tensors["attention_mask"], pooling).float().cpu().numpy(), None
        return logits_of(found).float().cpu().numpy(), getattr(found, "past_key_values", None)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an exported folder says of itself.

    Raises:
        InputError: it is none, or of a form that this version does not know.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: no exported model here (no {MANIFEST}); give a folder such as runs/quickstart/student"
        )
    found = read_sealed(folder / MANIFEST, "export it again")
    if found.get("format") not in FORMS:
        raise InputError(f"{folder / MANIFEST}: format {found.get('format')!r} is none of {', '.join(FORMS)}")
    return found


def check_files(folder: Path, manifest: Mapping[str, Any], *leave: str) -> None:
    """Compare a bundle's files with its manifest, but for those to `leave`.

    Raises:
        InputError: one is missing or altered.
    """
    for name, recorded in manifest.get("files", {}).items():
        if name not in leave and (not (folder / name).is_file() or digest_file(folder / name) != recorded["sha256"]):
            raise InputError(f"{folder / name}: missing or altered since it was exported; export it again")


def open_runner(folder: Path, threads: int = 0) -> Runner:
    """Load an exported folder in its own runtime.

    Args:
        folder: with manifest.json.
        threads: of the runtime; 0 leaves the choice to it.

    Raises:
        InputError: it is no exported folder, or what it needs is not installed.
    """
    manifest = read_manifest(folder)
    form = FORMS[manifest["format"]]
    if form.runtime == "transformers":
        missing = form.missing()
    else:  # to run a graph nothing is needed that only writes graphs
        missing = [name for name in form.missing() if name == form.runtime]
    if missing:
        raise InputError(f"{folder}: {manifest['format']} needs {', '.join(missing)}; install it with pip")
    start = manifest.get(START)
    if form.runtime == "onnxruntime":
        return open_onnx(folder / form.file, threads, start)
    if form.runtime == "openvino":
        return _openvino_runner(folder / form.file, threads, start)
    import torch

    from distilpeft.models.loading import load_exported

    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_exported(folder, manifest, device)
    if "pooling" in manifest:
        model.pooling = manifest["pooling"]
    return TransformersRunner(model, caching=KINDS[manifest["task"]].language)


def _unpacked(runner: GraphRunner, inputs: Inputs) -> NDArray[Any]:
    """Logits [B, S, V] of rows in which several documents stand behind each other, each beginning at position 0."""
    ids_BS, positions_BS = inputs["input_ids"], inputs["position_ids"]
    starts = [(row, int(at)) for row, ids in enumerate(positions_BS) for at in np.flatnonzero(ids == 0)]
    width = ids_BS.shape[1]
    logits_BSV = None
    for (row, start), after in zip(starts, [*starts[1:], (-1, 0)], strict=True):
        end = after[1] if after[0] == row else width
        part = ids_BS[row : row + 1, start:end]
        found, _ = runner.run({"input_ids": part, "attention_mask": np.ones_like(part)})
        if logits_BSV is None:
            logits_BSV = np.zeros((*ids_BS.shape, found.shape[-1]), np.float32)
        logits_BSV[row, start:end] = found[0]
    assert logits_BSV is not None, "a row has a first position"
    return logits_BSV


def through_cache(runner: Runner, inputs: Inputs, cut: int) -> NDArray[Any]:
    """Logits [B, S, V] as generation computes them: `cut` positions at once, then one by one, then the rest."""
    ids_BS, mask_BS = inputs["input_ids"], inputs["attention_mask"]
    width = ids_BS.shape[1]
    edges = [0, *range(cut, min(cut + STEPS, width) + 1), width]
    parts, cache = [], None
    for start, end in pairwise(edges):
        if end > start:
            part = {"input_ids": ids_BS[:, start:end], "attention_mask": mask_BS[:, :end]}
            logits, cache = runner.run(part, cache)
            parts.append(logits)
    return np.concatenate(parts, axis=1)


def generate(runner: Runner, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> list[int]:
    """The likeliest continuation, token by token, up to one of the tokens in `stop`, which is left out.

    Of a model that reads a source first: the likeliest answer to it.
    """
    if runner.start is not None:
        source = np.array([ids], np.int64)
        return write_rows(runner, {"input_ids": source, "attention_mask": np.ones_like(source)}, max_new_tokens, stop)[
            0
        ]
    found: list[int] = []
    cache = None
    new = list(ids)
    while len(found) < max_new_tokens:
        length = len(ids) + len(found)
        inputs = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, length), np.int64)}
        logits, cache = runner.run(inputs, cache, last=True)
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        found.append(token)
        new = [token]
    return found


def write_rows(runner: Runner, inputs: Inputs, max_new_tokens: int, stop: Sequence[int]) -> list[list[int]]:
    """The likeliest answer to each source, token by token, up to one of the tokens in `stop`, which is left out.

    Args:
        runner: a model that reads a source first.
        inputs: input_ids [B, S] and attention_mask.
        max_new_tokens: of an answer.
        stop: what ends one.
    """
    assert runner.start is not None
    rows = len(inputs["input_ids"])
    given = {**inputs, DECODER: np.full((rows, 1), runner.start, np.int64)}
    found: list[list[int]] = [[] for _ in range(rows)]
    ended_B, cache = np.zeros(rows, bool), None
    for _ in range(max_new_tokens):
        logits, cache = runner.run(given, cache, last=True)
        token_B = logits[:, -1].argmax(-1)
        ended_B |= np.isin(token_B, list(stop))
        if ended_B.all():
            break
        for row in np.flatnonzero(~ended_B):
            found[row].append(int(token_B[row]))
        given = {"attention_mask": inputs["attention_mask"], DECODER: token_B[:, None]}
    return found


def answer(folder: Path, calls: Path, out: Path) -> None:
    """Answer the gate's calls: `calls` is an .npz of arrays `N.input_ids`, ... and `N.at`, the flat positions wanted.

    Leaves `N.npy` in `out`: logits [positions, C or V], float32. `N.cut` sends a call through the cache. Arrays
    `prompt.N` are continued by `new_tokens` tokens, which go to `tokens.json`.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    runner = open_runner(folder, threads)
    asked = np.load(calls, allow_pickle=False)
    numbers = sorted({int(name.split(".")[0]) for name in asked.files if name[0].isdecimal()})
    for number in numbers:
        call = {name.partition(".")[2]: asked[name] for name in asked.files if name.split(".")[0] == str(number)}
        at, cut = call.pop("at"), call.pop("cut", None)
        logits = runner.run(call)[0] if cut is None else through_cache(runner, call, int(cut))
        np.save(out / f"{number}.npy", logits.reshape(-1, logits.shape[-1])[at], allow_pickle=False)
    prompts = [asked[name].tolist() for name in asked.files if name.startswith("prompt.")]
    told = [generate(runner, ids, int(asked["new_tokens"]), ()) for ids in prompts]
    (out / "tokens.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    answer(*map(Path, sys.argv[1:4]))
