"""A static student in model2vec's own layout, which sentence-transformers' StaticEmbedding opens as well.

`model.safetensors` holds `embeddings`, a row for each token of tokenizer.json with its weight multiplied in;
config.json says how they are used. A head is `head.safetensors` (`head.N.weight|bias`, ReLU between), described by
`head_config`: what `model2vec.inference.StaticModelPipeline` opens since 0.10 (before, heads were pickled by skops).

Both libraries leave special tokens out and average what is left. The unknown token, which model2vec leaves out and
sentence-transformers does not, has the vector 0: it then changes the length of a vector there, not its direction.
tokenizer.json cuts texts to the tokens that the student reads.

    V  vocabulary    D  units of a vector
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.numpy import save_file
from torch import nn

from distilpeft.errors import InputError
from distilpeft.export.formats.student import Student
from distilpeft.export.runtimes import HEAD
from distilpeft.machine.files import write_json
from distilpeft.models.static.architecture import body_of

MODEL, CONFIG, TOKENIZER, MODULES = "model.safetensors", "config.json", "tokenizer.json", "modules.json"
ACTIVATIONS = {"text_classification": "softmax", "multi_label_classification": "sigmoid", "regression": "identity"}
"""Kind of task → what model2vec calls the function that makes answers of a head's outputs."""


def fault(tokenizer: Any) -> str | None:
    """Why a tokenizer cannot be model2vec's, which has a vector for every token by its place among all."""
    ids = set(tokenizer.get_vocab().values())
    return None if len(ids) == 1 + max(ids) else "the tokenizer leaves out ids, and model2vec counts tokens through"


def write(student: Student, folder: Path) -> None:
    """Write the files; those of the tokenizer and the configuration that are there are replaced.

    Raises:
        InputError: see `fault`.
    """
    wrong = fault(student.tokenizer)
    if wrong is not None:
        raise InputError(f"export.formats: model2vec: {wrong}")
    model, recipe = student.load(), student.recipe
    body, size = body_of(model), len(student.tokenizer.get_vocab())
    table_VD = (body.embeddings.weight * body.token_weights[:, None])[:size]
    table_VD[model.config.ignored_ids] = 0
    save_file({"embeddings": _array(table_VD)}, folder / MODEL)
    words = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    longest = min(recipe.data.max_tokens, student.tokenizer.model_max_length) - words.num_special_tokens_to_add(False)
    words.no_padding()
    words.enable_truncation(longest)
    words.save(str(folder / TOKENIZER), pretty=False)
    config: dict[str, Any] = {
        "model_type": "model2vec", "architectures": ["StaticModel"], "hidden_dim": table_VD.shape[1],
        "normalize": False, "max_length": longest, "embedding_dtype": "float32",
    }  # fmt: skip
    if recipe.kind.has_labels:
        config["head_config"] = _write_head(student, model, folder)
    write_json(folder / CONFIG, config)
    module = {"idx": 0, "name": "0", "path": ".", "type": "sentence_transformers.models.StaticEmbedding"}
    (folder / MODULES).write_text(json.dumps([module], indent=2), encoding="utf-8")


def _write_head(student: Student, model: Any, folder: Path) -> dict[str, Any]:
    """Write the layers of the head; returns its description."""
    layers = [layer for layer in model.classifier if isinstance(layer, nn.Linear)]
    tensors = {
        f"head.{at}.{name}": _array(tensor)
        for at, layer in enumerate(layers)
        for name, tensor in layer.named_parameters()
    }
    save_file(tensors, folder / HEAD)
    labels = getattr(student.recipe.task, "labels", None)
    return {
        "n_layers": len(layers), "activation": ACTIVATIONS[student.recipe.task.kind],
        "classes": None if labels is None else list(labels),
    }  # fmt: skip


def _array(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ascontiguousarray(tensor.detach().float().numpy())
