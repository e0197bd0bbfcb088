"""The forms that are graphs: ONNX in float32, float16, and OpenVINO made from ONNX."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from distilpeft.formats import onnx_graph
from distilpeft.formats.student import Student
from distilpeft.recipe.export import FORMS


def write_onnx(student: Student, form: str, folder: Path) -> None:
    """The graph in float32."""
    _write(student, folder / FORMS[form].file, torch.float32)


def write_onnx_fp16(student: Student, form: str, folder: Path) -> None:
    """The graph with weights and cache in float16, for GPUs; a CPU computes it in float32, slowly."""
    _write(student, folder / FORMS[form].file, torch.float16)


def write_openvino(student: Student, form: str, folder: Path) -> None:
    """OpenVINO's own files, weights in float32, from the ONNX graph."""
    import openvino

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        graph = Path(scratch) / "model.onnx"
        _write(student, graph, torch.float32)
        openvino.save_model(openvino.convert_model(str(graph)), str(folder / FORMS[form].file), compress_to_fp16=False)


def _write(student: Student, file: Path, dtype: torch.dtype) -> None:
    kind = student.recipe.kind
    shape = student.tokenizer.shape if kind.images else None
    onnx_graph.write(
        student.load(), file, caching=kind.caches, typed=student.typed, reads_first=kind.reads_first, shape=shape,
        pooling=getattr(student.recipe.task, "pooling", None),
        dtype=dtype,
    )  # fmt: skip
