"""What a student can be exported as: the one list of forms, what each needs, and how near it has to stay.

Torch-free, below the recipe, which takes its names from here. The functions that write them are in `formats`. To add a
form: a name in `FormName`, a line in `FORMS`, and the function that writes it in `formats.WRITERS`.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from distilpeft.recipe.section import IN_KEY_IF_GIVEN, NOT_IN_KEY, Count, Fraction, Positive, Section, distinct

Exactness = Literal["exact", "half", "int8", "int4"]
FormName = Literal[
    "safetensors", "onnx", "onnx-int8", "onnx-fp16", "onnx-int4", "openvino", "openvino-int8", "torchao-int8",
    "bnb-nf4", "gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q5_1", "gguf-q5_0", "gguf-q4_1", "gguf-q4_0",
    "model2vec",
]  # fmt: skip
ALIASES = {"gguf": "gguf-f16"}


@dataclass(frozen=True)
class Form:
    """One form of exported files.

    Attributes:
        runtime: what loads them.
        file: the one to load, where transformers.js, optimum and sentence-transformers look for it; "." is the folder
            itself.
        exactness: how near it stays to the student by nature; its tolerances come from here.
        modules: what has to be importable to write and reload it.
        extra: the extra of distilpeft that brings these.
        language: whether it exists for language models only.
        static: whether it exists for static students only (True), or for all others (False); None: for both.
    """

    runtime: Literal["transformers", "onnxruntime", "openvino", "model2vec"]
    file: str
    exactness: Exactness
    modules: tuple[str, ...] = ()
    extra: str = ""
    language: bool = False
    static: bool | None = None

    def missing(self) -> list[str]:
        """Modules that are not installed here."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]


_ONNX = ("onnx", "onnxscript", "onnxruntime")


def _gguf(exactness: Exactness) -> Form:
    return Form("transformers", "model.gguf", exactness, ("gguf",), "gguf", language=True, static=False)


FORMS: dict[str, Form] = {
    "safetensors": Form("transformers", ".", "exact"),
    "onnx": Form("onnxruntime", "onnx/model.onnx", "exact", _ONNX, "onnx"),
    "onnx-int8": Form("onnxruntime", "onnx/model_quantized.onnx", "int8", _ONNX, "onnx"),
    "onnx-fp16": Form("onnxruntime", "onnx/model_fp16.onnx", "half", _ONNX, "onnx"),
    "onnx-int4": Form("onnxruntime", "onnx/model_q4.onnx", "int4", _ONNX, "onnx", static=False),
    "openvino": Form("openvino", "openvino/openvino_model.xml", "exact", (*_ONNX, "openvino"), "openvino"),
    "openvino-int8": Form(
        "openvino", "openvino/openvino_model_qint8_quantized.xml", "int8", (*_ONNX, "openvino", "nncf"), "openvino"
    ),
    "torchao-int8": Form("transformers", ".", "int8", ("torchao",), "torchao", static=False),
    "bnb-nf4": Form("transformers", ".", "int4", ("bitsandbytes",), static=False),
    "gguf-f32": _gguf("exact"),
    "gguf-f16": _gguf("half"),
    "gguf-bf16": _gguf("half"),
    "gguf-q8_0": _gguf("int8"),
    "gguf-q5_1": _gguf("int4"),
    "gguf-q5_0": _gguf("int4"),
    "gguf-q4_1": _gguf("int4"),
    "gguf-q4_0": _gguf("int4"),
    "model2vec": Form("model2vec", ".", "exact", ("model2vec", "sentence_transformers"), "static", static=True),
}


HUB = "hub"
"""The name of the bundle that holds several forms in one folder, as model hubs do."""
_TOGETHER = ("safetensors", "onnx", "onnx-int8", "onnx-fp16", "onnx-int4", "openvino", "openvino-int8")
"""Forms whose files have different names, with the same tokenizer and configuration next to them."""


def together(formats: Sequence[str]) -> tuple[str, ...]:
    """Those of a run's forms that one folder can hold; none if that is fewer than two."""
    forms = tuple(form for form in formats if form in _TOGETHER)
    return forms if len(forms) > 1 else ()


def form_name(name: object) -> object:
    """A form's full name.

    Raises:
        ValueError: there is none of that name.
    """
    full = ALIASES.get(name, name) if isinstance(name, str) else name
    if isinstance(full, str) and full not in FORMS:
        close = difflib.get_close_matches(full, FORMS, n=1)
        raise ValueError(f"unknown format {full!r}; " + (f"did you mean {close[0]}?" if close else ", ".join(FORMS)))
    return full


