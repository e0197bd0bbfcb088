"""Teachers that keep what they learnt: heads stay trainable, validation does no harm, merging is exact."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support import tiny
from torch.nn import functional as F

from distilpeft.data.sources import Source
from distilpeft.errors import InputError
from distilpeft.models import loading, lora, weights
from distilpeft.models.cutting.layers import keep_layers
from distilpeft.models.loading import Architecture
from distilpeft.recipe.student import FromTeacher
from distilpeft.recipe.training import Lora

ARCHITECTURE = Architecture("AutoModelForSequenceClassification", "SEQ_CLS", {"num_labels": 3}, train_heads=True)
LORA = Lora(rank=4, alpha=8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("body") / "base")


def load(folder, quantize, *, bf16=False, heads=None):
    torch.manual_seed(0)
    return loading.load_base(
        Source(str(folder), folder), ARCHITECTURE, quantize=quantize, dtype="fp32", device=CPU,
        compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        pad_token_id=0, heads=heads,
    )  # fmt: skip


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(5, 25, (16, 10), generator=generator)}, torch.arange(16) % 3


def fit(model, steps, *, validate_at=()):
    """Plain AdamW on one batch; returns the loss before every step."""
    inputs, labels = batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(steps):
        if step in validate_at:
            model.eval()
            with torch.no_grad():
                model(**inputs)
        model.train()
        loss = F.cross_entropy(model(**inputs).logits.float(), labels)
        loss.backward()
        missing = [name for name, p in weights.trainable(model).items() if p.grad is None]
        assert not missing, f"no gradient: {missing[:3]}"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_fresh_head_is_found_left_unquantized_and_trained(body, quantize):
    """Trap 29: with three labels an nf4 head fails, an int8 head cannot be trained."""
    model, heads = load(body, quantize)
    assert heads == ["classifier"]
    assert model.classifier.weight.is_floating_point()
    assert not model.bert.encoder.layer[0].attention.self.query.weight.is_floating_point()
    tuned = lora.add_lora(model, LORA, ARCHITECTURE, heads, "teacher.lora")
    trained = set(weights.trainable(tuned))
    assert any("classifier.modules_to_save" in name for name in trained)
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert not any("classifier" in name and "lora_" in name for name in trained)
    losses = fit(tuned, 20)
    assert losses[-1] < losses[0] - 0.02


def test_a_pretrained_head_is_left_unquantized_and_trained_as_well(tmp_path):
    tiny.classifier(num_labels=3).save_pretrained(str(tmp_path))
    model, heads = load(tmp_path, "nf4")
    assert heads == ["classifier"]
    tuned = lora.add_lora(model, LORA, ARCHITECTURE, heads, "teacher.lora")
    assert any("classifier.modules_to_save" in name for name in weights.trainable(tuned))


def test_a_body_module_without_weights_is_found_left_unquantized_and_trained(tmp_path):
    """A checkpoint without a pooler (as masked language models have none) would freeze a random one in 4 bits."""
    body = tiny.classifier().bert
    kept = {name: tensor for name, tensor in body.state_dict().items() if not name.startswith("pooler.")}
    body.config.save_pretrained(str(tmp_path))
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, heads = load(tmp_path, "nf4")
    assert heads == ["classifier", "bert.pooler.dense"]
    assert model.bert.pooler.dense.weight.is_floating_point()
    tuned = lora.add_lora(model, LORA, ARCHITECTURE, heads, "teacher.lora")
    assert any("pooler.dense.modules_to_save" in name for name in weights.trainable(tuned))


@pytest.mark.parametrize("bf16", [False, True])
def test_validating_in_the_middle_does_not_stop_a_4_bit_teacher_from_learning(body, bf16):
    """Trap 27: bitsandbytes repacks weights in eval-mode forwards; then LoRA gradients are None or the loss stands."""

    def losses(validate_at):
        model, heads = load(body, "nf4", bf16=bf16)
        torch.manual_seed(1)
        return fit(lora.add_lora(model, LORA, ARCHITECTURE, heads, "teacher.lora"), 12, validate_at=validate_at)

    validated = losses(validate_at=(0, 4))
    assert validated == losses(validate_at=())
    assert validated[-1] < validated[4]


@pytest.mark.parametrize(("quantize", "gap"), [("nf4", 2e-5), ("none", 2e-5), ("int8", 0.05)])
def test_a_merged_adapter_is_the_tuned_teacher(body, tmp_path, quantize, gap):
    """Trap 24. int8 also quantizes activations in its own forward, so its merged form can only be near."""
    model, heads = load(body, quantize)
    tuned = lora.add_lora(model, LORA, ARCHITECTURE, heads, "teacher.lora")
    fit(tuned, 15)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    inputs, _ = batch(seed=3)
    with torch.no_grad():
        expected = tuned.eval()(**inputs).logits
        untuned = load(body, quantize, heads=heads)[0].eval()(**inputs).logits
        merged = lora.merge(load(body, quantize, heads=heads)[0], tmp_path / "adapter").eval()
        found = merged(**inputs).logits
    assert (expected - untuned).abs().max() > 0.1, "the adapter must matter for this test to mean anything"
    assert (found - expected).abs().max() < gap
    assert not any("lora" in name for name, _ in merged.named_modules())
    merged.save_pretrained(str(tmp_path / "merged"))
    again = ARCHITECTURE.auto_class.from_pretrained(str(tmp_path / "merged")).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, found)


def test_a_loaded_adapter_differs_from_its_base(body, tmp_path):
    """Trap 21: a tuned teacher that is loaded as its base loses its tuning without a word."""
    model, heads = load(body, "nf4")
    tuned = lora.add_lora(model, LORA, ARCHITECTURE, heads, "teacher.lora")
    fit(tuned, 5)
    tuned.save_pretrained(str(tmp_path))
    loaded = lora.load_adapter(load(body, "nf4", heads=heads)[0], tmp_path).eval()
    inputs, _ = batch()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, tuned.eval()(**inputs).logits)
    assert not weights.trainable(loaded)


def test_kept_layers_are_the_teachers_own(body):
    model, _ = load(body, "none")
    second = model.bert.encoder.layer[1]
    keep_layers(model, FromTeacher(layers=(1,)))
    assert list(model.bert.encoder.layer) == [second]
    assert model.config.num_hidden_layers == 1


def test_a_layer_beyond_the_last_is_refused(body):
    model, _ = load(body, "none")
    with pytest.raises(InputError, match=r"student\.from_teacher\.layers: layer 2 does not exist.*0\.\.1"):
        keep_layers(model, FromTeacher(layers=(0, 2)))


def test_parameters_of_a_4_bit_model_are_counted_unpacked(body):
    plain, quantized = load(body, "none")[0], load(body, "nf4")[0]
    assert weights.num_parameters(quantized) == weights.num_parameters(plain)
    assert weights.size_bytes(quantized) < weights.size_bytes(plain)


SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 99,
}
FAMILIES = {
    "llama": {**SHAPE, "num_key_value_heads": 2, "pad_token_id": 0},
    "qwen3": {**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0},
    "roberta": {**SHAPE, "pad_token_id": 0},
    "mpnet": {**SHAPE, "pad_token_id": 0},
    "modernbert": {**SHAPE, "pad_token_id": 0},
    "distilbert": {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_4_bit_teacher_of_any_family_is_tuned_merged_and_cut_into_a_student(tmp_path, family):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    transformers.AutoModel.from_config(config).save_pretrained(str(tmp_path / "base"))
    model, heads = load(tmp_path / "base", "nf4")
    tuned = lora.add_lora(model, LORA, ARCHITECTURE, heads, "teacher.lora")
    losses = fit(tuned, 12)
    assert losses[-1] < losses[0]
    tuned.save_pretrained(str(tmp_path / "adapter"))
    inputs, _ = batch(seed=3)
    with torch.no_grad():
        expected = tuned.eval()(**inputs).logits
        merged = lora.merge(load(tmp_path / "base", "nf4", heads=heads)[0], tmp_path / "adapter").eval()
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=2e-4, rtol=1e-3)
        keep_layers(merged, FromTeacher(layers=(0, 2)))
        student = merged(**inputs).logits
        merged.save_pretrained(str(tmp_path / "student"))
        again = ARCHITECTURE.auto_class.from_pretrained(str(tmp_path / "student")).eval()
        torch.testing.assert_close(again(**inputs).logits, student)
    assert again.config.num_hidden_layers == 2


@pytest.mark.parametrize("bias", [[0.5, -2.0, 1.0], [3.0]])
def test_a_new_head_begins_at_what_is_usual_and_a_pretrained_one_stays_as_it_is(tmp_path, bias):
    tiny.save_model(tmp_path / "body")
    tiny.classifier(num_labels=len(bias)).save_pretrained(str(tmp_path / "whole"))
    options = {"num_labels": len(bias), "problem_type": "regression"}
    shape = loading.Architecture("AutoModelForSequenceClassification", "SEQ_CLS", options, train_heads=True)
    found = []
    for name in ("body", "whole"):
        source = Source(str(tmp_path / name), tmp_path / name)
        model, _ = loading.load_base(
            source, shape, quantize="none", dtype="fp32", device=torch.device("cpu"), pad_token_id=0
        )
        weights.start_head(model, bias)
        found.append(model.classifier.bias.tolist())
    assert found == [bias, [0.0] * len(bias)]
