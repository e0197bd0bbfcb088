"""Exported folders, each in its own runtime: arrays in, arrays out.

An ONNX or OpenVINO folder is opened without torch and without transformers; the other forms as any user of transformers
would. The parity gate, evaluation, timing, `distilpeft predict` and greedy generation all come through here. The
gate's own process is `gate_process`.

    B  rows    S  positions    P  positions in the cache    C  classes    V  vocabulary
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from distilpeft.data.vocabulary import TYPES
from distilpeft.errors import InputError
from distilpeft.export.manifest import ExportManifest, read_manifest
from distilpeft.recipe.export import FORMS
from distilpeft.recipe.task import KINDS
from distilpeft.tasks.text_rows import logits_of, pooled

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

START = "decoder_start_token_id"
PAST = "past_key_values."
DECODER = "decoder_input_ids"
PIXELS = "pixel_values"
HEAD = "head.safetensors"
Array: TypeAlias = NDArray[Any]
"""Of any type: token ids, masks, pixels, logits in half or single precision."""
Inputs = Mapping[str, Array]


class Runner(Protocol):
    """A loaded model.

    Attributes:
        start: the token that answers begin with, of a model that reads a whole source first; else None. Such a model
            takes `decoder_input_ids` [B, T] with the source, and in later calls only new ones, with the source's
            mask; its logits are of these.
    """

    start: int | None

    def run(self, inputs: Inputs, cache: Any = None, *, last: bool = False) -> tuple[Array, Any]:
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
        compute: Callable[[dict[str, Array]], Sequence[Array]],
        caches: Sequence[tuple[str, tuple[int, int], Any]],
        width: int,
        *,
        typed: bool = False,
        start: int | None = None,
    ) -> None:
        self._compute, self._caches, self.width, self._typed = compute, caches, width, typed
        self.start = start

    def run(self, inputs: Inputs, cache: Any = None, *, last: bool = False) -> tuple[Array, Any]:
        """See `Runner`; rows with position_ids hold several documents, which go through one by one."""
        del last  # the graph computes all
        if "position_ids" in inputs:
            return _unpacked(self, inputs), None
        if DECODER in inputs:
            return self._answer(inputs, cache)
        logits, *cached = self._compute(self.feed(inputs, cache))
        return np.asarray(logits, dtype=np.float32), cached or None

    def _answer(self, inputs: Inputs, cache: Any) -> tuple[Array, Any]:
        """Such a graph keeps nothing: what came before is its cache, and goes in again."""
        context = dict(inputs)
        if cache is not None:
            context |= {"input_ids": cache["input_ids"], DECODER: np.concatenate([cache[DECODER], inputs[DECODER]], 1)}
        (logits,) = self._compute(self.feed(context))
        return np.asarray(logits, dtype=np.float32)[:, -inputs[DECODER].shape[1] :], context

    def feed(self, inputs: Inputs, cache: Any = None) -> dict[str, Array]:
        """What the graph itself takes: the inputs, and a cache even if it is empty."""
        if PIXELS in inputs:
            return {PIXELS: inputs[PIXELS]}
        feed = {name: inputs[name] for name in ("input_ids", "attention_mask", DECODER) if name in inputs}
        if self._typed:
            feed[TYPES] = inputs.get(TYPES, np.zeros_like(feed["input_ids"]))
        rows = len(feed["input_ids"])
        for at, (name, (heads, units), dtype) in enumerate(self._caches):
            feed[name] = np.zeros((rows, heads, 0, units), dtype) if cache is None else cache[at]
        return feed


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
    candidates = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in candidates if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    caches = [
        (node.name, (node.shape[1], node.shape[3]), dtypes[node.type])
        for node in session.get_inputs()
        if node.name.startswith(PAST)
    ]
    typed = any(node.name == TYPES for node in session.get_inputs())
    width = _static_size(session.get_outputs()[0].shape[-1])
    return GraphRunner(lambda feed: session.run(None, feed), caches, width, typed=typed, start=start)


def _static_size(size: object) -> int:
    """A dimension of a graph; 1 for one that depends on the input, such as an answer's start among the tokens."""
    return size if isinstance(size, int) else 1


