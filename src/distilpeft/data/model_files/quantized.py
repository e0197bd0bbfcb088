"""Checkpoints whose weights were quantized before they were saved: what they need, and the shapes behind their bytes.

Three kinds. bitsandbytes' 4 and 8 bits are used unchanged, or dequantized. The methods of `OPENED` are dequantized by
transformers as it loads them, and are ordinary weights from then on. All others stay packed: such a model can be a
teacher that is frozen or tuned with LoRA, but nothing can be merged into it or cut out of it. Torch-free.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distilpeft.data.sources import Source, StoredTensor, model_config, stored_tensors, weight_shapes
from distilpeft.errors import InputError

PACKAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"),),
    "gptq": (("optimum", "optimum"), ("gptqmodel", "gptqmodel")),
    "awq": (("gptqmodel", "gptqmodel"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "fp8": (),
    "mxfp8": (),
    "mxfp4": (),
    "metal": (),
    "bitnet": (),
    "gemma": (),
    "aqlm": (("aqlm", "aqlm"),),
    "auto-round": (("auto_round", "auto-round"),),
    "eetq": (("kernels", "kernels"),),
    "fbgemm_fp8": (("fbgemm_gpu", "fbgemm-gpu"),),
    "fouroversix": (("fouroversix", "fouroversix"),),
    "fp_quant": (("fp_quant", "fp_quant"),),
    "higgs": (("flute", "flute-kernel"), ("fast_hadamard_transform", "fast_hadamard_transform")),
    "hqq": (("hqq", "hqq"),),
    "quanto": (("optimum.quanto", "optimum-quanto"),),
    "quark": (("quark", "amd-quark"),),
    "sinq": (("sinq", "sinq"),),
    "spqr": (("spqr_quant", "spqr_quant"),),
    "torchao": (("torchao", "torchao"),),
    "vptq": (("vptq", "vptq"),),
}
"""Method → the modules that transformers imports to load it, each with the name that pip knows it by."""
OPENED = ("compressed-tensors", "fp8", "mxfp8", "mxfp4", "metal")
"""Methods that transformers dequantizes as it loads them, if it is asked to."""
HELPERS = (
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format", "qzeros", "scales", "g_idx",
    "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale",
    "input_scale", "input_global_scale", "output_scale", "input_scale_ub", "input_activation_scale",
)  # fmt: skip
"""What accompanies packed weights: scales, zero points, shapes."""
STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Stored:
    """How a checkpoint's weights are quantized in its files.

    Attributes:
        method: as its config.json names it.
        bits: of a weight, where the configuration says so.
        form: for bitsandbytes, what `teacher.quantize` calls it.
        detail: for bitsandbytes, the type of the numbers (nf4, fp4, int8).
    """

    method: str
    bits: int | None = None
    form: Literal["nf4", "int8"] | None = None
    detail: str = ""

    @property
    def is_opened(self) -> bool:
        """Whether transformers dequantizes it as it loads it."""
        return self.method in OPENED

    @property
    def stays_packed(self) -> bool:
        """Whether its weights cannot be had in floating point."""
        return self.form is None and not self.is_opened

    def __str__(self) -> str:
        return " ".join(part for part in (self.method, self.detail) if part)

    def fault(self) -> str | None:
        """Why it cannot be loaded here: a method that transformers does not know, or packages that are missing."""
        packages = PACKAGES.get(self.method)
        if packages is None:
            return f"its weights are quantized with {self.method}, which transformers does not load"
        missing = [pip for module, pip in packages if not _is_installed(module)]
        if not missing:
            return None
        return f"its weights are quantized with {self}: loading them needs pip install {' '.join(missing)}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a package that is missing, or was replaced
        return False


def stored_form(source: Source) -> Stored | None:
    """How a model's weights are quantized in its files; None if they are not, or its files are not on this machine."""
    config = model_config(source)
    return None if config is None else form_of(config)


