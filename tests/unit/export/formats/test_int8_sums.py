"""Sums of int8 graphs: cut to 16 bits or not, against integer arithmetic in numpy (trap 45)."""

from __future__ import annotations

import platform

import numpy as np
import onnx
import onnxruntime
import pytest

from distilpeft.export.formats import int8_sums, onnx_int8
from distilpeft.machine.host import cpu_info

X86 = platform.machine() in ("x86_64", "AMD64")
SATURATES = X86 and not int8_sums.VNNI & set(cpu_info("flags").split()) and "avx2" in cpu_info("flags").split()
without_vnni = pytest.mark.skipif(not SATURATES, reason="this processor adds products in 32 bits")
ROWS = np.random.default_rng(1).uniform(0, 1, (8, 96)).astype(np.float32)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """One product whose weights are large and of one sign, as they are in a column that looks for one thing."""
    weight = np.random.default_rng(0).uniform(0.7, 1, (96, 5)).astype(np.float32)
    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", n]) for name, n in
             (("x", 96), ("y", 5))]  # fmt: skip
    product = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")
    made = onnx.helper.make_graph(
        [product], "one", sides[:1], sides[1:], [onnx.numpy_helper.from_array(weight, "weight")]
    )
    file = tmp_path_factory.mktemp("graph") / "float.onnx"
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(file))
    return file


def written(graph, way, out, *, portable):
    """The first candidate of a way."""
    ways = onnx_int8.candidates(way, graph, lambda _: 0.0, lambda: iter([{"x": ROWS}]), portable=portable)
    next(ways).write(out)
    return out


def answer(file):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": ROWS})[0]


def in_integers(file):
    """What a dynamic graph computes: activations to uint8 by their range, products and sums in 64-bit integers."""
    values = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(str(file)).graph.initializer}
    (weight,) = [value for value in values.values() if value.ndim == 2]
    (scale,) = [value for name, value in values.items() if name.endswith("_scale")]
    assert all(not value.any() for name, value in values.items() if name.endswith("_zero_point"))
    assert ROWS.min() >= 0, "so that the zero point of activations is 0"
    unit = ROWS.max() / 255
    return (np.rint(ROWS / unit).astype(np.int64) @ weight.astype(np.int64)) * float(unit) * scale.astype(np.float64)


@without_vnni
@pytest.mark.parametrize("way", ["dynamic", "per_channel"])
def test_without_vnni_large_weights_saturate_and_portable_ones_do_not(graph, tmp_path, way):
    """Measured on AVX2: in 8 bits every answer is too small, by 7 to 13 %."""
    wide, narrow = (written(graph, way, tmp_path / f"{portable}.onnx", portable=portable) for portable in (False, True))
    assert (1 - answer(wide) / in_integers(wide)).min() > 0.05
    np.testing.assert_allclose(answer(narrow), in_integers(narrow), rtol=1e-5)


@pytest.mark.parametrize("way", ["dynamic", "per_channel"])
@pytest.mark.parametrize("portable", [False, True])
def test_exact_sums_are_those_of_integers_on_every_processor(graph, tmp_path, way, portable):
    file = written(graph, way, tmp_path / "int8.onnx", portable=portable)
    int8_sums.write_exact(file, tmp_path / "exact.onnx")
    np.testing.assert_allclose(answer(tmp_path / "exact.onnx"), in_integers(file), rtol=1e-6)


@pytest.mark.parametrize("portable", [False, pytest.param(True)])
def test_exact_sums_of_fixed_ranges_are_those_of_what_they_stand_for(graph, tmp_path, portable):
    file = written(graph, "static", tmp_path / "int8.onnx", portable=portable)
    int8_sums.write_exact(file, tmp_path / "exact.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # in floating point, unfused
    plain = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(answer(tmp_path / "exact.onnx"), plain.run(None, {"x": ROWS})[0], rtol=1e-5)
    if portable:
        np.testing.assert_allclose(answer(file), plain.run(None, {"x": ROWS})[0], rtol=0.01)


@pytest.mark.parametrize("way", ["dynamic", "per_channel", "static"])
def test_a_file_is_for_every_processor_only_if_no_sum_can_be_cut(graph, tmp_path, monkeypatch, way):
    wide, narrow = (written(graph, way, tmp_path / f"{portable}.onnx", portable=portable) for portable in (False, True))
    assert int8_sums.processors(narrow) == "any"
    for machine, flags, where in (
        ("x86_64", "avx2 avx512_vnni", "x86-64 with VNNI"),
        ("x86_64", "avx2 avx_vnni", "x86-64 with VNNI"),
        ("x86_64", "avx2 avx512f", "x86-64 without VNNI"),
        ("aarch64", "", "aarch64"),
    ):
        monkeypatch.setattr(int8_sums.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(int8_sums, "cpu_info", lambda _, flags=flags: flags)
        assert int8_sums.processors(wide) == where


def test_portable_ways_have_7_bits_only(graph):
    ways = onnx_int8.candidates("auto", graph, lambda _: 0.0, lambda: iter(()), portable=True)
    names = [way.name for way in ways]
    assert names[0] == "dynamic, 7 bits"
    assert all("7 bits" in name for name in names)
