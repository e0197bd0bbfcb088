"""Folders that transformers loads: plain safetensors, weights quantized again, and GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from distilpeft.formats.student import Student
from distilpeft.models.loading import DTYPES, quantization
from distilpeft.recipe.export import FORMS


def write_safetensors(student: Student, _: str, folder: Path) -> None:
    """All weights in `export.dtype`."""
    student.load().to(DTYPES[student.recipe.export.dtype]).save_pretrained(str(folder))


def write_bnb_nf4(student: Student, _: str, folder: Path) -> None:
    """Linear layers in 4 bits with double quantization, heads in float32."""
    _requantized(student, quantization("nf4", heads=list(student.heads)), folder)


def write_torchao_int8(student: Student, _: str, folder: Path) -> None:
    """Linear layers in int8, a scale for each output; activations stay float."""
    from torchao.quantization import Int8WeightOnlyConfig

    # version 2 is what torchao keeps in safetensors
    settings = transformers.TorchAoConfig(
        Int8WeightOnlyConfig(version=2), modules_to_not_convert=list(student.heads) or None
    )
    _requantized(student, settings, folder)


def _requantized(student: Student, settings: Any, folder: Path) -> None:
    model = student.auto_class.from_pretrained(
        str(student.folder), quantization_config=settings, dtype="auto", device_map={"": "cpu"}
    )
    model.save_pretrained(str(folder))


def write_gguf(student: Student, form: str, folder: Path) -> None:
    """One file with weights, tokenizer and template, for llama.cpp; `formats.fault` has found nothing against it."""
    from distilpeft.formats import gguf_file

    model, tokenizer = student.load(), student.tokenizer
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    kind = form.removeprefix("gguf-")
    path = folder / FORMS[form].file
    gguf_file.write(model, words, special, tokenizer.chat_template, path, kind, name=student.recipe.name)
