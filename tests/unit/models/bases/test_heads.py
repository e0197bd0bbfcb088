"""Finished heads in the order of the recipe's classes: the same answers, in other places, for every kind of head."""

from __future__ import annotations

import pytest
import torch
import transformers
from support import tiny
from torch import nn

from distilpeft.data.sources import Source
from distilpeft.errors import InputError
from distilpeft.models import loading
from distilpeft.models.loading import Architecture

OWN, OURS, ORDER = list("abcde"), list("DbeAc"), [3, 1, 4, 0, 2]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
FAMILIES = {
    "bert": SHAPE,
    "roberta": SHAPE,
    "electra": {**SHAPE, "embedding_size": 32},
    "deberta-v2": SHAPE,
    "modernbert": {**SHAPE, "pad_token_id": 0},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40},
    "xlnet": {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": 40},
    "funnel": {"d_model": 32, "block_sizes": [1], "n_head": 2, "d_head": 16, "d_inner": 32, "vocab_size": 40},
    "llama": {**SHAPE, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 40, "pad_token_id": 0},
}  # fmt: skip


def architecture(labels: list[str], kind: str = "AutoModelForSequenceClassification") -> Architecture:
    ids = dict(enumerate(labels))
    options = {"num_labels": len(labels), "id2label": ids, "label2id": {name: index for index, name in ids.items()}}
    return Architecture(kind, None, options, train_heads=True)


def finished(family: str, kind: str, names: list[str], **changes: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    model = getattr(transformers, kind).from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def load(folder, wanted: Architecture, quantize: str = "none") -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    source = Source(str(folder), folder)
    device = torch.device("cpu")
    model, _ = loading.load_base(source, wanted, quantize=quantize, dtype="fp32", device=device, pad_token_id=0)
    return model.eval()


def answers(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 21).unsqueeze(0)).logits


@pytest.mark.parametrize("kind", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_classes_in_another_order_are_matched_by_name(tmp_path, family, kind):
    model = finished(family, kind, OWN)
    model.save_pretrained(str(tmp_path))
    loaded = load(tmp_path, architecture(OURS, kind))
    assert loaded.fresh == []
    torch.testing.assert_close(answers(loaded), answers(model)[..., ORDER])
    assert loaded.config.id2label == dict(enumerate(OURS))
    loaded.save_pretrained(str(tmp_path / "again"))
    torch.testing.assert_close(answers(load(tmp_path / "again", architecture(OURS, kind))), answers(loaded))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_the_head_of_a_base_that_is_quantized_moves_as_well(tmp_path, quantize):
    finished("bert", "AutoModelForSequenceClassification", OWN).save_pretrained(str(tmp_path))
    straight, moved = (load(tmp_path, architecture(labels), quantize) for labels in (OWN, OURS))
    torch.testing.assert_close(answers(moved), answers(straight)[..., ORDER])


def test_a_picture_models_head_moves_as_well(tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic", "num_labels": 5}
    config = transformers.ResNetConfig(
        **sizes, id2label=dict(enumerate(OWN)), label2id={n: i for i, n in enumerate(OWN)}
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(str(tmp_path))
    loaded = load(tmp_path, architecture(OURS, "AutoModelForImageClassification"))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values=pixels).logits, model(pixel_values=pixels).logits[:, ORDER])


def test_a_dense_layer_as_wide_as_there_are_classes_stays_where_it_is(tmp_path):
    names = [f"class {number}" for number in range(32)]
    model = finished("roberta", "AutoModelForSequenceClassification", names)
    assert model.classifier.dense.out_features == model.classifier.out_proj.out_features == 32
    model.save_pretrained(str(tmp_path))
    torch.testing.assert_close(answers(load(tmp_path, architecture(names[::-1]))), answers(model).flip(-1))


def test_two_layers_that_may_answer_are_refused(tmp_path):
    names = [f"class {number}" for number in range(32)]
    finished("deberta-v2", "AutoModelForSequenceClassification", names).save_pretrained(str(tmp_path))
    with pytest.raises(
        InputError, match=r"its head are in another order, which cannot be changed; list task\.labels in"
    ):
        load(tmp_path, architecture(names[::-1]))
    load(tmp_path, architecture(names))


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["bad", "good"]], ids=["numbered", "the same"])
def test_a_head_in_the_recipes_order_is_left_alone(tmp_path, names):
    model = finished("bert", "AutoModelForSequenceClassification", names)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(answers(load(tmp_path, architecture(["bad", "good"]))), answers(model))


def test_a_head_of_other_classes_starts_again_and_is_trained_as_a_new_one(tmp_path):
    model = finished("bert", "AutoModelForSequenceClassification", ["ham", "spam"])
    model.save_pretrained(str(tmp_path))
    loaded = load(tmp_path, architecture(["bad", "good"]))
    assert loaded.fresh == ["classifier.bias", "classifier.weight"]
    assert not torch.allclose(loaded.classifier.weight, model.classifier.weight)
    assert loaded.classifier.weight.std() < 0.05
    assert torch.equal(loaded.classifier.bias, torch.zeros(2))
    assert torch.equal(loaded.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    torch.testing.assert_close(answers(load(tmp_path, architecture(["bad", "good"]))), answers(loaded))


def test_a_body_without_a_head_has_no_order(tmp_path):
    tiny.classifier(id2label={0: "b", 1: "a"}, label2id={"b": 0, "a": 1}).bert.save_pretrained(str(tmp_path))
    assert load(tmp_path, architecture(["a", "b"])).fresh == ["classifier.bias", "classifier.weight"]
