"""PEFT adapters of others: merged, put on quantized weights, continued; each answers as PEFT itself does."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from support import tiny, tiny_lm

from distilpeft.data.sources import Source
from distilpeft.errors import InputError
from distilpeft.models import loading, lora
from distilpeft.models.loading import Architecture
from distilpeft.recipe.training import Lora

NAMES = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
CLASSES = Architecture("AutoModelForSequenceClassification", "SEQ_CLS", {"num_labels": 2, **NAMES}, train_heads=True)
TEXT = Architecture("AutoModelForCausalLM", "CAUSAL_LM", {}, train_heads=False)
CPU, LORA = torch.device("cpu"), Lora(rank=4, alpha=8, target_modules=("query", "value"))


def adapted(
    base: transformers.PreTrainedModel, folder: Path, task: str | None = "SEQ_CLS", **settings: object
) -> peft.PeftModel:
    """An adapter with weights that matter, saved below `folder` beside its base."""
    base.save_pretrained(str(folder / "base"))
    torch.manual_seed(1)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **settings}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type=task, **given)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ".modules_to_save." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder / "adapter"))
    return model


def source(folder: Path) -> Source:
    return Source("base", folder / "base", adapter=folder / "adapter")


def load(given: Source, architecture: Architecture, quantize: str = "none", heads: list[str] | None = None):
    torch.manual_seed(0)
    return loading.load_base(
        given, architecture, quantize=quantize, dtype="fp32", device=CPU, pad_token_id=0, heads=heads
    )


def answers(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 21).unsqueeze(0)).logits.float()


def test_weights_in_floating_point_take_the_adapter_in(tmp_path):
    expected = answers(adapted(tiny.classifier(), tmp_path))
    merged, _ = load(source(tmp_path), CLASSES)
    torch.testing.assert_close(answers(merged), expected, atol=1e-5, rtol=1e-4)
    assert type(merged) is transformers.BertForSequenceClassification
    assert merged.fresh == [], "the head came with the adapter"
    merged.save_pretrained(str(tmp_path / "merged"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged"))
    assert torch.equal(answers(again), answers(merged))


def test_a_head_that_the_base_lacks_comes_with_the_adapter(tmp_path):
    expected = answers(adapted(tiny.classifier(), tmp_path))
    tiny.classifier().bert.save_pretrained(str(tmp_path / "base"))
    merged, _ = load(source(tmp_path), CLASSES)
    torch.testing.assert_close(answers(merged), expected, atol=1e-5, rtol=1e-4)
    assert merged.fresh == []


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantized_weights_keep_the_adapter_beside_them(tmp_path, quantize):
    """Merging would round the sum: QLoRA's adapters are right on the weights that they were tuned on."""
    expected = answers(adapted(tiny.classifier(), tmp_path))
    joined, heads = load(source(tmp_path), CLASSES, quantize)
    assert isinstance(joined, peft.PeftModel)
    assert joined.fresh == []
    assert (answers(joined) - expected).abs().max() < 0.2
    merged = loading.join_adapter(
        lora.dequantize(load(source(tmp_path).base, CLASSES, quantize, heads)[0]), source(tmp_path), CLASSES, heads
    )
    assert (answers(merged) - answers(joined)).abs().max() < (0.05 if quantize == "int8" else 1e-5)


def test_classes_of_the_base_in_another_order_move_in_the_adapters_head_too(tmp_path):
    turned = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    expected = answers(adapted(tiny.classifier(**turned), tmp_path))
    for quantize, gap in (("none", 1e-5), ("nf4", 0.2)):
        loaded, _ = load(source(tmp_path), CLASSES, quantize)
        assert (answers(loaded) - expected.flip(-1)).abs().max() < gap


