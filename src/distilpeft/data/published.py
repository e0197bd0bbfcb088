"""Models of the hub as they were published: configurations and weight shapes, to plan before anything is downloaded.

`known_models.json` has the configurations; a test counts their weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from distilpeft.data.sources import Source
from distilpeft.machine.files import JsonObject

Shapes = dict[str, tuple[int, ...]]
FILE = Path(__file__).parent / "known_models.json"


def known_model(source: Source) -> tuple[JsonObject, Shapes] | None:
    """Configuration and weight shapes of a hub model; None if it is not among the known."""
    config: JsonObject | None = json.loads(FILE.read_text(encoding="utf-8")).get(source.name)
    if config is None or source.path is not None:
        return None
    return config, SHAPES[config["model_type"]](config)


def _layers(
    count: int, prefix: str, matrices: Mapping[str, tuple[int, int]], norms: Mapping[str, int], *, bias: bool
) -> Shapes:
    """The weights of all layers: matrices (out, in), with biases or without, and norms."""
    found: Shapes = {}
    for layer in (f"{prefix}.{index}" for index in range(count)):
        for name, shape in matrices.items():
            found[f"{layer}.{name}.weight"] = shape
            found |= {f"{layer}.{name}.bias": shape[:1]} if bias else {}
        for name, width in norms.items():
            found[f"{layer}.{name}.weight"] = (width,)
            found |= {f"{layer}.{name}.bias": (width,)} if bias else {}
    return found


def _decoder(config: Mapping[str, int]) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    matrices = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    found: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    found |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (config["vocab_size"], hidden)}
    return found | _layers(config["num_hidden_layers"], "model.layers", matrices, norms, bias=False)


def _qwen2(config: Mapping[str, int]) -> Shapes:
    """Llama with biases before attention."""
    found = _decoder(config)
    before = [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    biased = [name for name in found if name.endswith(tuple(before))]
    return found | {f"{name.removesuffix('weight')}bias": found[name][:1] for name in biased}


def _bert(config: Mapping[str, int]) -> Shapes:
    """BERT, RoBERTa and XLM-RoBERTa, with the pooler."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    embedded = {
        "word_embeddings": config["vocab_size"], "position_embeddings": config["max_position_embeddings"],
        "token_type_embeddings": config["type_vocab_size"],
    }  # fmt: skip
    matrices = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    matrices |= {"attention.output.dense": (hidden, hidden), "intermediate.dense": (ffn, hidden)}
    matrices |= {"output.dense": (hidden, ffn)}
    norms = {"attention.output.LayerNorm": hidden, "output.LayerNorm": hidden}
    found: Shapes = {f"embeddings.{name}.weight": (count, hidden) for name, count in embedded.items()}
    found |= {f"embeddings.LayerNorm.{part}": (hidden,) for part in ("weight", "bias")}
    found |= {"pooler.dense.weight": (hidden, hidden), "pooler.dense.bias": (hidden,)}
    return found | _layers(config["num_hidden_layers"], "encoder.layer", matrices, norms, bias=True)


def _distilbert(config: Mapping[str, int]) -> Shapes:
    hidden, ffn = config["dim"], config["hidden_dim"]
    matrices = {f"attention.{name}_lin": (hidden, hidden) for name in "qkv"}
    matrices |= {"attention.out_lin": (hidden, hidden), "ffn.lin1": (ffn, hidden), "ffn.lin2": (hidden, ffn)}
    norms = {"sa_layer_norm": hidden, "output_layer_norm": hidden}
    found: Shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
    }
    found |= {f"embeddings.LayerNorm.{part}": (hidden,) for part in ("weight", "bias")}
    return found | _layers(config["n_layers"], "transformer.layer", matrices, norms, bias=True)


def _modernbert(config: Mapping[str, int]) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    matrices = {
        "attn.Wqkv": (3 * hidden, hidden), "attn.Wo": (hidden, hidden), "mlp.Wi": (2 * ffn, hidden),
        "mlp.Wo": (hidden, ffn),
    }  # fmt: skip
    norms = {"attn_norm": hidden, "mlp_norm": hidden}
    found: Shapes = {"embeddings.tok_embeddings.weight": (config["vocab_size"], hidden)}
    found |= {"embeddings.norm.weight": (hidden,), "final_norm.weight": (hidden,)}
    found |= _layers(config["num_hidden_layers"], "layers", matrices, norms, bias=False)
    del found["layers.0.attn_norm.weight"]  # the first layer has none
    return found


SHAPES: dict[str, Callable[[Mapping[str, int]], Shapes]] = {
    "bert": _bert, "distilbert": _distilbert, "llama": _decoder, "modernbert": _modernbert, "qwen2": _qwen2,
    "roberta": _bert, "xlm-roberta": _bert,
}  # fmt: skip
"""Type of model → its weights."""
