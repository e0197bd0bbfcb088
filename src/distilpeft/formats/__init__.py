"""Writers of exported files: one function per form, and the list of them.

A writer puts the model's files into a folder and nothing else; tokenizer, manifest and card are the stage's and the
bundle's. `onnx-int8` has candidates instead of one file: see `onnx_int8`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distilpeft.formats import folders, graphs
from distilpeft.formats.student import Student
from distilpeft.recipe.export import FORMS

__all__ = ["WRITERS", "Student", "Writer", "fault"]


def fault(form: str, config: Any, tokenizer: Any, *, caches: bool) -> str | None:
    """Why a model has no such form, as far as its configuration and tokenizer tell; None if it has.

    Args:
        form: a name of `forms.FORMS`.
        config: of transformers.
        tokenizer: its tokenizer.
        caches: whether it is a language model whose graph would keep a cache.
    """
    if form.startswith("gguf"):
        from distilpeft.formats import gguf_file

        return gguf_file.fault(config, json.loads(tokenizer.backend_tokenizer.to_str()))
    if caches and FORMS[form].runtime != "transformers":
        from distilpeft.formats import onnx_graph

        return onnx_graph.fault(config)
    return None


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
