"""Training for an export's rounding: what the forward pass computes is what the export's own runtime does."""

from __future__ import annotations

import copy
from pathlib import Path

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support import tiny, tiny_lm
from torch import nn

from distilpeft.export.formats import onnx_graph, onnx_int4, onnx_int8
from distilpeft.training import rounding

KINDS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def matrix() -> torch.Tensor:
    """Rows of very different sizes, one of zeros, and blocks of one value."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 2, 64)[:, None]
    weight[3] = 0
    weight[4, :32], weight[5, 32:64] = -1.5, 0.25
    weight[6, :32] = torch.tensor([1.0, -1.0] * 16)
    return weight


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_rounded_as_ggufs_own_package_does(kind):
    weight, code = matrix(), gguf.GGMLQuantizationType[kind.upper()]
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), code), code)
    found = rounding.GGUF[f"gguf-{kind}"](weight).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", [*rounding.GGUF.values(), rounding.by_output, rounding.four_bits])
def test_the_gradient_is_that_of_weights_that_are_not_rounded(way):
    weight = matrix().requires_grad_()
    (way(weight) * torch.arange(96.0)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(96.0).expand(64, 96))


SENTENCES = ["the good film and a story", "an awful actor of the scene with a script", "superb"]


def encoded(texts: list[str]) -> dict[str, torch.Tensor]:
    found = tiny.tokenizer()(texts, return_tensors="pt", padding=True)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def test_a_rounded_encoder_answers_as_onnxruntime_on_its_int8_graph(tmp_path):
    model = copy.deepcopy(tiny.pretrained()).eval()
    onnx_graph.write(copy.deepcopy(model), tmp_path / "model.onnx")
    (way,) = onnx_int8.candidates(
        "per_channel", tmp_path / "model.onnx", lambda path: 0.0, lambda: iter(()), portable=True
    )
    way.write(tmp_path / "int8.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded = rounding.attach(model, "onnx-int8")
    with torch.no_grad():
        for text in SENTENCES:
            inputs = encoded([text])
            plain = model(**inputs).logits
            rounded.is_on = True
            found = model(**inputs).logits
            rounded.is_on = False
            expected = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
            np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
            assert (found - plain).abs().max() > 1e-3, "rounding must matter for this test to mean anything"
    rounded.remove()
    assert {type(module) for module in model.modules()} & {rounding.RoundedLinear, rounding.RoundedEmbedding} == set()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def output_matrix(path: Path) -> torch.Tensor:
    """The 8-bit output matrix of a graph, [V, H], made float by hand."""
    tensors = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer}
    (packed,) = [name for name in tensors if name.endswith("_Q8")]
    levels = torch.from_numpy(tensors[packed].astype(np.float32)) - 128  # [V, blocks, 32]
    scales = torch.from_numpy(tensors[packed.replace("_Q8", "_scales")].copy()).view(*levels.shape[:2], 1)
    return (levels * scales).flatten(1)


def feeds(session: onnxruntime.InferenceSession, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """A text without an earlier one, for a graph with a cache."""
    given = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    empty = {
        one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
        for one in session.get_inputs()
        if one.name.startswith("past")
    }
    return {**given, **empty}


@pytest.mark.thorough
@pytest.mark.parametrize("width", [64, 80])
def test_a_model_rounded_to_4_bits_answers_as_onnxruntime_on_its_graph(tmp_path, width):
    """80 units are no whole blocks."""
    model = tiny_lm.model(seed=2, hidden_size=width, intermediate_size=width + 16, head_dim=16).eval()
    onnx_graph.write(copy.deepcopy(model), tmp_path / "model.onnx", caching=True)
    onnx_int4.write(tmp_path / "model.onnx", tmp_path / "q4.onnx", language=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "q4.onnx"))
    ids = torch.arange(5, 25)[None]
    expected = session.run(None, feeds(session, ids))[0]
    rounded = rounding.attach(model, "onnx-int4")
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        rounded.is_on = True
        states = model.model(input_ids=ids).last_hidden_state
        found = states @ output_matrix(tmp_path / "q4.onnx")[:, :width].T
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    assert (found - plain).abs().max() > 1e-3
    torch.testing.assert_close(output_matrix(tmp_path / "q4.onnx")[:, :width], model.lm_head.weight, atol=2e-3, rtol=0)
    assert (tmp_path / "q4.onnx").stat().st_size < 0.4 * (tmp_path / "model.onnx").stat().st_size


def test_the_rest_of_a_batch_does_not_change_how_a_row_is_rounded():
    model = copy.deepcopy(tiny.pretrained()).eval()
    rounded = rounding.attach(model, "onnx-int8")
    rounded.is_on = True
    with torch.no_grad():
        together = model(**encoded(SENTENCES)).logits
        alone = torch.cat([model(**encoded([text])).logits for text in SENTENCES])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_a_rounded_language_model_is_the_one_whose_matrices_in_layers_are_those_of_the_file(kind):
    model = tiny_lm.model(seed=2).eval()
    stored, code = copy.deepcopy(model), gguf.GGMLQuantizationType[kind.upper()]
    for block in stored.model.layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                packed = gguf.quants.quantize(module.weight.detach().numpy(), code)
                module.weight.data = torch.from_numpy(gguf.quants.dequantize(packed, code))
    rounded = rounding.attach(model, f"gguf-{kind}")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        rounded.is_on = True
        found = model(input_ids=ids).logits
        torch.testing.assert_close(found, stored(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-4)


def test_what_is_found_with_rounding_leaves_the_switch_as_it_was():
    rounded = rounding.Rounding()
    assert rounded.during(lambda model: rounded.is_on)(nn.Identity()) is True
    assert rounded.is_on is False

    def fails(model: nn.Module) -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - its own
        rounded.during(fails)(nn.Identity())
    assert rounded.is_on is False
