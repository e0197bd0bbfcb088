"""An ONNX graph with int8 weights, made in the way that holds: the ladder from the simplest to the most careful.

`dynamic` quantizes embeddings and matrix products, activations by their range at run time; `per_channel` gives each
column of a product's weight its own scale; `mixed` leaves in float what hurts most, found by quantizing each alone and
looking at the answers; `static` takes the ranges of activations from training rows. Each is a candidate: the gate
decides.

Where 7 bits of weight come nearer to the student than 8, each way takes 7. On x86-64 without VNNI, onnxruntime adds
two products of uint8 and int8 in 16 bits, which 255 * 127 * 2 exceeds; 255 * 64 * 2 fits, so that such a file answers
alike on every processor. Measured on a regression of two layers without VNNI: per channel keeps 82.8 % of the
student's metric with 8 bits and 100.2 % with 7. See `reduce_range` in onnxruntime's documentation of quantization.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilpeft.export.formats.quiet import quiet
from distilpeft.export.runtimes import Inputs

if TYPE_CHECKING:
    import onnx

OPERATORS = {"MatMul": 1, "Gemm": 1, "Gather": 0}
"""What is quantized, and which of its inputs is the weight: matrix products and embeddings."""
SHARES = (0.125, 0.25, 0.5)
"""Of the operators, that `mixed` leaves in float, in turn."""
MAX_GROUPS = 32
"""Operators that are measured alone; more are measured in this many groups of neighbours, so that it ends."""
SEVEN = ", 7 bits"
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


def candidates(
    way: str, graph: Path, distance: Distance, rows: Callable[[], Iterator[Inputs]], *, portable: bool = False,
    trained: bool = False,
) -> Iterator[Candidate]:  # fmt: skip
    """The ways to try, in turn; what one needs is measured when it is its turn.

    Args:
        way: `export.int8`: all of them for `auto`.
        graph: the float graph.
        distance: measures a candidate.
        rows: batches for the ranges of `static`.
        portable: nothing but 7 bits.
        trained: the student was trained for the rounding of `per channel`, which comes first then.
    """

    @functools.cache
    def narrow(*, per_channel: bool) -> bool:
        return portable or _nearer_in_7_bits(graph, distance, per_channel=per_channel)

    auto = way == "auto"
    simple = (("dynamic", False), ("per channel", True))
    for name, per_channel in reversed(simple) if trained else simple:
        if auto or way == name.replace(" ", "_"):
            write = functools.partial(_dynamic, graph, per_channel=per_channel)
            if not portable:
                yield Candidate(name, write)
            if narrow(per_channel=per_channel):
                yield Candidate(name + SEVEN, functools.partial(write, narrow=True))
    if auto or way == "mixed":
        yield from _mixed(graph, distance, narrow=narrow(per_channel=True))
    if auto or way == "static":
        seven = narrow(per_channel=True)
        yield Candidate("static" + SEVEN * seven, lambda out: _static(graph, out, rows(), narrow=seven))


def _nearer_in_7_bits(graph: Path, distance: Distance, *, per_channel: bool) -> bool:
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        measured = []
        for narrow in (False, True):
            out = Path(folder) / f"{narrow}.onnx"
            _dynamic(graph, out, per_channel=per_channel, narrow=narrow)
            measured.append(distance(out))
    return measured[1] < measured[0]


def _mixed(graph: Path, distance: Distance, *, narrow: bool) -> Iterator[Candidate]:
    """Per channel, with more and more of the operators that are hurt most left in float."""
    worst = sensitive(graph, distance, narrow=narrow)
    for share in SHARES:
        left = worst[: max(1, round(len(worst) * share))]
        names = [name for group in left for name in group]
        yield Candidate(
            f"per channel{SEVEN * narrow}, {len(names)} of {sum(map(len, worst))} operators in float",
            functools.partial(_dynamic, graph, per_channel=True, exclude=names, narrow=narrow),
        )


def sensitive(graph: Path, distance: Distance, *, narrow: bool = False) -> list[list[str]]:
    """Groups of operators, the one whose quantization alone moves the answers most first; `narrow`: to 7 bits."""
    names = operators(graph)
    size = -(-len(names) // MAX_GROUPS)
    groups = [names[start : start + size] for start in range(0, len(names), max(size, 1))]
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        out = Path(folder) / "model.onnx"
        measured = []
        for group in groups:
            _dynamic(graph, out, per_channel=True, only=group, narrow=narrow)
            measured.append(distance(out))
    order = sorted(range(len(groups)), key=lambda index: -measured[index])
    return [groups[index] for index in order]


def operators(graph: Path) -> list[str]:
    """Names of what can be quantized, its weight being a constant, in the graph's order."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    constant, single = {tensor.name for tensor in model.graph.initializer}, _lookups(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in OPERATORS and node.input[OPERATORS[node.op_type]] in constant and node.name not in single
    ]


def _lookups(model: onnx.ModelProto) -> list[str]:
    """Names of what looks up one number a row, such as a token's weight: int8 would save nothing, and cost much."""
    single = {one.name for one in model.graph.initializer if len(one.dims) > 1 and one.dims[-1] == 1}
    return [node.name for node in model.graph.node if node.op_type == "Gather" and node.input[0] in single]


def _in_float(graph: Path) -> list[str]:
    """Names of what is not quantized in any way."""
    import onnx

    return _lookups(onnx.load(str(graph), load_external_data=False))


def _dynamic(
    graph: Path, out: Path, *, per_channel: bool, exclude: Sequence[str] = (), only: Sequence[str] = (),
    narrow: bool = False,
) -> None:  # fmt: skip
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            str(graph), str(out), op_types_to_quantize=list(OPERATORS), per_channel=per_channel,
            weight_type=QuantType.QInt8, reduce_range=narrow, nodes_to_exclude=[*exclude, *_in_float(graph)],
            nodes_to_quantize=list(only) or None, use_external_data_format=_is_large(graph),
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip


def _static(graph: Path, out: Path, rows: Iterator[Inputs], *, narrow: bool) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(rows, None)

    with quiet():
        quantize_static(
            str(graph), str(out), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=list(OPERATORS),
            per_channel=True, reduce_range=narrow, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
            nodes_to_exclude=_in_float(graph), use_external_data_format=_is_large(graph),
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip


def _is_large(graph: Path) -> bool:
    return any(graph.parent.glob(graph.name + ".*"))
