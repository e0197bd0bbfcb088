"""Writers of exported files: one function per form, and the list of them.

A writer puts the model's files into a folder and nothing else; tokenizer, manifest and card are the stage's and the
bundle's. `onnx-int8` has candidates instead of one file: see `onnx_int8`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distilpeft.formats import folders, graphs
from distilpeft.formats.student import Student
from distilpeft.forms import FORMS

__all__ = ["WRITERS", "Student", "Writer"]

Writer = Callable[[Student, str, Path], None]
"""(student, form, folder): write the form's model files into the folder."""

WRITERS: dict[str, Writer] = {
    "safetensors": folders.write_safetensors,
    "bnb-nf4": folders.write_bnb_nf4,
    "torchao-int8": folders.write_torchao_int8,
    "onnx": graphs.write_onnx,
    "onnx-fp16": graphs.write_onnx_fp16,
    "onnx-int8": graphs.write_onnx,  # what its candidates are made from
    "openvino": graphs.write_openvino,
    **{name: folders.write_gguf for name in FORMS if name.startswith("gguf-")},
}
