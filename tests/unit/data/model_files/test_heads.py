"""Whose classes a head answers: names in any order, numbers, other classes, and what contradicts itself."""

from __future__ import annotations

import json

import pytest

from distilpeft.data.model_files.heads import brings_head, compare, head_of
from distilpeft.data.sources import Source

MOODS = ["road", "food", "joy", "woe"]


def named(*names: str, **more: object) -> dict[str, object]:
    """A configuration as transformers writes it."""
    ids = {str(index): name for index, name in enumerate(names)}
    return {"id2label": ids, "label2id": {name: index for index, name in enumerate(names)}, **more}


@pytest.mark.parametrize(
    ("names", "labels", "verdict", "order"),
    [
        (MOODS, MOODS, "same", (0, 1, 2, 3)),
        (MOODS, ["woe", "food", "joy", "road"], "matched", (3, 1, 2, 0)),
        (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], ["entailment", "neutral", "contradiction"], "matched", (2, 1, 0)),
        (["NEGATIVE", "POSITIVE"], ["negative", "positive"], "matched", (0, 1)),
        (["Not  spam", "spam"], ["spam", "not spam"], "matched", (1, 0)),
        (["US", "us"], ["us", "US"], "matched", (1, 0)),
        (["LABEL_0", "LABEL_1"], ["bad", "good"], "numbered", (0, 1)),
        (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], "matched", (1, 0)),
        (["0", "1"], ["bad", "good"], "numbered", (0, 1)),
        (["0", "1"], ["1", "0"], "matched", (1, 0)),
        (["O", "B-PER", "I-PER"], ["B-PER", "I-PER", "O"], "matched", (1, 2, 0)),
    ],
    ids=["same", "other order", "case", "case only", "blanks", "differ by case", "numbered", "numbers for names",
         "digits", "digits for names", "tags"],
)  # fmt: skip
def test_names_decide_and_numbers_say_nothing(names, labels, verdict, order):
    head = compare(named(*names), labels)
    assert (head.verdict, head.order) == (verdict, order)


@pytest.mark.parametrize(
    ("config", "labels", "fault"),
    [
        (named("bad", "good"), ["bad", "fine"], "its head has other classes (bad, good) than task.labels"),
        (named("1", "2", "3"), ["a", "b", "c"], "its head has other classes (1, 2, 3) than task.labels"),
        (named("LABEL_1", "LABEL_0"), ["a", "b"], "its head has other classes (LABEL_1, LABEL_0) than task.labels"),
        ({"id2label": {"0": "x", "1": "x"}}, ["x", "y"], "its head has other classes (x, x) than task.labels"),
        (named("US", "us", "uk"), ["Us", "us", "uk"], "its head has other classes (US, us, uk) than task.labels"),
        (named("a", "b", "c"), ["a", "b"], "its head has 3 classes (a, b, c), but task.labels has 2"),
        (named("a"), ["a", "b"], "its head has 1 output (a), but task.labels has 2"),
        ({}, MOODS, "its head has 2 classes (LABEL_0, LABEL_1), but task.labels has 4"),
        ({"num_labels": 3}, MOODS, "its head has 3 classes (LABEL_0, LABEL_1, LABEL_2), but task.labels has 4"),
        (named("a", "b"), [], "its head has 2 classes (a, b), but a regression needs 1"),
        (
            named("a", "b", label2id={"a": 1, "b": 0}), ["a", "b"],
            "id2label and label2id of its config.json contradict each other: class 'a'",
        ),
        (
            {"id2label": {"1": "a", "2": "b"}}, ["a", "b"],
            "the id2label of its config.json does not number its classes from 0 to 1",
        ),
        (
            {"id2label": {"first": "a", "second": "b"}}, ["a", "b"],
            "id2label and label2id of its config.json are not names with numbers",
        ),
    ],
    ids=["other names", "from 1", "numbers turned round", "twice", "only one differs by case", "more", "one output",
         "default count", "num_labels", "no regression", "contradiction", "not from 0", "no numbers"],
)  # fmt: skip
def test_a_head_of_other_classes_is_none_for_these(config, labels, fault):
    head = compare(config, labels)
    assert (head.verdict, head.fault) == ("other", fault)
    assert not head.is_kept
    assert not head.moved


