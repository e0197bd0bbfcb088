"""An ONNX graph whose matrix products have weights in 4 bits, in blocks of 32 with a scale in float32 each.

A block's largest weight, with its sign, becomes -8. The products are onnxruntime's own operator MatMulNBits, which
computes in float32 with the weights as they are rounded. A language model's output matrix takes 8 bits, in blocks too,
and embeddings are looked up in 8 bits, with one scale for the table: as in GGUF's files, 4 bits cost too much there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilpeft.export.formats.quiet import quiet

if TYPE_CHECKING:
    import onnx

BLOCK = 32
"""Weights that share a scale."""
LOGITS = "logits"


def write(graph: Path, out: Path, *, language: bool) -> None:
    """Quantize a float graph.

    Args:
        graph: in float32.
        out: to be made; large weights go next to it.
        language: whether its output is over tokens.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    is_large = any(graph.parent.glob(graph.name + ".*"))
    with quiet(), tempfile.TemporaryDirectory(dir=graph.parent) as scratch:
        plain, looked_up = Path(scratch) / "plain.onnx", Path(scratch) / "looked_up.onnx"
        model = onnx.load(str(graph))
        transpose_constants(model)
        onnx.save_model(model, str(plain), save_as_external_data=is_large, location=f"{plain.name}.data")
        quantize_dynamic(
            str(plain), str(looked_up), op_types_to_quantize=["Gather"], weight_type=QuantType.QInt8,
            use_external_data_format=is_large,
        )  # fmt: skip
        model = onnx.load(str(looked_up))
        heads = [node.name for node in model.graph.node if node.op_type == "MatMul" and LOGITS in node.output]
        quantized = _in_blocks(model, 4, nodes_to_exclude=heads if language else [])
        if language:
            quantized = _in_blocks(quantized.model, 8, nodes_to_include=heads)
        quantized.save_model_to_file(str(out), use_external_data_format=is_large)


def _in_blocks(model: onnx.ModelProto, bits: int, **chosen: Any) -> Any:
    """The graph with its products, or the chosen ones, in blocks."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        model, bits=bits, block_size=BLOCK, is_symmetric=True, op_types_to_quantize=("MatMul",), **chosen
    )
    quantizer.process()
    return quantizer.model


def transpose_constants(model: onnx.ModelProto) -> None:
    """Turn constants at once that the graph would turn when it runs, such as an output matrix that is a table too.

    A table that is only looked up in 8 bits would otherwise be made float and turned for every token.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type == "Transpose" and node.input[0] in constants:
            order = next((list(one.ints) for one in node.attribute if one.name == "perm"), None)
            turned = numpy_helper.to_array(constants[node.input[0]]).transpose(order)
            model.graph.initializer.append(numpy_helper.from_array(turned.copy(), node.output[0]))
            model.graph.node.remove(node)
