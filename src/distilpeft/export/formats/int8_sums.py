"""Whether the sums of an int8 graph fit wherever it runs, and the same graph with sums that always fit.

On x86-64 without VNNI, onnxruntime multiplies uint8 activations by int8 weights in pairs and adds the two products in
16 bits, which saturate at 32,767: 255 * (127 + 127) is cut to half of it. With weights of at most 64, 255 * (64 + 64)
= 32,640 fits, and such a graph answers alike on every processor (onnxruntime issues 5644, 6004, 9599, 14642).
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.machine.host import cpu_info

LARGEST = 64
"""Weight up to which two products with 255 fit into 16 bits."""
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Processor flags of instructions that add such products in 32 bits."""


def processors(file: Path) -> str:
    """The processors on which the graph answers as it does here: `any`, or those of this kind, in words."""
    if all(np.abs(weight.astype(np.int16)).max(initial=0) <= LARGEST for weight in _weights(file)):
        return "any"
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return machine
    return f"x86-64 {'with' if VNNI & set(cpu_info('flags').split()) else 'without'} VNNI"


def write_exact(file: Path, out: Path) -> None:
    """Write a graph that computes the products of another in 64-bit floating point, where no sum is rounded or cut.

    It answers as the other does on processors that add in 32 bits. A sum of K products is at most 255 * 128 * K, an
    exact integer in double precision.
    """
    import onnx

    model = onnx.load(str(file))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            nodes += _in_double(node)
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:  # else the runtime would fuse it back
            weight = _dequantized(node, constants)
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight, node.output[0]))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    large = any(file.parent.glob(file.name + ".*"))
    onnx.save(model, str(out), save_as_external_data=large, location=out.name + ".data")


def _weights(file: Path) -> list[NDArray[Any]]:
    """The int8 weights of matrix products."""
    import onnx

    graph = onnx.load(str(file)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    weights = []
    for node in graph.node:
        if node.op_type in ("MatMulInteger", "MatMul", "Gemm"):
            tensor = constants.get(sources.get(node.input[1], node.input[1]))
            if tensor is not None and tensor.data_type == onnx.TensorProto.INT8:
                weights.append(onnx.numpy_helper.to_array(tensor))
    return weights


def _in_double(node: Any) -> list[Any]:
    """MatMulInteger as: subtract the zero points, multiply, all in double precision; its output is int32 as before."""
    import onnx

    nodes, sides = [], []
    for side, name in enumerate(node.input[:2]):
        parts = [name, *node.input[side + 2 : side + 3]]
        wide = [f"{node.output[0]}_{side}_{at}" for at in range(len(parts))]
        nodes += [
            onnx.helper.make_node("Cast", [part], [new], to=onnx.TensorProto.DOUBLE)
            for part, new in zip(parts, wide, strict=True)
        ]
        sides.append(wide[0])
        if len(wide) > 1:
            sides[-1] = f"{node.output[0]}_{side}"
            nodes.append(onnx.helper.make_node("Sub", wide, [sides[-1]]))
    product = f"{node.output[0]}_product"
    nodes.append(onnx.helper.make_node("MatMul", sides, [product]))
    nodes.append(onnx.helper.make_node("Cast", [product], [node.output[0]], to=onnx.TensorProto.INT32))
    return nodes


def _dequantized(node: Any, constants: dict[str, Any]) -> NDArray[np.float32]:
    import onnx

    weight, scale, *zero = (onnx.numpy_helper.to_array(constants[name]) for name in node.input if name)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [-1 if at == axis % weight.ndim else 1 for at in range(weight.ndim)]

    def along(values: NDArray[Any]) -> NDArray[Any]:
        return values.reshape(shape) if values.size > 1 else values.reshape(())

    lowered = weight.astype(np.float32) - (along(zero[0]).astype(np.float32) if zero else 0)
    product: NDArray[np.float32] = (lowered * along(scale)).astype(np.float32)
    return product
