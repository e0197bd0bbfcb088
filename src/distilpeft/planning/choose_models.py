"""`distilpeft init`: a first recipe for the data at hand, with the reason next to every choice.

Looks at the data, asks for what it cannot see, chooses teacher and student from `catalogue.json`, and settings by rules
that are written down here. The recipe is checked before it is written. Torch-free.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from distilpeft.data.model_files.positions import reach_of
from distilpeft.data.model_files.tokens import embedding_units
from distilpeft.data.sources import Source, licence_in_files, resolve_model
from distilpeft.errors import InputError
from distilpeft.machine.files import JsonObject
from distilpeft.machine.host import num_cpus
from distilpeft.planning.data_profile import Wishes
from distilpeft.planning.sizes import size_of
from distilpeft.recipe.student import spread
from distilpeft.recipe.task import KINDS, Kind

BYTES_PER_WEIGHT = 1.06
"""Of int8 with its scales, as onnx-int8 and gguf-q8_0."""
PATCHES = 196
"""Of a picture of 224 x 224 points: they take memory as tokens do."""
OPERATIONS = 2
"""For each weight and token: a product and a sum."""
EFFICIENCY, MEASURED_S = 0.5, 0.3
"""Of a model's small products beside large ones, in float32; int8 graphs are faster, often twice."""
MOST_MILLIONS = {"encoder": 150.0, "decoder": 500.0, "encoder_decoder": 300.0, "image": 100.0, "embedder": 350.0}
"""Largest teacher on a CPU."""
MILLIONS_PER_GB = 400.0
"""Largest teacher on a GPU: nf4 weights take 0.5 GB per 1000 million, and the rest is for what it computes."""
POSITIONS = 0.3
"""Million weights of position embeddings, about."""
WEIGHT = 8
"""Bytes of a token's own weight and of its scale, in a static student's int8 graph."""
STUDENT_MILLIONS = {"encoder": 90.0, "decoder": 500.0, "encoder_decoder": 130.0, "image": 30.0, "embedder": 90.0}


@dataclass(frozen=True)
class Choice:
    """Teacher and student, and why.

    Attributes:
        kind: of models, a part of the catalogue.
        teacher: of the catalogue.
        student: of the catalogue, or None: made of the teacher's weights.
        layers: those of the teacher that it keeps; none: a static student.
        tokens: of its vocabulary, at most; None: all.
        dim: units of a static student's vectors; None: as many as the teacher's.
        width: units of the teacher's vectors, where `tokens` is given.
    """

    kind: str
    teacher: JsonObject
    student: JsonObject | None
    layers: Sequence[int]
    tokens: int | None = None
    dim: int | None = None
    width: int = 0

    @property
    def is_static(self) -> bool:
        """Whether the student is a static one."""
        return self.student is None and not self.layers

    @property
    def student_millions(self) -> float:
        """Million weights, about."""
        if self.student is not None:
            return float(self.student["millions"])
        embeddings = float(self.teacher["embeddings"])
        if self.tokens is not None:
            embeddings = self.tokens * (self.dim or self.width) / 1e6
        inside = cut_millions(self.teacher, len(self.layers)) - self.teacher["embeddings"] if self.layers else 0.0
        return embeddings + inside

    @property
    def student_words(self) -> str:
        """The student in a few words."""
        if self.student is not None:
            return str(self.student["name"])
        words = "a static model of its word embeddings" if self.is_static else f"{len(self.layers)} of its layers"
        return words if self.tokens is None else f"{words}, with at most {self.tokens} tokens"


def catalogue() -> dict[str, list[JsonObject]]:
    """Kind → the models that init knows."""
    models: dict[str, list[JsonObject]] = json.loads((Path(__file__).parent / "catalogue.json").read_text("utf-8"))
    return models


def licence_of(source: Source) -> str | None:
    """The licence of a model or of data: as the catalogue has it, or as its own files do; None if neither names one."""
    listed = (model for models in catalogue().values() for model in models if model["name"] == source.name)
    return next((str(model["licence"]) for model in listed), None) or licence_in_files(source)


