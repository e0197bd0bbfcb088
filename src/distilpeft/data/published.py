"""Models of the hub as they were published: configurations and weight shapes, to plan before anything is downloaded.

`known_models.json` has the configurations; a test counts their weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distilpeft.data.sources import Source
from distilpeft.machine.files import JsonObject

Shapes = dict[str, tuple[int, ...]]
FILE = Path(__file__).parent / "known_models.json"


def known_model(source: Source) -> tuple[JsonObject, Shapes] | None:
    """Configuration and weight shapes of a hub model; None if it is not among the known."""
    config: JsonObject | None = json.loads(FILE.read_text(encoding="utf-8")).get(source.name)
    if config is None or source.path is not None:
        return None
    return config, shapes_of(config)


def shapes_of(config: JsonObject) -> Shapes:
    """The weights of a model with this configuration, of a type in `SHAPES`."""
    return SHAPES[config["model_type"]](config)


def _layers(
    count: int, prefix: str, matrices: Mapping[str, tuple[int, int]], norms: Mapping[str, int], *, bias: bool
) -> Shapes:
    """The weights of all layers: matrices (out, in), with biases or without, and norms."""
    shapes: Shapes = {}
    for layer in (f"{prefix}.{index}" for index in range(count)):
        for name, shape in matrices.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes |= {f"{layer}.{name}.bias": shape[:1]} if bias else {}
        for name, width in norms.items():
            shapes[f"{layer}.{name}.weight"] = (width,)
            shapes |= {f"{layer}.{name}.bias": (width,)} if bias else {}
    return shapes


def _decoder(config: Mapping[str, int]) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    matrices = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (config["vocab_size"], hidden)}
    return shapes | _layers(config["num_hidden_layers"], "model.layers", matrices, norms, bias=False)


def _qwen2(config: Mapping[str, int]) -> Shapes:
    """Llama with biases before attention."""
    shapes = _decoder(config)
    before = [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    biased = [name for name in shapes if name.endswith(tuple(before))]
    return shapes | {f"{name.removesuffix('weight')}bias": shapes[name][:1] for name in biased}


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
    shapes: Shapes = {f"embeddings.{name}.weight": (count, hidden) for name, count in embedded.items()}
    shapes |= {f"embeddings.LayerNorm.{part}": (hidden,) for part in ("weight", "bias")}
    shapes |= {"pooler.dense.weight": (hidden, hidden), "pooler.dense.bias": (hidden,)}
    return shapes | _layers(config["num_hidden_layers"], "encoder.layer", matrices, norms, bias=True)


def _distilbert(config: Mapping[str, int]) -> Shapes:
    hidden, ffn = config["dim"], config["hidden_dim"]
    matrices = {f"attention.{name}_lin": (hidden, hidden) for name in "qkv"}
    matrices |= {"attention.out_lin": (hidden, hidden), "ffn.lin1": (ffn, hidden), "ffn.lin2": (hidden, ffn)}
    norms = {"sa_layer_norm": hidden, "output_layer_norm": hidden}
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
    }
    shapes |= {f"embeddings.LayerNorm.{part}": (hidden,) for part in ("weight", "bias")}
    return shapes | _layers(config["n_layers"], "transformer.layer", matrices, norms, bias=True)


def _modernbert(config: Mapping[str, int]) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    matrices = {
        "attn.Wqkv": (3 * hidden, hidden), "attn.Wo": (hidden, hidden), "mlp.Wi": (2 * ffn, hidden),
        "mlp.Wo": (hidden, ffn),
    }  # fmt: skip
    norms = {"attn_norm": hidden, "mlp_norm": hidden}
    shapes: Shapes = {"embeddings.tok_embeddings.weight": (config["vocab_size"], hidden)}
    shapes |= {"embeddings.norm.weight": (hidden,), "final_norm.weight": (hidden,)}
    shapes |= _layers(config["num_hidden_layers"], "layers", matrices, norms, bias=False)
    del shapes["layers.0.attn_norm.weight"]  # the first layer has none
    return shapes


def _t5(config: Mapping[str, int]) -> Shapes:
    """T5 and mT5 with gated feed-forward parts, and an output layer of their own."""
    hidden, ffn, inner = config["d_model"], config["d_ff"], config["num_heads"] * config["d_kv"]
    shapes: Shapes = {"shared.weight": (config["vocab_size"], hidden), "lm_head.weight": (config["vocab_size"], hidden)}
    for side, parts in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        block = {f"layer.{at}.{part}.{name}": (hidden, inner) if name == "o" else (inner, hidden)
                 for at, part in enumerate(parts) for name in "qkvo"}  # fmt: skip
        last = f"layer.{len(parts)}.DenseReluDense"
        block |= {f"{last}.wi_0": (ffn, hidden), f"{last}.wi_1": (ffn, hidden), f"{last}.wo": (hidden, ffn)}
        norms = {f"layer.{at}.layer_norm": hidden for at in range(len(parts) + 1)}
        shapes |= _layers(config["num_layers"], f"{side}.block", block, norms, bias=False)
        shapes[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, config["num_heads"])
        shapes[f"{side}.final_layer_norm.weight"] = (hidden,)
    return shapes


def _bart(config: Mapping[str, int]) -> Shapes:
    """BART, with positions that are learnt, and M2M100, whose positions are computed."""
    hidden, ffn, is_bart = config["d_model"], config["encoder_ffn_dim"], str(config["model_type"]) == "bart"
    shapes: Shapes = {"model.shared.weight": (config["vocab_size"], hidden)}
    for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        matrices = {f"{part}.{name}_proj": (hidden, hidden) for part in attentions for name in ("q", "k", "v", "out")}
        matrices |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
        norms = dict.fromkeys((*(f"{part}_layer_norm" for part in attentions), "final_layer_norm"), hidden)
        shapes |= _layers(config[f"{side}_layers"], f"model.{side}.layers", matrices, norms, bias=True)
        outer = "layernorm_embedding" if is_bart else "layer_norm"
        shapes |= {f"model.{side}.{outer}.{part}": (hidden,) for part in ("weight", "bias")}
        if is_bart:
            shapes[f"model.{side}.embed_positions.weight"] = (config["max_position_embeddings"] + 2, hidden)
    return shapes


def _vit(config: Mapping[str, int]) -> Shapes:
    hidden, ffn, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    matrices = {f"attention.{name}_proj": (hidden, hidden) for name in "qkvo"}
    matrices |= {"mlp.fc1": (ffn, hidden), "mlp.fc2": (hidden, ffn)}
    norms = {"layernorm_before": hidden, "layernorm_after": hidden}
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, hidden),
        "embeddings.position_embeddings": (1, (config["image_size"] // patch) ** 2 + 1, hidden),
        "embeddings.patch_embeddings.projection.weight": (hidden, config["num_channels"], patch, patch),
        "embeddings.patch_embeddings.projection.bias": (hidden,), "layernorm.weight": (hidden,),
        "layernorm.bias": (hidden,),
    }  # fmt: skip
    return shapes | _layers(config["num_hidden_layers"], "layers", matrices, norms, bias=True)


def _resnet(config: Mapping[str, Any]) -> Shapes:
    """ResNets of basic blocks: two convolutions of 3 x 3 points, and a shortcut where the width changes."""
    first = config["embedding_size"]
    shapes = _convolution("embedder.embedder", first, config["num_channels"], 7)
    before = first
    for stage, (width, depth) in enumerate(zip(config["hidden_sizes"], config["depths"], strict=True)):
        for block in range(depth):
            at = f"encoder.stages.{stage}.layers.{block}"
            shapes |= _convolution(f"{at}.shortcut", width, before, 1) if before != width else {}
            shapes |= _convolution(f"{at}.layer.0", width, before, 3) | _convolution(f"{at}.layer.1", width, width, 3)
            before = width
    return shapes


def _convolution(at: str, width: int, before: int, points: int) -> Shapes:
    """A convolution with BatchNorm."""
    norm = {f"{at}.normalization.{part}": (width,) for part in ("weight", "bias")}
    return {f"{at}.convolution.weight": (width, before, points, points), **norm}


SHAPES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "bart": _bart, "bert": _bert, "distilbert": _distilbert, "llama": _decoder, "m2m_100": _bart,
    "modernbert": _modernbert, "mt5": _t5, "qwen2": _qwen2, "resnet": _resnet, "roberta": _bert, "t5": _t5,
    "vit": _vit, "xlm-roberta": _bert,
}  # fmt: skip
"""Type of model → its weights."""
