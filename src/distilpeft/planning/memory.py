"""Memory of one device in each stage, by part, for each way of spreading a run; and the fastest way that fits.

Arithmetic on shapes, before any weight is read. The parts:

- weights: nf4 takes 0.53 bytes (arXiv:2305.14314: 4 bits and the scales' 0.127), for the linear layers of the body;
- training: 8 bytes of AdamW's moments and 4 of gradient for each weight that is tuned, which is kept in float32.
  Without accumulation gradients come as activations go, and count only where they are larger;
- autocast: the bf16 copy of each tuned matrix, which torch keeps from forward to backward (2);
- activations: what a layer keeps for its backward pass, per token. In float32: the inputs of norms (of RMSNorms also
  what they have normalised). In the precision of the products: the inputs of linear layers, queries, keys, values,
  what attention gives, and four (if gated) or two widths of the feed-forward part. Attention keeps no S x S matrix
  (arXiv:2205.14135), but on CPUs three of them with dropout. With gradient checkpointing one float32 hidden state per
  layer, and one layer's activations;
- dropout: its mask (1 byte; on CPUs as wide as what it masks), of two hidden states per layer;
- pictures: their patches are tokens; of convolutions, the maps that they make; encoder-decoders have two stacks of
  layers, and a second attention in one of them;
- adapters: a copy of their input for each linear layer with dropout or with products in two bytes, instead of the
  input that a frozen layer does not keep, and the mask;
- logits: a chunk of the fused loss (`fused.rows_per_chunk`), a second one for a running teacher, and the head's
  gradient, which is made with them. Where soft targets are kept: a chunk in float32, its logarithms, and two more;
- shards (FSDP2): weights, gradients and moments of 1/n; two layers, and what is in no layer, whole with its gradient;
- a context of 0.6 GB on a GPU: an assumption.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from distilpeft.errors import InputError
from distilpeft.recipe.student import STATIC_TYPE

BYTES = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "nf4": 0.53}
CONTEXT_BYTES = 0.6e9
CHUNK_BYTES = {"CPU": 600 << 20, "GPU": 1 << 30}  # as in fused, which needs torch
MAX_CHUNK = 4096
PICTURE = 224
"""Points of a picture's side."""
CONVOLUTION = 2.5
"""Numbers kept for each that a convolution makes: what BatchNorm reads, and what is left after ReLU; a few are both."""
MARGIN = 0.9
"""Of a device's memory that a plan may fill: allocators lose some to gaps."""


@dataclass(frozen=True)
class Machine:
    """Devices of one kind: `count` of them with `memory_bytes` each."""

    count: int
    memory_bytes: float
    kind: str = "GPU"

    @classmethod
    def of(cls, text: str) -> Machine:
        """Read `8x80GB`.

        Raises:
            InputError: it cannot be read.
        """
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)GB", text, re.IGNORECASE)
        if match is None or int(match[1]) == 0 or float(match[2]) == 0:
            raise InputError(f"--on {text}: give a number of devices and the memory of each, such as 8x80GB")
        return cls(int(match[1]), float(match[2]) * 1e9)

    def __str__(self) -> str:
        return f"{self.count} x {self.memory_bytes / 1e9:.0f} GB"