def form_of(config: Mapping[str, Any]) -> Stored | None:
    """The same, from a configuration."""
    settings = _settings(config)
    if not settings:
        return None
    eight, four = (settings.get(key) or settings.get(f"_{key}") for key in ("load_in_8bit", "load_in_4bit"))
    method = str(settings.get("quant_method") or ("bitsandbytes" if eight or four else "an unknown method"))
    if method == "bitsandbytes" or eight or four:
        detail = "int8" if eight else str(settings.get("bnb_4bit_quant_type", "fp4"))
        return Stored("bitsandbytes", 8 if eight else 4, "int8" if eight else "nf4", detail)
    method = method.rpartition("/")[2].replace("_", "-") if "round" in method else method
    bits = settings.get("bits", settings.get("w_bit"))
    return Stored(method, bits if isinstance(bits, int) else None)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            settings = part.get(key)
            if isinstance(settings, Mapping) and settings:
                return settings
    return {}


def packed_modules(source: Source) -> set[str]:
    """Modules whose weights bitsandbytes has packed, by their names in the files; empty if these are not known here."""
    marks = (".weight.absmax", ".SCB")
    return {name.removesuffix(mark) for name in stored_tensors(source) for mark in marks if name.endswith(mark)}


def logical_shapes(source: Source) -> dict[str, tuple[int, ...]] | None:
    """Tensor name → shape as if nothing were packed; see `weight_shapes`."""
    stored = stored_form(source)
    if stored is None:
        return weight_shapes(source)
    tensors = stored_tensors(source)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        if STATE in name or name.rpartition(".")[2] in HELPERS:
            continue
        label, shape = _unpacked(name, tensor, tensors, stored)
        shapes[label] = shape
    return shapes or None


def _unpacked(
    name: str, tensor: StoredTensor, tensors: Mapping[str, StoredTensor], stored: Stored
) -> tuple[str, tuple[int, ...]]:
    """The name and shape of the weights behind a tensor."""
    shape, (module, _, part) = tensor.shape, name.rpartition(".")
    bits = stored.bits or 4
    if part == "qweight" and len(shape) == 2:  # stored as [in, out]
        rows, columns = (size * 32 // bits if at == (stored.method == "awq") else size for at, size in enumerate(shape))
        return f"{module}.weight", (columns, rows)
    if part == "weight_packed" and len(shape) == 2:
        size = tensors.get(f"{module}.weight_shape")
        guess = (shape[0], shape[1] * (8 if tensor.dtype == "U8" else 32) // bits)
        return f"{module}.weight", guess if size is None else _integers(size)
    if name.endswith("_blocks"):  # mxfp4: [experts, rows, groups, bytes]
        return name.removesuffix("_blocks"), (*shape[:-2], math.prod(shape[-2:]) * 2)
    state = tensors.get(f"{name}{STATE}nf4", tensors.get(f"{name}{STATE}fp4"))
    return name, shape if state is None else _shape_in(state)


def _shape_in(state: StoredTensor) -> tuple[int, ...]:
    """The shape that bitsandbytes stores, as JSON, with packed weights."""
    try:
        return tuple(int(size) for size in json.loads(state.content())["shape"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{state.file}: not readable 4-bit weights; fetch the model again") from None


def _integers(tensor: StoredTensor) -> tuple[int, ...]:
    width = 8 if tensor.dtype == "I64" else 4
    content = tensor.content()
    return tuple(int.from_bytes(content[at : at + width], "little") for at in range(0, len(content), width))


def packed_bytes(source: Source) -> float | None:
    """Bytes that a quantized weight takes in the files, scales included; None where nothing stays packed."""
    stored = stored_form(source)
    if stored is None or not stored.stays_packed:
        return None
    shapes, tensors = logical_shapes(source) or {}, stored_tensors(source)
    plain = [name for name, tensor in tensors.items() if shapes.get(name) == tensor.shape]
    packed = sum(tensor.end - tensor.begin for name, tensor in tensors.items() if name not in plain)
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name not in plain)
    return packed / weights if weights else None
