"""Where static students begin: PCA against an independent decomposition, frequencies by hand, separators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from distilpeft.errors import InputError
from distilpeft.models.static import start
from distilpeft.models.static.architecture import body_of
from distilpeft.recipe.student import Static

RNG = np.random.default_rng(3)


def test_pca_is_that_of_a_singular_value_decomposition():
    table = RNG.normal(size=(40, 6)) @ np.diag([5, 4, 3, 2, 1, 0.5]) + 7
    used = [at for at in range(40) if at % 4]
    found = start.reduced(table, used, 3)
    mean = table[used].mean(0)
    _, _, axes = np.linalg.svd(table[used] - mean, full_matrices=False)
    right = (table - mean) @ axes[:3].T
    np.testing.assert_allclose(np.abs(found), np.abs(right), rtol=1e-9, atol=1e-9)
    # signs are those in which an axis's largest entry is positive
    largest = [axis[np.abs(axis).argmax()] for axis in axes[:3]]
    np.testing.assert_allclose(found, right * np.sign(largest), rtol=1e-9, atol=1e-9)
    assert found.var(0).tolist() == sorted(found.var(0).tolist(), reverse=True)
    np.testing.assert_array_equal(start.reduced(table.copy(), used, 3), found)


def test_a_table_is_scaled_by_the_rows_that_are_used():
    found = start.scaled(np.array([[3.0, 4.0], [100.0, 0.0], [0.0, 5.0]]), [0, 2])
    # their mean square is (9 + 16 + 0 + 25) / 4
    np.testing.assert_allclose(found * np.sqrt(12.5), [[3, 4], [100, 0], [0, 5]])
    assert start.scaled(np.zeros((2, 2)), [0]).tolist() == [[0, 0], [0, 0]]


def test_without_dim_the_embeddings_stay_what_they_are():
    table = RNG.normal(size=(5, 4))
    assert start.reduced(table, [0, 1], None) is table


def test_more_directions_than_there_are_rows_are_refused():
    with pytest.raises(InputError, match=r"student.static.dim: 4 are more than the 2 directions"):
        start.reduced(RNG.normal(size=(9, 6)), [1, 2, 3], 4)


def test_a_weight_falls_with_the_share_of_a_token_among_those_that_count():
    found = start.sif_weights(np.array([2, 2, 3, 1]), 5, [0, 1])
    # of four tokens that count, 2 is there three times and 3 once; 4 never
    np.testing.assert_allclose(found, [1, 1, 0.001 / 0.751, 0.001 / 0.251, 1])


@pytest.mark.parametrize("weighting", ["learned", "sif"])
def test_a_student_begins_with_the_teachers_embeddings_and_a_new_head(weighting):
    teacher, words = tiny.classifier(), tiny.tokenizer()
    counts = np.bincount([token for text, _ in tiny.rows(20) for token in words(text)["input_ids"]])
    made = start.new(
        AutoModelForSequenceClassification, {"num_labels": 2}, words, teacher, Static(hidden=6, weighting=weighting),
        pair=False, counts_V=counts,
    )  # fmt: skip
    body = body_of(made)
    own = teacher.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(body.embeddings.weight, own / own[4:].square().mean().sqrt())
    plain = weighting == "learned"
    assert (set(body.token_weights.tolist()) == {1.0}) == plain
    if not plain:
        right = start.sif_weights(counts, len(tiny.WORDS), [0, 1, 2, 3]).tolist()
        assert body.token_weights.tolist() == pytest.approx(right)
    assert made.fresh == ["classifier.0.bias", "classifier.0.weight", "classifier.2.bias", "classifier.2.weight"]
    assert made.config.ignored_ids == [tiny.WORDS.index(f"[{name}]") for name in ("PAD", "UNK", "CLS", "SEP")]


def test_rows_of_the_embeddings_behind_the_tokenizers_last_token_are_left_out():
    teacher = tiny.classifier(vocab_size=len(tiny.WORDS) + 7)
    made = start.new(
        AutoModelForSequenceClassification, {"num_labels": 2}, tiny.tokenizer(), teacher, Static(dim=3), pair=False,
    )  # fmt: skip
    assert body_of(made).embeddings.weight.shape == (len(tiny.WORDS), 3)


def test_a_cut_vocabulary_leaves_the_vectors_of_its_tokens():
    teacher, words = tiny.classifier(), tiny.tokenizer()
    kept = np.array([0, 1, 2, 3, 6, 9])
    core = Tokenizer(models.WordLevel({tiny.WORDS[old]: new for new, old in enumerate(kept)}, unk_token="[UNK]"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    left = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    made = start.new(
        AutoModelForSequenceClassification, {"num_labels": 2}, left, teacher, Static(), pair=False, kept_K=kept
    )
    table = body_of(made).embeddings.weight
    own = teacher.bert.embeddings.word_embeddings.weight[kept]
    torch.testing.assert_close(table, own / own[4:].square().mean().sqrt())
    assert made.config.ignored_ids == [0, 1, 2, 3]
    assert made.cut_weights == (len(words) - 6) * (own.shape[1] + 1)


def test_two_texts_need_a_separator_between_them():
    assert start.separator(tiny.tokenizer()) == tiny.WORDS.index("[SEP]")
    core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="puts no separator between two texts"):
        start.separator(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"))