@dataclass(frozen=True)
class Shape:
    """What a model's memory depends on: weights (all, and in linear layers of the body), and its widths.

    `layers` counts those of encoder and decoder, which is `crossed`: it attends to the encoder, too. `maps` are the
    numbers that convolutions make of a picture, or a static model of a token.
    """

    total: int
    linear: int
    layers: int
    hidden: int
    keys: int
    ffn: int
    vocabulary: int
    gated: bool
    tied: bool
    heads: int = 1
    dropout: bool = False
    attention_dropout: bool = False
    maps: int = 0
    crossed: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], total: int, linear: int, layers: int) -> Shape:
        """From a configuration, by the names that they use; of an encoder-decoder of two models by the decoder's."""
        if isinstance(config.get("decoder"), dict):
            config = config["decoder"]

        def first(*names: str) -> int:
            return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)

        hidden = first("hidden_size", "dim", "n_embd", "d_model")
        heads = first("num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads")
        width = first("head_dim", "d_kv") or hidden // max(heads, 1)
        sides = 2 if config.get("is_encoder_decoder") else 1
        return cls(
            total=total, linear=linear, layers=sides * layers, hidden=hidden,
            keys=width * (first("num_key_value_heads") or heads), vocabulary=first("vocab_size"),
            ffn=first("intermediate_size", "hidden_dim", "n_inner", "d_ff", "encoder_ffn_dim") or 4 * hidden,
            gated=config.get("hidden_act") == "silu" or config.get("model_type") in GATED
            or str(config.get("feed_forward_proj")).startswith("gated"), maps=_maps(config),
            tied=bool(config.get("tie_word_embeddings", False)), heads=heads,
            dropout=any(config.get(name) for name in DROPOUTS), crossed=sides > 1,
            attention_dropout=any(config.get(name) for name in ATTENTION_DROPOUTS),
        )  # fmt: skip

    @property
    def layer(self) -> float:
        """Weights of one layer."""
        return self.linear / max(self.layers, 1)

    @property
    def rest(self) -> int:
        """Weights in no layer: embeddings, head, norms."""
        return self.total - self.linear


DROPOUTS = ("hidden_dropout_prob", "dropout", "resid_pdrop", "dropout_rate")
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "dropout_rate")
"""Names of settings; T5 has one for both."""


