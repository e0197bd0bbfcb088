"""Writers of exported files: one function per form, and the list of them.

A writer puts the model's files into a folder and nothing else; tokenizer, manifest and card are the stage's and the
bundle's. The forms that have candidates instead are made from the graph of `onnx`: see `onnx_int8`, `openvino_files`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from distilpeft.errors import InputError
from distilpeft.export.formats import model2vec, onnx_graph, onnx_int4, openvino_files
from distilpeft.export.formats.student import Student
from distilpeft.models.bases.quantized import quantization
from distilpeft.models.loading import DTYPES
from distilpeft.models.pair import Pair
from distilpeft.models.static import architecture
from distilpeft.recipe.export import FORMS

__all__ = ["WRITERS", "Student", "Writer", "fault"]


def fault(
    form: str, config: transformers.PretrainedConfig, tokenizer: transformers.PreTrainedTokenizerBase, *, caches: bool
) -> str | None:
    """Why a model has no such form, as far as its configuration and tokenizer tell; None if it has.

    Args:
        form: a name of `forms.FORMS`.
        config: of transformers.
        tokenizer: its tokenizer.
        caches: whether it is a language model whose graph would keep a cache.
    """
    if form.startswith("gguf"):
        from distilpeft.export.formats import gguf_file

        return gguf_file.fault(config, json.loads(tokenizer.backend_tokenizer.to_str()))
    if caches and FORMS[form].runtime != "transformers":
        from distilpeft.export.formats import onnx_graph

        return onnx_graph.fault(config)
    return None


Writer = Callable[[Student, str, Path], None]
"""(student, form, folder): write the form's model files into the folder."""


def write_bnb_nf4(student: Student, _: str, folder: Path) -> None:
    """Linear layers in 4 bits with double quantization, heads in float32."""
    _requantized(student, quantization("nf4", heads=list(student.heads)), folder)


def write_gguf(student: Student, form: str, folder: Path) -> None:
    """One file with weights, tokenizer and template, for llama.cpp; `formats.fault` has found nothing against it."""
    from distilpeft.export.formats import gguf_file

    model, tokenizer = student.load(), student.tokenizer
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    kind = form.removeprefix("gguf-")
    path = folder / FORMS[form].file
    gguf_file.write(model, words, special, tokenizer.chat_template, path, kind, name=student.recipe.name)


def write_onnx(student: Student, form: str, folder: Path) -> None:
    """The graph in float32."""
    _write(student, folder / FORMS[form].file, torch.float32)


def write_onnx_fp16(student: Student, form: str, folder: Path) -> None:
    """The graph with weights and cache in float16, for GPUs; a CPU computes it in float32, slowly."""
    _write(student, folder / FORMS[form].file, torch.float16)


def write_onnx_int4(student: Student, form: str, folder: Path) -> None:
    """The graph with matrix products in 4 bits and embeddings in int8."""
    file = folder / FORMS[form].file
    file.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        graph = Path(scratch) / "model.onnx"
        _write(student, graph, torch.float32)
        onnx_int4.write(graph, file, language=student.recipe.kind.is_language_model)


def write_openvino(student: Student, form: str, folder: Path) -> None:
    """OpenVINO's own files, weights in float32, from the ONNX graph."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        graph = Path(scratch) / "model.onnx"
        _write(student, graph, torch.float32)
        openvino_files.write(graph, folder / FORMS[form].file)


def write_safetensors(student: Student, _: str, folder: Path) -> None:
    """All weights in `export.dtype`."""
    student.load().to(DTYPES[student.recipe.export.dtype]).save_pretrained(str(folder))


def write_torchao_int8(student: Student, _: str, folder: Path) -> None:
    """Linear layers in int8, a scale for each output; activations stay float."""
    from torchao.quantization import Int8WeightOnlyConfig

    # version 2 is what torchao keeps in safetensors
    settings = transformers.TorchAoConfig(
        Int8WeightOnlyConfig(version=2), modules_to_not_convert=list(student.heads) or None
    )
    _requantized(student, settings, folder)


def write_model2vec(student: Student, _: str, folder: Path) -> None:
    """The layout of model2vec, which sentence-transformers opens as well."""
    model2vec.write(student, folder)


WRITERS: dict[str, Writer] = {
    "safetensors": write_safetensors,
    "bnb-nf4": write_bnb_nf4,
    "torchao-int8": write_torchao_int8,
    "onnx": write_onnx,
    "onnx-fp16": write_onnx_fp16,
    "onnx-int4": write_onnx_int4,
    "openvino": write_openvino,
    "model2vec": write_model2vec,
    **{name: write_gguf for name in FORMS if name.startswith("gguf-")},
}


def check_exports(pair: Pair) -> None:
    """Refuse forms that the student's architecture or tokenizer does not have, before it is trained; loads no weights.

    Raises:
        InputError: names the form and why.
    """
    _, config = pair.configurations()
    for form in pair.recipe.export.formats:
        wrong = fault(form, config, pair.student_reader.tokenizer, caches=pair.recipe.kind.has_cache)
        if wrong is not None:
            raise InputError(f"export.formats: {form}: {wrong}")


def _requantized(student: Student, settings: Any, folder: Path) -> None:
    model = student.auto_class.from_pretrained(
        str(student.folder), quantization_config=settings, dtype="auto", device_map={"": "cpu"}
    )
    model.save_pretrained(str(folder))


def _write(student: Student, file: Path, dtype: torch.dtype) -> None:
    file.parent.mkdir(exist_ok=True)
    kind = student.recipe.kind
    shape = student.tokenizer.shape if kind.reads_images else None
    model = student.load()
    if student.recipe.student.static is not None:
        architecture.balance(model)
    onnx_graph.write(
        model, file, caching=kind.has_cache, typed=student.typed, reads_first=kind.reads_first, shape=shape,
        pooling=student.pooling, dtype=dtype,
    )  # fmt: skip
