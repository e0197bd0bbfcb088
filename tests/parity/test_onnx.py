"""ONNX graphs against the PyTorch models they are made of, at shapes that were not seen when they were traced."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support import tiny, tiny_lm
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen3Config

from distilpeft.errors import InputError
from distilpeft.export.formats import onnx_graph, onnx_int8
from distilpeft.export.gate_process import through_cache
from distilpeft.export.generation import generate
from distilpeft.export.runtimes import open_onnx

OTHERS = [pytest.param(name, marks=pytest.mark.thorough) for name in ("qwen3", "gpt2")]
SHAPES = [(1, 1), (1, 9), (3, 1), (4, 13)]
SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


def qwen3():
    return AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, tie_word_embeddings=False))


def gpt2():
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, **ends))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Name → the model and its graph; each is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("graphs")
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            models = {"bert": tiny.classifier, "llama": tiny_lm.model, "qwen3": qwen3, "gpt2": gpt2}
            model = models[name]().eval().requires_grad_(False)
            file = folder / f"{name}.onnx"
            onnx_graph.write(copy.deepcopy(model), file, caching=name != "bert")
            made[name] = model, file
        return made[name]

    return get


def rows(batch, length, words=60, *, left=False):
    """Random ids and a mask that leaves out up to half of each row but the longest."""
    rng = np.random.default_rng(batch * 100 + length)
    ids = rng.integers(5, min(words, 24), (batch, length))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        cut = int(rng.integers(0, (length + 1) // 2))
        mask[row, slice(0, cut) if left else slice(length - cut, length)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def expected(model, inputs):
    """Each row by itself, without padding: what padding must not change."""
    found = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        with torch.no_grad():
            found.append(model(input_ids=torch.from_numpy(ids[mask == 1])[None]).logits[0].numpy())
    return found


@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_a_classifier_answers_alike_at_every_shape_padded_or_not(graphs, batch, length):
    model, file = graphs("bert")
    inputs = rows(batch, length)
    logits, cache = open_onnx(file).run(inputs)
    np.testing.assert_allclose(logits, np.stack(expected(model, inputs)), atol=1e-6)
    assert cache is None


@pytest.mark.parametrize("name", ["llama", *OTHERS])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_language_model_answers_alike_at_once_and_through_its_cache(graphs, name, left):
    """Trap 10, and positions: they are counted from the mask, on whichever side the padding is."""
    model, file = graphs(name)
    runner = open_onnx(file)
    for batch, length in SHAPES:
        inputs = rows(batch, length, left=left)
        whole, _ = runner.run(inputs)
        answers = [whole] + [through_cache(runner, inputs, cut) for cut in {1, max(1, length // 2)}]
        for row, (right, mask) in enumerate(zip(expected(model, inputs), inputs["attention_mask"], strict=True)):
            for logits in answers:
                np.testing.assert_allclose(logits[row][mask == 1], right, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", OTHERS[1]])
def test_it_writes_the_tokens_that_transformers_writes(graphs, name):
    model, file = graphs(name)
    prompt = [7, 8, 9]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        right = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.long), **options)
    assert generate(open_onnx(file), prompt, 20, ()) == right[0, 3:].tolist()


def test_names_are_those_that_other_tools_know(graphs):
    graph = onnx.load(str(graphs("llama")[1])).graph
    names = [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{i}.{side}" for i in (0, 1) for side in ("key", "value")),
    ]
    assert [one.name for one in graph.input] == names
    assert [one.name for one in graph.output] == ["logits"] + [
        name.replace("past_key_values", "present") for name in names[2:]
    ]


def test_a_graph_says_nothing_of_the_machine_that_made_it(graphs):
    content = graphs("llama")[1].read_bytes()
    for word in (b"site-packages", b"/distilpeft/", b"onnx_graph.py"):
        assert word not in content


@pytest.mark.slow
def test_float16_keeps_answers_and_halves_the_file(graphs, tmp_path):
    model, file = graphs("llama")
    half = tmp_path / "half.onnx"
    onnx_graph.write(copy.deepcopy(model), half, caching=True, dtype=torch.float16)
    inputs = rows(3, 7)
    runner = open_onnx(half)
    logits, cache = runner.run(inputs)
    assert (logits.dtype, cache[0].dtype) == (np.float32, np.float16)
    gap = np.abs(logits - open_onnx(file).run(inputs)[0])[inputs["attention_mask"] == 1].max()
    assert 0 < gap < 5e-3
    assert half.stat().st_size < 0.65 * file.stat().st_size
    np.testing.assert_allclose(through_cache(runner, inputs, 3)[0], logits[0], atol=5e-3)


@pytest.mark.thorough
def test_weights_beyond_what_one_file_holds_go_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "EXTERNAL_BYTES", 1000)
    model = tiny.classifier().eval().requires_grad_(False)
    onnx_graph.write(copy.deepcopy(model), tmp_path / "model.onnx", caching=False)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    inputs = rows(2, 5)
    np.testing.assert_allclose(
        open_onnx(tmp_path / "model.onnx").run(inputs)[0], np.stack(expected(model, inputs)), atol=1e-6
    )


def test_layers_whose_cache_slides_are_refused_before_anything_is_traced(tmp_path):
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, sliding_window=4)).eval()
    with pytest.raises(InputError, match=r"Gemma2ForCausalLM as ONNX: layers of kind sliding_attention"):
        onnx_graph.write(model, tmp_path / "model.onnx", caching=True)
    assert list(tmp_path.iterdir()) == []


def test_what_torch_cannot_export_is_one_line(tmp_path):
    class Stubborn(torch.nn.Module):
        config = None

        def forward(self, input_ids, attention_mask):
            if input_ids.sum().item() > 3:  # a choice that depends on data
                return self
            return self

    stubborn = Stubborn()
    with pytest.raises(InputError, match="torch cannot export Stubborn as ONNX: ") as refused:
        onnx_graph.write(stubborn, tmp_path / "model.onnx", caching=False)
    assert "\n" not in str(refused.value)


class TestInt8:
    @staticmethod
    def integer(file):
        """Operators at work in integers, the weights of which are int8."""
        nodes = onnx.load(str(file)).graph.node
        return sum(node.op_type in ("MatMulInteger", "DynamicQuantizeLinear") for node in nodes)

    @staticmethod
    def names(way, graph):
        return list(onnx_int8.candidates(way, graph, lambda path: 0.0, lambda: iter(())))

    def test_the_ways_come_in_their_order_and_one_alone_if_asked(self, graphs):
        _, graph = graphs("bert")
        ways = [way.name for way in self.names("auto", graph)]
        assert ways[:2] == ["dynamic", "per channel"]
        assert [name.split(",")[1].split()[0] for name in ways[2:5]] == ["2", "4", "8"]
        assert ways[5:] == ["static"]
        assert [way.name for way in self.names("static", graph)] == ["static"]
        assert len(self.names("mixed", graph)) == len(onnx_int8.SHARES)

    def test_where_7_bits_come_nearer_each_way_takes_them_and_its_weights_fit(self, graphs, tmp_path):
        _, graph = graphs("bert")
        feeds = [open_onnx(graph).feed(rows(4, 9))]
        ways = list(onnx_int8.candidates("auto", graph, self.largest, lambda: iter(feeds)))
        names = [way.name for way in ways]
        assert names[:4] == ["dynamic", "dynamic, 7 bits", "per channel", "per channel, 7 bits"]
        assert all(name.startswith("per channel, 7 bits, ") for name in names[4:7])
        assert names[7:] == ["static, 7 bits"]
        for way in ways:
            way.write(tmp_path / "model.onnx")
            assert self.largest(tmp_path / "model.onnx") == (64 if "7 bits" in way.name else 127), way.name
        alone = [way.name for way in onnx_int8.candidates("dynamic", graph, self.largest, lambda: iter(()))]
        assert alone == names[:2]

    @staticmethod
    def largest(file):
        """Of the int8 weights of matrix products."""
        graph = onnx.load(str(file)).graph
        found = [onnx.numpy_helper.to_array(one) for one in graph.initializer if one.data_type == onnx.TensorProto.INT8]
        return max((int(np.abs(values.astype(int)).max()) for values in found if values.ndim == 2), default=0)

    def test_7_bits_do_not_saturate_on_any_processor(self, tmp_path):
        """Trap 45: the largest weights times the largest activations; in 8 bits half of it is lost without VNNI."""
        weight = onnx.numpy_helper.from_array(np.ones((32, 4), np.float32), "weight")
        sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", n]) for name, n in
                 (("x", 32), ("y", 4))]  # fmt: skip
        product = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")
        graph = onnx.helper.make_graph([product], "one", sides[:1], sides[1:], [weight])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
        onnx.save(model, str(tmp_path / "float.onnx"))
        for name in ("dynamic", "per_channel"):
            _, narrow = onnx_int8.candidates(name, tmp_path / "float.onnx", self.largest, lambda: iter(()))
            narrow.write(tmp_path / "narrow.onnx")
            session = onnxruntime.InferenceSession(str(tmp_path / "narrow.onnx"), providers=["CPUExecutionProvider"])
            (found,) = session.run(None, {"x": np.ones((3, 32), np.float32)})
            np.testing.assert_allclose(found, 32, rtol=1e-5)

    def test_each_way_answers_nearly_alike_in_a_third_of_the_bytes(self, graphs, tmp_path):
        model, graph = graphs("bert")
        inputs = rows(4, 9)
        right = np.stack(expected(model, inputs))
        feeds = [open_onnx(graph).feed(rows(4, length)) for length in (5, 9, 12)]
        ways = onnx_int8.candidates("auto", graph, lambda path: 0.0, lambda: iter(feeds))
        for way in ways:
            out = tmp_path / "model.onnx"
            way.write(out)
            gap = np.abs(open_onnx(out).run(inputs)[0] - right).max()
            assert 0 < gap < 0.1, way.name
            if way.name in ("dynamic", "per channel", "static"):
                assert out.stat().st_size < 0.45 * graph.stat().st_size, way.name
            if way.name == "dynamic":
                assert self.integer(out) > 0

    def test_the_operator_that_int8_hurts_most_is_found_and_left_in_float(self, graphs, tmp_path):
        """One weight gets an outlier in every column, so that int8 rounds the others away.

        Both sides have the bits that come nearer here, so that the operator left in float makes the difference, not
        what a processor without VNNI saturates.
        """
        _, graph = graphs("bert")
        names = onnx_int8.operators(graph)
        products = [name for name in names if "embedding" not in name]
        model = onnx.load(str(graph))
        target = next(node for node in model.graph.node if node.name == products[3])
        for tensor in model.graph.initializer:
            if tensor.name == target.input[1]:
                values = onnx.numpy_helper.to_array(tensor).copy()
                values[0] = 300.0
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        hurt = tmp_path / "hurt.onnx"
        onnx.save(model, str(hurt))
        inputs = rows(6, 11)
        right = open_onnx(hurt).run(inputs)[0]

        def distance(path):
            return float(np.square(open_onnx(path).run(inputs)[0] - right).mean())

        assert onnx_int8.sensitive(hurt, distance)[0] == [products[3]]
        way = next(onnx_int8.candidates("mixed", hurt, distance, lambda: iter(())))
        mixed, all_int8 = tmp_path / "mixed.onnx", tmp_path / "all.onnx"
        way.write(mixed)
        *_, nearest = onnx_int8.candidates("per_channel", hurt, distance, lambda: iter(()))
        nearest.write(all_int8)
        assert distance(mixed) < distance(all_int8) / 2
        left = [node for node in onnx.load(str(mixed)).graph.node if node.op_type == "MatMul"]
        assert products[3] in {node.name for node in left}

    def test_many_operators_are_measured_in_groups(self, graphs, monkeypatch):
        monkeypatch.setattr(onnx_int8, "MAX_GROUPS", 4)
        _, graph = graphs("bert")
        asked = []
        groups = onnx_int8.sensitive(graph, lambda path: asked.append(path) or 0.0)
        names = onnx_int8.operators(graph)
        assert len(asked) == len(groups) <= 4
        assert sorted(name for group in groups for name in group) == sorted(names)