def choose(wishes: Wishes, max_tokens: int) -> Choice:
    """The largest teacher that the device can tune, and the largest student within the size that is of its kind.

    Raises:
        InputError: there is none.
    """
    traits = KINDS[wishes.task or "text_classification"]
    kind = models_for(traits)
    alike = traits.same_tokens
    listed = catalogue()[kind]
    most = MOST_MILLIONS[kind] if wishes.on == "cpu" else MILLIONS_PER_GB * memory_gb(wishes.on)
    fitting = [model for model in listed if _suits(model, wishes, kind, max_tokens)]
    by_name = {model["name"]: model for model in listed}
    if wishes.teacher is not None:
        teacher = by_name.get(wishes.teacher) or unlisted(wishes.teacher, "--teacher", max_tokens)
    else:
        able = [model for model in fitting if model["millions"] <= most]
        if not able:
            where = "as a package " if wishes.packages else ""
            ways = ", or ".join(["name one with --teacher", *_relaxed(wishes, kind, max_tokens, most)])
            raise InputError(
                f"init: no {kind} {where}for {max_tokens} tokens and --language {wishes.speaks} is known that fits "
                f"on {wishes.on}; {ways}"
            )
        teacher = max(able, key=lambda model: (model["millions"], not model["name"].startswith("package:")))
    if wishes.student is not None:
        student = by_name.get(wishes.student) or unlisted(wishes.student, "--student", max_tokens)
        return Choice(kind, teacher, student, ())
    inner = most_inner(wishes, kind, max_tokens)
    usual = STUDENT_MILLIONS[kind] * (2 if kind == "encoder" and wishes.speaks == "many" else 1)  # its vocabulary
    size = usual if wishes.size_mb is None else wishes.size_mb / BYTES_PER_WEIGHT
    small = [
        model
        for model in fitting
        if model["millions"] <= min(size, 0.6 * teacher["millions"])
        and model["millions"] - model["embeddings"] <= inner
        and (not alike or model["family"] == teacher["family"])
    ]
    if small:
        return Choice(kind, teacher, max(small, key=lambda model: model["millions"]), ())
    if not teacher["layers"]:
        raise InputError(
            f"init: {teacher['name']} is neither in the catalogue nor on this machine, so its layers are not known; "
            "name a student with --student"
        )
    return _cut(kind, teacher, wishes, size, inner, max_tokens)


def unlisted(name: str, flag: str, max_tokens: int) -> JsonObject:
    """A model that the catalogue does not have, as its files or its published configuration describe it.

    Args:
        name: as the recipe will name it.
        flag: where that was given, for messages.
        max_tokens: of the rows, which it is taken to read if nothing else is known.

    Raises:
        InputError: there is no such path or package.
    """
    source = resolve_model(name, flag)
    size = size_of(source)
    model = {"name": name, "family": name, "millions": 0, "embeddings": 0, "layers": 0, "tokens": max_tokens}
    if size is None:
        return model
    reach, width = reach_of(size.config), size.shape.vocabulary * size.shape.hidden
    return model | {
        "millions": round(size.total / 1e6, 1), "embeddings": round(width / 1e6, 1), "layers": size.layers,
        "tokens": max_tokens if reach is None else reach.tokens,
        "licence": licence_in_files(source) or "no licence in its files",
    }  # fmt: skip