def test_an_adapter_without_a_head_moves_its_bases(tmp_path):
    turned = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    expected = answers(adapted(tiny.classifier(**turned), tmp_path, task=None))
    loaded, _ = load(source(tmp_path), CLASSES)
    torch.testing.assert_close(answers(loaded), expected.flip(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_adapter_is_continued_from_its_own_answers(tmp_path, quantize):
    turned = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    expected = answers(adapted(tiny.classifier(**turned), tmp_path))
    base, heads = load(source(tmp_path).base, CLASSES, quantize)
    model = lora.add_lora(base, LORA, CLASSES, heads, "teacher.lora")
    loading.take_over_adapter(model, source(tmp_path), CLASSES, heads)
    assert (answers(model) - expected.flip(-1)).abs().max() < (1e-5 if quantize == "none" else 0.2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert any("classifier.modules_to_save" in name for name in trained)
    model.save_pretrained(str(tmp_path / "tuned"))
    again = lora.load_adapter(load(source(tmp_path).base, CLASSES, quantize, heads)[0], tmp_path / "tuned")
    assert torch.equal(answers(again), answers(model))


def test_an_adapter_on_other_modules_is_not_continued(tmp_path):
    adapted(tiny.classifier(), tmp_path, target_modules=["query", "key"])
    base, heads = load(source(tmp_path).base, CLASSES)
    model = lora.add_lora(base, LORA, CLASSES, heads, "teacher.lora")
    with pytest.raises(InputError, match=r"teacher\.lora: the PEFT adapter .* is not on the same modules \(.*key"):
        loading.take_over_adapter(model, source(tmp_path), CLASSES, heads)


def test_a_head_of_another_number_of_classes_stays_new(tmp_path):
    adapted(tiny.classifier(num_labels=3), tmp_path)
    merged, _ = load(source(tmp_path), CLASSES)
    assert merged.fresh == ["classifier.bias", "classifier.weight"]
    assert merged.classifier.out_features == 2


def test_an_adapter_of_another_base_is_one_line(tmp_path):
    adapted(tiny.classifier(), tmp_path)
    tiny.classifier(hidden_size=32).save_pretrained(str(tmp_path / "base"))
    with pytest.raises(InputError, match=r"the PEFT adapter .*/adapter does not fit its base base: .*size mismatch"):
        load(source(tmp_path), CLASSES)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"query": 2}}])
def test_other_kinds_of_lora_are_merged(tmp_path, kind):
    expected = answers(adapted(tiny.classifier(), tmp_path, **kind))
    torch.testing.assert_close(answers(load(source(tmp_path), CLASSES)[0]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_language_models_adapter_writes_the_same_text(tmp_path, quantize):
    expected = answers(adapted(tiny_lm.model(), tmp_path, "CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    loaded, _ = load(source(tmp_path), TEXT, quantize)
    assert (answers(loaded) - expected).abs().max() < (1e-4 if quantize == "none" else 0.5)


def test_an_adapter_of_a_language_model_gives_a_classifier_its_body(tmp_path):
    model = adapted(tiny_lm.model(), tmp_path, "CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        expected = model.base_model.model.model(input_ids=torch.arange(5, 21).unsqueeze(0)).last_hidden_state
    loaded, _ = load(source(tmp_path), CLASSES)
    with torch.no_grad():
        found = loaded.eval().model(input_ids=torch.arange(5, 21).unsqueeze(0)).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert loaded.fresh == ["score.weight"]


def test_embeddings_that_were_added_for_the_adapter_are_added_here(tmp_path):
    base = tiny_lm.model(tie_word_embeddings=False)
    base.save_pretrained(str(tmp_path / "base"))
    size = base.config.vocab_size
    wider = tiny_lm.model(tie_word_embeddings=False)
    wider.resize_token_embeddings(size + 3, mean_resizing=False)
    wider.save_pretrained(str(tmp_path / "wider"))
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    expected = answers(adapted(wider, tmp_path, "CAUSAL_LM", **settings))
    base.save_pretrained(str(tmp_path / "base"))
    loaded, _ = load(source(tmp_path), TEXT)
    assert loaded.config.vocab_size == size + 3
    torch.testing.assert_close(answers(loaded), expected, atol=1e-5, rtol=1e-4)