@dataclass(frozen=True)
class Limits:
    """How far an export may be from the student on the gate's rows; None does not look at it.

    Attributes:
        max_abs_diff: of a logit, or of a unit of a vector of length 1; of numbers on a scale in standard deviations of
            the labels.
        kl: KL(student ‖ export), nats per row or token, on average; of numbers half the squared difference in standard
            deviations, which is the KL of normal distributions around them; of vectors 1 minus the cosine.
        top1_agreement: share of rows or tokens with the same top class or token, at least.
        metric_kept: share of the student's accuracy, at least; of language models exp(−more nats per token), of numbers
            the student's root mean squared error over the export's; of vectors the mean cosine to the student's.
    """

    max_abs_diff: float | None
    kl: float | None
    top1_agreement: float | None
    metric_kept: float | None


def conditions(figures: Mapping[str, Any]) -> list[str]:
    """What the figures of an int8 graph depend on, in sentences: the processor, and the other rows of a batch.

    Args:
        figures: of an export, maybe with `processors`, `exact_sums` and `batching`.
    """
    sentences = []
    if (where := figures.get("processors")) == "any":
        sentences.append("Its sums fit into 16 bits, so its figures hold on every processor.")
    elif where is not None:
        sentences.append(f"Its figures hold on {where}; export.portable: true makes a file for every processor.")
    if exact := figures.get("exact_sums"):
        sentences.append(f"Computed with exact sums, too: KL to the student {exact['kl']:.2g} nats.")
    if batching := figures.get("batching"):
        changed = f"{batching['changed']:.1%} of answers and " if "changed" in batching else ""
        sentences.append(
            f"Padded batches of {batching['batch_size']} change {changed}a logit by at most "
            f"{batching['max_abs_diff']:.2g}, compared with one row at a time ({batching['rows']} rows)."
        )
    return sentences


LIMITS: dict[tuple[str, Exactness], Limits] = {
    ("classes", "exact"): Limits(1e-4, 1e-6, 0.99, 0.99),
    ("classes", "half"): Limits(None, 1e-3, 0.99, 0.99),
    ("classes", "int8"): Limits(None, 0.02, 0.97, 0.99),
    ("classes", "int4"): Limits(None, 0.1, 0.9, 0.95),
    ("values", "exact"): Limits(1e-4, 1e-6, None, 0.99),
    ("values", "half"): Limits(None, 1e-3, None, 0.99),
    ("values", "int8"): Limits(None, 0.02, None, 0.98),
    ("values", "int4"): Limits(None, 0.1, None, 0.95),
    ("vectors", "exact"): Limits(1e-4, 1e-6, None, 0.999),
    ("vectors", "half"): Limits(None, 1e-3, None, 0.999),
    ("vectors", "int8"): Limits(None, 0.03, None, 0.97),
    ("vectors", "int4"): Limits(None, 0.1, None, 0.9),
    ("language", "exact"): Limits(1e-3, 1e-6, 0.99, 0.999),
    ("language", "half"): Limits(None, 5e-3, 0.97, 0.99),
    ("language", "int8"): Limits(None, 0.05, 0.9, 0.97),
    ("language", "int4"): Limits(None, 0.5, 0.6, 0.7),
}
"""Defaults by what a task's answers are (`Kind.family`) and exactness. bf16 weights alone turn about one in a hundred
top tokens of a small language model, 4-bit ones a quarter: a limit tells a sound file of its kind from a broken one,
and the recipe may ask for more."""
_Form = Annotated[FormName, BeforeValidator(form_name)]


class Tolerance(Section):
    """How far an export may be from the student on the gate's rows. What is not given has the form's own default."""

    max_abs_diff: Positive | None = Field(None, description="largest difference of a logit")
    kl: Positive | None = Field(None, description="mean KL(student ‖ export), nats per row or token")
    top1_agreement: Fraction | None = Field(None, description="least share of rows or tokens with the same top answer")
    metric_kept: Fraction | None = Field(
        None, description="least share of the student's accuracy; causal_lm: exp(− more nats per token)"
    )


class Export(Section):
    """Deployable files, and how closely each must match the student before it counts."""

    of: Literal["student", "student_ce_only", "student_ce_only_long"] = Field(
        "student", description="which student: the distilled one, or one that was trained on labels alone",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    formats: Annotated[tuple[_Form, ...], distinct("formats")] = Field(
        ("safetensors",), min_length=1, description="the first is the run's `student`"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of safetensors")
    int8: Literal["auto", "dynamic", "per_channel", "mixed", "static"] = Field(
        "auto", description="how onnx-int8 is made; auto tries these in turn until one is within the tolerance"
    )
    portable: bool = Field(
        False, description="int8 graphs with 7-bit weights, which answer alike on processors with and without VNNI",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    calibration_rows: Count = Field(128, description="training rows that static int8 graphs take their ranges from")
    tolerance: dict[_Form, Tolerance] = Field({}, description="format → what it must hold, instead of its defaults")
    gate_rows: Count = Field(1024, description="validation rows compared with the student")
    license: str | None = Field(None, min_length=1, description="of the student, for its card; a hub id such as mit")
