"""How many tokens a model's positions reach, from its configuration.

Most architectures before rotary positions keep a table with a row for each position, learned or of sines, and fail
beyond its end. Rotary and relative positions go on, if less well. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

OFFSET = frozenset({
    "altclip", "bridgetower", "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke",
    "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
"""Model types that keep the positions up to the padding id for themselves."""
TABLES = OFFSET | {
    "albert", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot",
    "blenderbot-small", "bros", "canine", "codegen", "convbert", "ctrl", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "flaubert", "fnet", "git", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj",
    "jina_embeddings_v3", "layoutlm", "led", "lxmert", "marian", "mbart", "megatron-bert", "mobilebert", "mra", "mvp",
    "nomic_bert", "nystromformer", "openai-gpt", "opt", "pegasus", "plbart", "prophetnet", "rembert", "roc_bert",
    "roformer", "splinter", "squeezebert", "tapas", "trocr", "xlm", "yoso",
}  # fmt: skip
"""Model types with a table of positions: in transformers 5.23 they have a parameter or buffer of that length."""
KEYS = ("max_position_embeddings", "n_positions")
Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Reach:
    """Positions that a model has: `tokens` of a text, and whether it fails beyond them."""

    tokens: int
    is_hard: bool


def reach_of(config: Mapping[str, object], side: Side = "encoder") -> Reach | None:
    """How far a model's positions go; None if its configuration names no end, as those of relative positions.

    Args:
        config: its config.json.
        side: of an encoder-decoder.
    """
    nested = config.get(side, config.get("text_config"))
    if isinstance(nested, Mapping):
        config = {"pad_token_id": config.get("pad_token_id"), **nested}
    names = (f"max_{side}_position_embeddings", *KEYS)
    rows = next((size for size in map(config.get, names) if isinstance(size, int) and size > 0), None)
    if rows is None:
        return None
    kind = config.get("model_type")
    pad = config.get("pad_token_id")
    reserved = (pad if isinstance(pad, int) else 0) + 1 if kind in OFFSET else 0
    return Reach(rows - reserved, kind in TABLES and not _is_relative(config))


def _is_relative(config: Mapping[str, object]) -> bool:
    """Whether a model of a type with a table was made without it."""
    if config.get("position_biased_input") is False:  # DeBERTa
        return True
    return config.get("model_type") == "esm" and config.get("position_embedding_type") == "rotary"