def load_openvino() -> Any:
    """The library. From its first import on it reports its use to its makers, unless this module is missing."""
    sys.modules.setdefault("openvino_telemetry", cast("ModuleType", None))
    import openvino

    return openvino


def _openvino_runner(file: Path, threads: int, start: int | None) -> GraphRunner:
    openvino = load_openvino()
    # OpenVINO computes fp32 models in bf16 where the processor has it, unless told otherwise.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    model = openvino.Core().compile_model(str(file), "CPU", settings)
    caches = [
        (port.get_any_name(), (shape[1].get_length(), shape[3].get_length()), np.float32)
        for port in model.inputs
        for shape in [port.get_partial_shape()]
        if port.get_any_name().startswith(PAST)
    ]

    def compute(feed: dict[str, Array]) -> list[Array]:
        outputs = model(feed)
        return [np.array(outputs[output]) for output in model.outputs]

    typed = any(port.get_any_name() == TYPES for port in model.inputs)
    last = model.outputs[0].get_partial_shape()[-1]
    return GraphRunner(compute, caches, last.get_length() if last.is_static else 1, typed=typed, start=start)


def open_model2vec(folder: Path) -> tuple[Any, Any]:
    """A static model in model2vec's own layout: the model, and its head or None."""
    from model2vec import StaticModel
    from model2vec.inference import StaticModelPipeline

    if not (folder / HEAD).is_file():
        return StaticModel.from_pretrained(str(folder)), None
    pipeline = StaticModelPipeline.from_pretrained(str(folder))
    return pipeline.model, pipeline.head


def _model2vec_runner(folder: Path, ignored: Sequence[int]) -> GraphRunner:
    """model2vec's table and head, on token ids; its own tokenizer reads texts without those that are ignored."""
    model, head = open_model2vec(folder)

    def compute(feed: dict[str, Array]) -> list[Array]:
        vectors_BD = np.zeros((len(feed["input_ids"]), model.dim), np.float32)
        counted_BS = (feed["attention_mask"] != 0) & ~np.isin(feed["input_ids"], ignored)
        for row, (ids_S, counted_S) in enumerate(zip(feed["input_ids"], counted_BS, strict=True)):
            if counted_S.any():
                vectors_BD[row] = model.embedding[ids_S[counted_S]].mean(0)
        return [vectors_BD if head is None else head.predict_regression(vectors_BD)]

    return GraphRunner(compute, (), model.dim if head is None else head.layers[-1].weight.shape[0])


class TransformersRunner:
    """A model in transformers; a language model's calls leave a cache."""

    def __init__(self, model: PreTrainedModel, *, caching: bool) -> None:
        self.model, self._caching = model, caching
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._bare = bare
        config: PretrainedConfig = getattr(bare, "config", None)
        self.start = config.decoder_start_token_id if getattr(config, "is_encoder_decoder", False) else None
        self._trims = self.start is None and "logits_to_keep" in inspect.signature(bare.forward).parameters

    def compile(self) -> None:
        """Have torch.compile translate the model; the first calls of new shapes take long."""
        self.model.compile(dynamic=True)

    def move(self) -> None:
        """Copy the weights to another place in the processor's memory; on a GPU they stay."""
        import torch

        tensors = [
            tensor for tensor in (*self.model.parameters(), *self.model.buffers()) if tensor.device.type == "cpu"
        ]
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        # What was freed last is given out first: without something in between the same pages would come back.
        between = torch.ones(int(np.random.default_rng().integers(0, 2 * total + 1)), dtype=torch.uint8)
        copies = [tensor.data.clone() for tensor in tensors]
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.data = copy
        del between

    def write(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """What an encoder-decoder makes of a source, as its generation settings say."""
        import torch

        source = torch.tensor([list(ids)], device=self.model.device)
        with torch.inference_mode():
            sequences = self.model.generate(
                input_ids=source, attention_mask=torch.ones_like(source), max_new_tokens=max_new_tokens, max_length=None
            )
        tokens: list[int] = sequences[0].tolist()
        return tokens

    def run(self, inputs: Inputs, cache: Any = None, *, last: bool = False) -> tuple[Array, Any]:
        """See `Runner`."""
        import torch

        tensors = {name: torch.from_numpy(np.asarray(array)).to(self.model.device) for name, array in inputs.items()}
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True} if self._caching else {}
        if last and self._trims:
            options["logits_to_keep"] = 1
        if self.start is not None and cache is not None:
            options["encoder_outputs"], options["past_key_values"] = cache
        with torch.inference_mode():
            output = self.model(**tensors, **options)
        if self.start is not None:
            source = options.get("encoder_outputs", (output.encoder_last_hidden_state,))
            return output.logits.float().cpu().numpy(), (source, output.past_key_values)
        pooling = getattr(self._bare, "pooling", None)
        if pooling is not None:
            return pooled(output, tensors["attention_mask"], pooling).float().cpu().numpy(), None
        return logits_of(output).float().cpu().numpy(), getattr(output, "past_key_values", None)