@pytest.mark.parametrize(
    ("config", "order"),
    [
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"bad": 1, "good": 0}}, (1, 0)),
        ({"label2id": {"bad": 1, "good": 0}}, (1, 0)),
        ({"id2label": {"0": "good", "1": "bad"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, (1, 0)),
        ({"id2label": {"1": "bad", "0": "good"}}, (1, 0)),
        ({"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1, "awful": 1}}, (1, 0)),
    ],
    ids=["only label2id was filled in", "only label2id", "only id2label was filled in", "no label2id", "a second name"],
)
def test_one_of_the_two_maps_is_enough(config, order):
    assert compare(config, ["bad", "good"]).order == order


def test_a_single_number_fits_a_regression_whatever_it_is_called():
    assert compare(named("similarity"), []).verdict == "same"


def test_only_what_transformers_would_not_do_by_itself_is_in_a_key():
    """It makes a new layer where the number of classes differs, and keeps the rows as they are where it does not."""
    assert compare(named("a", "b"), ["a", "b"]).key == ""
    assert compare(named("A", "B"), ["a", "b"]).key == ""
    assert compare({}, ["a", "b"]).key == ""
    assert compare(named("a", "b"), ["b", "a"]).key == "1,0"
    assert compare(named("ham", "spam"), ["a", "b"]).key == "new"
    assert compare(named("a", "b", label2id={"a": 1, "b": 0}), ["a", "b"]).key == "new"
    assert compare(named("a", "b", "c"), ["a", "b"]).key == ""


@pytest.mark.parametrize(
    ("architecture", "brings"),
    [
        ("BertForSequenceClassification", True),
        ("DeiTForImageClassificationWithTeacher", False),
        ("BertForMaskedLM", False),
        ("BertModel", False),
        ("LlamaForTokenClassification", False),
    ],
)
def test_the_architecture_tells_whether_there_is_a_head(architecture, brings):
    config = named("a", "b", architectures=[architecture])
    assert brings_head(config, "ForSequenceClassification") == brings
    expected = "same" if brings else "none"
    assert head_of(Source("m", None), config, "ForSequenceClassification", ["a", "b"]).verdict == expected


def test_without_an_architecture_named_classes_are_taken_for_a_head():
    source = Source("m", None)
    assert head_of(source, named("b", "a"), "ForSequenceClassification", ["a", "b"]).order == (1, 0)
    assert head_of(source, {}, "ForSequenceClassification", ["a", "b"]).verdict == "none"


@pytest.fixture
def adapter(tmp_path, safetensors_bytes):
    """Function: an adapter with these tensors on a base with these classes."""

    def make(shapes, config, saved=("classifier", "score")):
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "modules_to_save": list(saved)}))
        (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(shapes))
        return Source("base", tmp_path / "base", adapter=folder), config

    return make


HEAD = {"base_model.model.classifier.weight": (2, 8), "base_model.model.classifier.bias": (2,)}
LORA = {"base_model.model.bert.query.lora_A.weight": (4, 8), "base_model.model.bert.query.lora_B.weight": (8, 4)}


def test_an_adapter_that_brings_a_head_names_no_classes_so_they_are_numbered(adapter):
    source, config = adapter({**HEAD, **LORA}, {"architectures": ["BertModel"]})
    assert head_of(source, config, "ForSequenceClassification", ["bad", "good"]).verdict == "numbered"
    head = head_of(source, config, "ForSequenceClassification", MOODS)
    assert head.fault == "its head has 2 classes (LABEL_0, LABEL_1), but task.labels has 4"


def test_an_adapters_head_on_a_base_with_the_very_classes_has_their_order(adapter):
    source, config = adapter({**HEAD, **LORA}, named("good", "bad", architectures=["BertForSequenceClassification"]))
    assert head_of(source, config, "ForSequenceClassification", ["bad", "good"]).order == (1, 0)
    assert head_of(source, config, "ForSequenceClassification", ["ham", "spam"]).verdict == "numbered"


def test_a_configuration_beside_an_adapter_names_its_classes(adapter):
    source, config = adapter({**HEAD, **LORA}, {})
    (source.adapter / "config.json").write_text(json.dumps(named("spam", "ham")))
    assert head_of(source, config, "ForSequenceClassification", ["ham", "spam"]).order == (1, 0)
    assert head_of(source, config, "ForSequenceClassification", ["bad", "good"]).verdict == "other"


def test_an_adapter_without_a_head_leaves_its_bases(adapter):
    source, config = adapter(LORA, named("good", "bad", architectures=["BertForSequenceClassification"]))
    assert head_of(source, config, "ForSequenceClassification", ["bad", "good"]).order == (1, 0)
