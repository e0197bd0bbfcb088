"""An ONNX graph with int8 weights, made in the way that holds: the ladder from the simplest to the most careful.

`dynamic` quantizes embeddings and matrix products, activations by their range at run time; `per_channel` gives each
column of a product's weight its own scale; `mixed` leaves in float what hurts most, found by quantizing each alone and
looking at the answers; `static` takes the ranges of activations from training rows. Each is a candidate: the gate
decides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilpeft.export.formats.quiet import quiet
from distilpeft.export.runtimes import Inputs

OPERATORS = {"MatMul": 1, "Gemm": 1, "Gather": 0}
"""What is quantized, and which of its inputs is the weight: matrix products and embeddings."""
SHARES = (0.125, 0.25, 0.5)
"""Of the operators, that `mixed` leaves in float, in turn."""
MAX_GROUPS = 32
"""Operators that are measured alone; more are measured in this many groups of neighbours, so that it ends."""
Distance = Callable[[Path], float]
"""A graph → how far its answers are from the student's."""


@dataclass(frozen=True)
class Candidate:
    """One way to make the file.

    Attributes:
        name: for the report.
        write: makes it out of the float graph.
    """

    name: str
    write: Callable[[Path], None]


def candidates(way: str, graph: Path, distance: Distance, rows: Callable[[], Iterator[Inputs]]) -> Iterator[Candidate]:
    """The ways to try, in turn; what one needs is measured when it is its turn.

    Args:
        way: `export.int8`: all of them for `auto`.
        graph: the float graph.
        distance: measures a candidate.
        rows: batches for the ranges of `static`.
    """
    auto = way == "auto"
    if auto or way == "dynamic":
        yield Candidate("dynamic", lambda out: _dynamic(graph, out))
    if auto or way == "per_channel":
        yield Candidate("per channel", lambda out: _dynamic(graph, out, per_channel=True))
    if auto or way == "mixed":
        worst = sensitive(graph, distance)
        for share in SHARES:
            left = worst[: max(1, round(len(worst) * share))]
            names = [name for group in left for name in group]
            yield Candidate(
                f"per channel, {len(names)} of {sum(map(len, worst))} operators in float",
                lambda out, names=names: _dynamic(graph, out, per_channel=True, exclude=names),  # type: ignore[misc]
            )
    if auto or way == "static":
        yield Candidate("static", lambda out: _static(graph, out, rows()))


def sensitive(graph: Path, distance: Distance) -> list[list[str]]:
    """Groups of operators, the one whose quantization alone moves the answers most first."""
    names = operators(graph)
    size = -(-len(names) // MAX_GROUPS)
    groups = [names[start : start + size] for start in range(0, len(names), max(size, 1))]
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        out = Path(folder) / "model.onnx"
        measured = []
        for group in groups:
            _dynamic(graph, out, per_channel=True, only=group)
            measured.append(distance(out))
    order = sorted(range(len(groups)), key=lambda index: -measured[index])
    return [groups[index] for index in order]


def operators(graph: Path) -> list[str]:
    """Names of what can be quantized, its weight being a constant, in the graph's order."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    constant = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in OPERATORS and node.input[OPERATORS[node.op_type]] in constant
    ]


def _dynamic(
    graph: Path, out: Path, *, per_channel: bool = False, exclude: Sequence[str] = (), only: Sequence[str] = ()
) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            str(graph), str(out), op_types_to_quantize=list(OPERATORS), per_channel=per_channel,
            weight_type=QuantType.QInt8, nodes_to_exclude=list(exclude), nodes_to_quantize=list(only) or None,
            use_external_data_format=_is_large(graph), extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip


def _static(graph: Path, out: Path, rows: Iterator[Inputs]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(rows, None)

    with quiet():
        quantize_static(
            str(graph), str(out), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=list(OPERATORS),
            per_channel=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
            use_external_data_format=_is_large(graph), extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip


def _is_large(graph: Path) -> bool:
    return any(graph.parent.glob(graph.name + ".*"))
