"""OpenVINO's own files, made of the ONNX graph: in float32, or in int8 by Intel's NNCF.

`static` quantizes weights for each output and activations by ranges taken from training rows, after smoothing outliers
from activations into weights (SmoothQuant, arXiv:2211.10438, as NNCF does for transformers). Nothing is measured when
it runs, so a row's answer does not depend on the other rows of its batch. `weights` keeps activations in float32.
Each is a candidate: the gate decides. Language models, whose caches have no length while ranges are taken, have
`weights` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distilpeft.export.formats.onnx_int8 import Candidate
from distilpeft.export.formats.quiet import quiet
from distilpeft.export.runtimes import Inputs, load_openvino


def write(graph: Path, out: Path) -> None:
    """An ONNX graph as OpenVINO's files, weights as they are: `out`, and a .bin next to it."""
    _save(_read(graph), out)


def candidates(
    graph: Path, rows: Callable[[], Iterator[Inputs]], *, language: bool, portable: bool, attends: bool
) -> Iterator[Candidate]:
    """The ways to make int8 files, in turn.

    Args:
        graph: the ONNX graph in float32.
        rows: batches for the ranges of activations.
        language: whether it writes, with a cache.
        portable: weights in 7 bits, so that no sum of products exceeds 16 bits.
        attends: whether it is a transformer.
    """
    if not language:
        write = functools.partial(_static, graph, rows=rows, portable=portable, attends=attends)
        yield Candidate("static, 7 bits" if portable else "static", write)
    yield Candidate("weights", functools.partial(_weights, graph))


def _static(graph: Path, out: Path, *, rows: Callable[[], Iterator[Inputs]], portable: bool, attends: bool) -> None:
    load_openvino()
    import nncf

    fix = nncf.OverflowFix.ENABLE if portable else nncf.OverflowFix.DISABLE
    batches = list(rows())
    with quiet():
        model = nncf.quantize(
            _read(graph), nncf.Dataset(batches), subset_size=len(batches), preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU, model_type=nncf.ModelType.TRANSFORMER if attends else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
        )  # fmt: skip
    _save(model, out)


def _weights(graph: Path, out: Path) -> None:
    load_openvino()
    import nncf

    with quiet():
        model = nncf.compress_weights(_read(graph), mode=nncf.CompressWeightsMode.INT8_SYM)
    _save(model, out)


def _read(graph: Path) -> Any:
    return load_openvino().Core().read_model(str(graph))


def _save(model: Any, out: Path) -> None:
    out.parent.mkdir(exist_ok=True)
    load_openvino().save_model(model, str(out), compress_to_fp16=False)