def _maps(config: Mapping[str, Any]) -> int:
    """Numbers that a ResNet's convolutions make of a picture: its stem and its blocks, each with half the points.

    Of a static model those of a token's vector.
    """
    if config.get("model_type") == STATIC_TYPE:
        return int(config["hidden_size"])
    widths, depths, first = (config.get(name) for name in ("hidden_sizes", "depths", "embedding_size"))
    if not isinstance(widths, list) or not isinstance(depths, list) or not isinstance(first, int):
        return 0
    side = PICTURE // 2
    total = first * side**2
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        points = (side // 2 ** (stage + 1)) ** 2
        each = 2 if config.get("layer_type") == "basic" else 1.5  # two narrow convolutions, and a wide one
        total += int(each * depth * width * points)
    return total


GATED = ("llama", "modernbert", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3", "smollm3")


@dataclass(frozen=True)
class Placement:
    """How a stage is spread, and what can be changed without changing its result.

    Attributes:
        mode: `cached` or `online`; for the teacher's own tuning `tune`, for its soft targets `give`.
        parallel: `ddp` or `fsdp2`.
        place: of the teacher, as `teacher.place`.
        checkpointing: gradient checkpointing of the model that is tuned.
        micro_batch_size: rows at once on a device.
    """

    mode: str
    parallel: str
    place: str
    checkpointing: bool
    micro_batch_size: int


@dataclass(frozen=True)
class MemoryModel:
    """What a training is: the model, how much of it is tuned, and its batches; bytes follow from a `Placement`.

    Attributes:
        shape: the model that is tuned.
        weight_bytes: of its weights.
        tuned: weights that are tuned.
        tokens: longest row.
        batch_size: rows of a step.
        half: products in two bytes.
        language: the fused loss, over `shape.vocabulary`.
        teacher: the one that runs alongside it, and the bytes of its weights: (all, those in layers).
        adapted: widths of the inputs of all linear layers with an adapter; 0 without.
        adapter_dropout: whether these inputs have dropout.
    """

    shape: Shape
    weight_bytes: float
    tuned: int
    tokens: int
    batch_size: int
    half: bool
    language: bool
    teacher: tuple[Shape, float, float] | None = None
    adapted: int = 0
    adapter_dropout: bool = False

    def parts(self, way: Placement, machine: Machine) -> dict[str, float]:
        """Bytes on each device, by part."""
        shape, tokens = self.shape, way.micro_batch_size * self.tokens
        shards = machine.count if way.parallel == "fsdp2" else 1
        gradients = 4.0 * self.tuned / shards
        parts = {
            "weights": self.weight_bytes / shards,
            "moments": 8.0 * self.tuned / shards,
            "autocast": 2.0 * min(self.tuned, shape.linear) if self.half else 0.0,
            "activations": self._activations(way, tokens, machine),
            "logits": self._logits(way, tokens, machine),
            "teacher": self._teacher(way, machine, tokens),
            "context": CONTEXT_BYTES if machine.kind == "GPU" else 0.0,
        }
        accumulates = self.batch_size > way.micro_batch_size * machine.count
        hidden = 0.0 if accumulates else parts["activations"] + parts["logits"]
        parts["gradients"] = max(0.0, gradients - hidden)
        if shards > 1:
            parts["weights"] += 8.0 * (2 * shape.layer + shape.rest)
        return parts

    def _activations(self, way: Placement, tokens: int, machine: Machine) -> float:
        """Bytes kept for the backward pass."""
        if way.mode == "give":
            return 0.0
        shape = self.shape
        if shape.maps:
            return CONVOLUTION * (2 if self.half else 4) * tokens * shape.maps
        layer = self._layer(machine)
        if not way.checkpointing:
            return shape.layers * tokens * layer
        return shape.layers * 4.0 * tokens * shape.hidden + tokens * layer

    def _layer(self, machine: Machine) -> float:
        """Bytes that a layer keeps of a token for the backward pass."""
        shape, product = self.shape, 2 if self.half else 4
        hidden, mask = shape.hidden, 1 if machine.kind == "GPU" else product
        norms = 4 * hidden if shape.gated else 2 * hidden
        products = (5 if shape.gated else 4) * hidden + 2 * shape.keys + (4 if shape.gated else 2) * shape.ffn
        layer = 4.0 * norms + product * products
        if shape.crossed:  # every second layer, of the decoder, has another attention
            layer += (4.0 * 2 * hidden + product * (2 * hidden + 2 * shape.keys)) / 2
        if shape.dropout:
            layer += 2 * mask * hidden
        if shape.attention_dropout and machine.kind == "CPU":
            layer += 3 * product * shape.heads * self.tokens
        if self.adapted:
            width = self.adapted / max(shape.layers, 1)
            if self.half or self.adapter_dropout:
                layer += product * (width - 2 * hidden - shape.ffn)
            if self.adapter_dropout:
                layer += (1 if machine.kind == "GPU" else 4) * width
        return layer

    def _logits(self, way: Placement, tokens: int, machine: Machine) -> float:
        if not self.language:
            return 0.0
        shape, size = self.shape, 2 if self.half else 4
        give = way.mode == "give"
        most = min(MAX_CHUNK, CHUNK_BYTES[machine.kind] // (2 * (4 if give else size) * shape.vocabulary))
        rows = math.ceil(tokens / math.ceil(tokens / most))
        if give:
            return rows * shape.vocabulary * (4.0 * 4 + (2 if self.half else 0))
        chunks = (2 if way.mode == "online" else 1) * rows * size * shape.vocabulary
        return chunks + (4.0 * shape.vocabulary * shape.hidden if self.tuned == shape.total else 0.0)

    def _teacher(self, way: Placement, machine: Machine, tokens: int) -> float:
        if self.teacher is None or way.mode == "cached":
            return 0.0
        shape, whole, in_layers = self.teacher
        layer = in_layers / max(shape.layers, 1)
        sharded = in_layers / machine.count + 2 * layer
        here = {"replicated": in_layers, "offloaded": layer, "sharded": sharded}[way.place]
        return whole - in_layers + here + forward(shape, tokens, half=self.half)

    def total(self, way: Placement, machine: Machine) -> float:
        """Bytes on each device."""
        return sum(self.parts(way, machine).values())


def forward(shape: Shape, tokens: int, *, half: bool) -> float:
    """Bytes of a frozen model's pass: one layer's, and its last hidden states."""
    if shape.maps:
        return 4.0 * tokens * shape.maps
    return tokens * (12.0 * shape.hidden + (2 if half else 4) * (3 if shape.gated else 2) * shape.ffn)


def ways(
    own: Placement, load: MemoryModel, machine: Machine, *, places: tuple[str, ...]
) -> Iterator[tuple[float, Placement]]:
    """Every way, with what it costs in speed against the recipe's own; larger micro-batches gain a little."""
    most = max(1, load.batch_size // machine.count)
    sizes = [size for size in (own.micro_batch_size * 2**power for power in range(-10, 6)) if 1 <= size <= most]
    sizes = [int(size) for size in sizes] or [min(own.micro_batch_size, most)]
    modes = [own.mode] if own.mode != "online" else ["online", "cached"]
    strategies = [own.parallel] if machine.count == 1 or own.mode in ("tune", "give") else ["ddp", "fsdp2"]
    placed = own.mode in ("online", "give")
    for mode, place, parallel, checkpointing, size in itertools.product(
        modes, places if placed else (own.place,), strategies, (False, True), sizes
    ):
        if mode == "cached" and place != places[0]:
            continue
        way = Placement(mode, parallel, place, checkpointing, size)
        slow = {"replicated": 0.0, "sharded": 3.0, "offloaded": 5.0}[place] + 2.0 * (mode != own.mode)
        slow += 1.5 * (parallel == "fsdp2") + 1.0 * checkpointing
        halvings = (own.micro_batch_size / size - 1) * 0.4 if size < own.micro_batch_size else 0.0
        yield slow + halvings - 0.05 * max(0, (size // own.micro_batch_size).bit_length() - 1), way


def best(own: Placement, load: MemoryModel, machine: Machine, *, places: tuple[str, ...]) -> Placement | None:
    """The fastest way that fits with a margin; None if none does."""
    fitting = [
        (cost, way)
        for cost, way in ways(own, load, machine, places=places)
        if load.total(way, machine) <= MARGIN * machine.memory_bytes
    ]
    return min(fitting, key=lambda pair: pair[0])[1] if fitting else None


def settings(own: Placement, way: Placement, stage: str) -> list[str]:
    """What to put into the recipe for `stage` to go another way: teacher, targets or distil."""
    section = "targets" if stage == "targets" else f"{stage}.fit"
    model = "student" if stage == "distil" else "teacher"
    changed = []
    if way.mode != own.mode:
        changed.append(f"targets.mode={way.mode}")
    if way.parallel != own.parallel:
        changed.append(f"parallel={way.parallel}")
    if way.place != own.place and way.mode in ("online", "give"):
        changed.append(f"teacher.place={way.place}")
    if way.checkpointing != own.checkpointing:
        changed.append(f"{model}.gradient_checkpointing={str(way.checkpointing).lower()}")
    if way.micro_batch_size != own.micro_batch_size:
        changed.append(f"{section}.micro_batch_size={way.micro_batch_size}")
    return changed


def variants(own: Placement, machine: Machine, places: tuple[str, ...]) -> list[Placement]:
    """The choices that are worth a row in a table, at the recipe's own micro-batches."""
    strategies = ["ddp"] if machine.count == 1 or own.mode == "tune" else ["ddp", "fsdp2"]
    if own.mode == "tune":
        return [own]
    if own.mode == "give":
        return [replace(own, place=place) for place in places]
    cached = [replace(own, mode="cached", parallel=parallel) for parallel in strategies]
    return cached + [
        replace(own, mode="online", parallel=parallel, place=place) for parallel in strategies for place in places
    ]
