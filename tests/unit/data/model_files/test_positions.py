"""How far a model's positions reach, compared with models that transformers builds."""

from __future__ import annotations

import pytest
import torch
import transformers

from distilpeft.data.model_files.positions import Reach, reach_of

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 30}
SIZES = {
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 30, "n_positions": 20},
    "distilbert": {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "vocab_size": 30},
    "electra": {**SMALL, "embedding_size": 8},
    "llama": {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0},
    "modernbert": {**SMALL, "pad_token_id": 0},
    "roformer": {**SMALL, "embedding_size": 8},
    "deberta-v2": {**SMALL, "relative_attention": True, "position_biased_input": False},
    "esm": {**SMALL, "pad_token_id": 1, "position_embedding_type": "absolute"},
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 30},
}
HARD = [
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "mpnet",
    "longformer",
    "esm",
    "electra",
    "distilbert",
    "gpt2",
    "roformer",
]
SOFT = ["llama", "modernbert"]


def model_of(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    settings = {**SIZES.get(kind, SMALL), "max_position_embeddings": 20}
    if kind == "longformer":
        settings["attention_window"] = [4]
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **settings)).eval()


def reads(model: transformers.PreTrainedModel, tokens: int) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, tokens), 5))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", HARD)
def test_a_table_ends_where_the_model_fails(kind):
    model = model_of(kind)
    reach = reach_of(model.config.to_dict())
    assert reach is not None
    assert reach.is_hard
    assert reads(model, reach.tokens)
    if kind != "longformer":  # pads to its window first
        assert not reads(model, reach.tokens + 1)


@pytest.mark.parametrize("kind", SOFT)
def test_rotary_positions_go_on(kind):
    model = model_of(kind)
    assert reach_of(model.config.to_dict()) == Reach(20, is_hard=False)
    assert reads(model, 30)


def test_relative_positions_have_no_end():
    assert reach_of(transformers.T5Config(**SIZES["t5"]).to_dict()) is None
    model = model_of("deberta-v2")
    reach = reach_of(model.config.to_dict())
    assert reach is not None
    assert not reach.is_hard
    assert reads(model, 30)


def test_each_side_of_an_encoder_decoder_has_its_own():
    led = {"model_type": "led", "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 16}
    assert reach_of(led, "encoder") == Reach(64, is_hard=True)
    assert reach_of(led, "decoder") == Reach(16, is_hard=True)
    part = {"model_type": "bert", "max_position_embeddings": 32}
    nested = {"model_type": "encoder-decoder", "encoder": part, "decoder": {**part, "max_position_embeddings": 8}}
    assert reach_of(nested, "decoder") == Reach(8, is_hard=True)


def test_a_configuration_that_names_no_length_has_none():
    assert reach_of({"model_type": "bert"}) is None
    assert reach_of({"model_type": "xlnet", "max_position_embeddings": -1}) is None
