"""A tokenizer's file with fewer tokens: ids wherever they stand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from distilpeft.data.cut_vocabulary import kept, rewrite
from distilpeft.errors import InputError

WORDS = {"[PAD]": 0, "x": 1, "[CLS]": 2, "y": 3, "[SEP]": 4, "z": 5, "[UNK]": 6}


def words(post_processor: object) -> Tokenizer:
    core = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    core.pre_tokenizer, core.post_processor = pre_tokenizers.Whitespace(), post_processor
    return core


TEMPLATE = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 4)]
)


@pytest.mark.parametrize(
    "framing",
    [
        TEMPLATE,
        processors.BertProcessing(("[SEP]", 4), ("[CLS]", 2)),
        processors.RobertaProcessing(("[SEP]", 4), ("[CLS]", 2)),
        processors.Sequence([processors.ByteLevel(), TEMPLATE]),
    ],
    ids=["template", "bert", "roberta", "sequence"],
)
def test_special_tokens_around_a_text_and_a_pair_have_their_new_ids(framing):
    spec = json.loads(words(framing).to_str())
    assert rewrite.framing_ids(spec["post_processor"]) == {2, 4}
    found = Tokenizer.from_str(json.dumps(rewrite.cut(spec, np.array([0, 2, 3, 4, 6]), "it")))
    assert found.encode("y").ids == [1, 2, 3]
    assert found.encode("x").ids == [1, 4, 3], "what is gone is unknown"
    before = words(framing).encode("y", "y")
    assert found.encode("y", "y").tokens == before.tokens
    assert found.encode("y", "y").type_ids == before.type_ids


def test_added_tokens_follow_the_pieces_and_keep_their_settings():
    core = words(None)
    core.add_special_tokens(["<end>"])
    core.add_tokens(["new"])
    found = json.loads(json.dumps(rewrite.cut(json.loads(core.to_str()), np.array([5, 6, 7, 8]), "it")))
    assert [(token["id"], token["content"], token["special"]) for token in found["added_tokens"]] == [
        (2, "<end>", True), (3, "new", False),
    ]  # fmt: skip
    assert Tokenizer.from_str(json.dumps(found)).encode("z new<end>").ids == [0, 3, 2]


def test_older_files_that_have_each_merge_as_one_text_are_read():
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}, [("a", "b"), ("ab", "c")]))
    spec = json.loads(core.to_str())
    spec["model"]["merges"] = ["a b", "ab c"]
    found = rewrite.cut(spec, np.array([0, 1, 2]), "it")
    assert found["model"]["merges"] == [["a", "b"]]


def test_a_tokenizer_whose_ids_have_gaps_is_refused_or_closed():
    core = Tokenizer(models.WordLevel({"a": 0, "b": 5, "[UNK]": 9}, unk_token="[UNK]"))
    found = rewrite.cut(json.loads(core.to_str()), np.array([5, 9]), "it")
    assert found["model"]["vocab"] == {"b": 0, "[UNK]": 1}


def test_a_kind_that_cannot_be_cut_is_named():
    with pytest.raises(
        InputError, match=r"student.vocabulary: the tokenizer of it is of the kind Magic; only WordPiece"
    ):
        kept.check_kind({"model": {"type": "Magic"}}, "it")
    with pytest.raises(InputError, match=r"merges at random \(dropout\)"):
        kept.check_kind({"model": {"type": "BPE", "dropout": 0.1}}, "it")