def _cut(kind: str, teacher: JsonObject, wishes: Wishes, size: float, inner: float, max_tokens: int) -> Choice:
    """A student of as many layers of its teacher as size and latency allow, up to half of them."""
    half = max(1, teacher["layers"] // 2)
    if wishes.size_mb is None and wishes.latency_ms is None:
        return Choice(kind, teacher, None, spread(teacher["layers"], half))
    fast = [count for count in range(1, half + 1) if cut_millions(teacher, count) - teacher["embeddings"] <= inner]
    traits = KINDS[wishes.task or "text_classification"]
    if not fast and traits.allows_static and wishes.size_mb is None:
        return Choice(kind, teacher, None, ())
    smaller = None if wishes.size_mb is None else _smaller(kind, teacher, fast, size, traits)
    if not fast and smaller is None:
        raise InputError(
            f"--latency-ms {wishes.latency_ms:g}: even one layer of {teacher['name']} is too much for rows of "
            f"{max_tokens} tokens on this machine"
        )
    counts = [count for count in fast if wishes.size_mb is None or cut_millions(teacher, count) <= size]
    if not counts and smaller is not None:
        return smaller
    if not counts:
        least = cut_millions(teacher, 1) * BYTES_PER_WEIGHT
        raise InputError(
            f"--size-mb {wishes.size_mb:g}: no student is so small; {teacher['name']} with one layer takes "
            f"{least:.0f} MB, most of it for its vocabulary"
        )
    return Choice(kind, teacher, None, spread(teacher["layers"], counts[-1]))


FEWEST_TOKENS = 4000
"""A vocabulary that is cut to fewer reads most words as pieces."""
STATIC_DIMS = (256, 128, 64, 32)


def _smaller(kind: str, teacher: JsonObject, fast: Sequence[int], size: float, traits: Kind) -> Choice | None:
    """A student of at most `size` million weights with a cut vocabulary: with layers if it can have some, else static.

    None where tokens must stay as they are, or nothing is known of the teacher's embeddings.
    """
    if kind not in ("encoder", "embedder") or traits.same_tokens:
        return None  # what is taught token by token keeps all tokens of its rows
    found = size_of(resolve_model(str(teacher["name"]), "--teacher"))
    width = embedding_units(found.config) if found is not None else None
    if not width:
        return None
    for count in reversed(fast):
        rest = size - (cut_millions(teacher, count) - teacher["embeddings"]) - POSITIONS
        tokens = int(rest * 1e6 / width) // 100 * 100
        if tokens >= FEWEST_TOKENS:
            return Choice(kind, teacher, None, spread(teacher["layers"], count), tokens, None, width)
    for dim in STATIC_DIMS if traits.allows_static else ():
        tokens = int(size * 1e6 / (dim + WEIGHT)) // 100 * 100
        if tokens >= FEWEST_TOKENS and dim <= width:
            return Choice(kind, teacher, None, (), tokens, dim, width)
    return None


def most_inner(wishes: Wishes, kind: str, max_tokens: int) -> float:
    """Million weights outside the embeddings that a row may go through within the latency that is wished for.

    Raises:
        InputError: it is not for models that write, token by token, nor for GPUs, which are not here to be measured.
    """
    if wishes.latency_ms is None:
        return math.inf
    if kind in ("decoder", "encoder_decoder") or wishes.on != "cpu":
        raise InputError("--latency-ms: is for models that read a row at once, on this machine's processors")
    operations = wishes.latency_ms / 1e3 * operations_per_s() * EFFICIENCY
    return operations / (OPERATIONS * max_tokens) / 1e6


@cache
def operations_per_s() -> float:
    """Floating-point operations of this machine's processors in matrix products, measured for a moment.

    On one thread, times the number of processors: where others work too, threads that wait for each other would show
    a hundredth of it.
    """
    side = 256
    matrix = np.random.default_rng(0).random((side, side), np.float32)
    best = math.inf
    with threadpool_limits(1):
        end = time.perf_counter() + MEASURED_S
        while time.perf_counter() < end:
            begin = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - begin)
    return num_cpus() * 2 * side**3 / best


def models_for(traits: Kind) -> str:
    """The part of the catalogue that has models for a kind of task."""
    if not traits.has_labels:
        return "embedder"
    if traits.reads_images:
        return "image"
    return "encoder_decoder" if traits.reads_first else "decoder" if traits.is_language_model else "encoder"


def cut_millions(model: Mapping[str, Any], layers: int) -> float:
    """Million weights of a model of which this many layers are kept, with its embeddings."""
    millions, embeddings = float(model["millions"]), float(model["embeddings"])
    return embeddings + (millions - embeddings) * layers / int(model["layers"])


def _relaxed(wishes: Wishes, kind: str, max_tokens: int, most: float) -> list[str]:
    """What to change so that a model of the catalogue suits."""
    changes = [("leave out --packages", replace(wishes, packages=False), max_tokens)] if wishes.packages else []
    changes += [("pass --language en", replace(wishes, language="en"), max_tokens)] if wishes.speaks != "en" else []
    longest = max((model["tokens"] for model in catalogue()[kind] if _suits(model, wishes, kind, 0)), default=0)
    changes += [(f"cut the rows with --max-tokens {longest}", wishes, longest)] if 0 < longest < max_tokens else []
    return [
        way
        for way, wish, tokens in changes
        if any(model["millions"] <= most and _suits(model, wish, kind, tokens) for model in catalogue()[kind])
    ]


def _suits(model: Mapping[str, Any], wishes: Wishes, kind: str, max_tokens: int) -> bool:
    """Whether a model of the catalogue reads such rows. Of encoders, those for one language are better at it."""
    if kind == "image":
        return model["name"].startswith("package:") or not wishes.packages
    speaks = model["languages"] == wishes.speaks or (kind != "encoder" and wishes.speaks == "en")
    here = model["name"].startswith("package:") or not wishes.packages
    return bool(model["tokens"] >= max_tokens and speaks and here)


def memory_gb(device: str) -> float:
    """Of `24GB`.

    Raises:
        InputError: it is neither that nor `cpu`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)GB", device, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise InputError(f"--device {device}: cpu, or a GPU's memory such as 24GB")
    return float(match[1])
