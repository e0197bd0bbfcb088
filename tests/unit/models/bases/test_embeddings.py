"""Embeddings cut to some ids, with tied and untied heads, padded rows, and the ids that settings name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import tiny, tiny_lm
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

from distilpeft.errors import InputError
from distilpeft.models.bases.embeddings import cut_embeddings, named_ids

KEPT = np.array([0, 1, 5, 7, 40, 41, 99])


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [100, 128], ids=["as many rows as tokens", "rows beyond the last token"])
def test_a_cut_language_model_gives_the_kept_ids_the_logits_that_it_gave_them(tied, rows):
    model = tiny_lm.model(vocab_size=rows, tie_word_embeddings=tied).double()
    before = logits(model, [5, 40, 99, 7])
    cut_embeddings(model, KEPT)
    assert model.config.vocab_size == len(KEPT) == model.get_input_embeddings().num_embeddings
    assert model.get_output_embeddings().out_features == len(KEPT)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.cut_weights == (rows - len(KEPT)) * 64 * (1 if tied else 2)
    torch.testing.assert_close(logits(model, [2, 4, 6, 3]), before[..., torch.from_numpy(KEPT)], rtol=0, atol=1e-12)


def test_a_cut_classifier_answers_as_before():
    model = tiny.classifier(vocab_size=100).double()
    before = logits(model, [5, 40, 99, 7])
    cut_embeddings(model, KEPT)
    torch.testing.assert_close(logits(model, [2, 4, 6, 3]), before, rtol=0, atol=1e-12)
    assert model.get_input_embeddings().padding_idx == 0


def test_tokens_without_a_row_stay_without_one():
    model = tiny.classifier(vocab_size=60)
    cut_embeddings(model, KEPT)
    assert model.config.vocab_size == 6, "id 99 was added to the tokenizer alone"


def test_settings_that_name_ids_get_the_new_ones_and_lose_those_that_are_gone():
    model = tiny_lm.model(vocab_size=100, bos_token_id=7, eos_token_id=[40, 41, 50], pad_token_id=1)
    model.generation_config = GenerationConfig(
        bos_token_id=7, eos_token_id=[40, 50], pad_token_id=1, suppress_tokens=[99, 51], forced_bos_token_id=50
    )
    assert named_ids(model.config) == {7, 40, 41, 50, 1}
    cut_embeddings(model, KEPT)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (3, [4, 5], 1)
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.suppress_tokens) == (3, [4], [6])
    assert settings.forced_bos_token_id is None


def test_a_saved_cut_model_loads_with_its_smaller_vocabulary(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=99))
    cut_embeddings(model, KEPT)
    model.save_pretrained(str(tmp_path))
    loaded = GPT2LMHeadModel.from_pretrained(str(tmp_path))
    assert loaded.config.eos_token_id == 6
    torch.testing.assert_close(logits(loaded, [2, 6]), logits(model, [2, 6]))


def roberta() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20, pad_token_id=1, bos_token_id=0, eos_token_id=5,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def test_positions_counted_from_the_padding_token_stay_where_they_are_or_the_cut_is_refused():
    model = roberta()
    before = logits(model, [0, 40, 99, 5])
    cut_embeddings(model, KEPT)
    torch.testing.assert_close(logits(model, [0, 4, 6, 2]), before)
    with pytest.raises(InputError, match="counts positions from its padding token's id, 1, which would become 0"):
        cut_embeddings(roberta(), KEPT[1:])