def open_runner(folder: Path, threads: int = 0) -> Runner:
    """Load an exported folder in its own runtime.

    Args:
        folder: with manifest.json.
        threads: of the runtime; 0 leaves the choice to it.

    Raises:
        InputError: it is not an exported folder, or what it needs is not installed.
    """
    manifest = read_manifest(folder)
    form = FORMS[manifest["format"]]
    if form.runtime == "transformers":
        missing = form.missing()
    else:  # to run a graph nothing is needed that only writes graphs
        missing = [name for name in form.missing() if name == form.runtime]
    if missing:
        raise InputError(f"{folder}: {manifest['format']} needs {', '.join(missing)}; install it with pip")
    start = manifest.get("decoder_start_token_id")
    if form.runtime == "onnxruntime":
        return open_onnx(folder / manifest["file"], threads, start)
    if form.runtime == "model2vec":
        return _model2vec_runner(folder, manifest["ignored_ids"])
    if form.runtime == "openvino":
        return _openvino_runner(folder / manifest["file"], threads, start)
    import torch

    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_exported(folder, manifest, device)
    if "pooling" in manifest:
        model.pooling = manifest["pooling"]
    return TransformersRunner(model, caching=KINDS[manifest["task"]].is_language_model)


def _unpacked(runner: GraphRunner, inputs: Inputs) -> Array:
    """Logits [B, S, V] of rows in which several documents stand behind each other, each beginning at position 0."""
    ids_BS, positions_BS = inputs["input_ids"], inputs["position_ids"]
    starts = [(row, int(at)) for row, ids in enumerate(positions_BS) for at in np.flatnonzero(ids == 0)]
    width = ids_BS.shape[1]
    logits_BSV = None
    for (row, start), after in zip(starts, [*starts[1:], (-1, 0)], strict=True):
        end = after[1] if after[0] == row else width
        part = ids_BS[row : row + 1, start:end]
        logits, _ = runner.run({"input_ids": part, "attention_mask": np.ones_like(part)})
        if logits_BSV is None:
            logits_BSV = np.zeros((*ids_BS.shape, logits.shape[-1]), np.float32)
        logits_BSV[row, start:end] = logits[0]
    assert logits_BSV is not None, "a row has a first position"
    return logits_BSV


def load_exported(folder: Path, manifest: ExportManifest, device: torch.device) -> Any:
    """The model that transformers makes of an exported folder, frozen."""
    import torch
    import transformers

    from distilpeft.models.static import architecture as _static  # noqa: F401 - registers it with the Auto classes

    file = manifest["file"]
    options: dict[str, Any] = {"dtype": "auto", "device_map": {"": device}}
    if file != ".":  # GGUF, dequantized; its reader alone would miss llama3's rope scaling and odd head widths
        config = transformers.AutoConfig.from_pretrained(str(folder))
        options = {"gguf_file": file, "dtype": torch.float32, "config": config}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of transformers' GGUF reader
        model = getattr(transformers, manifest["auto_class"]).from_pretrained(str(folder), **options)
    if file != ".":
        model = model.to(device)
    return model.requires_grad_(False).eval()
