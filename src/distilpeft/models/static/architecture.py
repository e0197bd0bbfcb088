"""Static students: a vector for each token, their weighted mean, and a head; no attention, and no order of words.

An ordinary model of transformers, so that it is trained, saved, loaded, timed and exported as any other. Importing this
module tells transformers' Auto classes of it: `loading`, where architectures are resolved, does so.

A row's vector is sum(w_t * e_t) / number of tokens, over the tokens that are counted: all but padding and the
tokenizer's special tokens, which stand in every row. It is what model2vec and sentence-transformers' StaticEmbedding
compute (they leave special tokens out, too), so a weight can be multiplied into its embedding for them. A row
without such tokens has the vector 0. Of a pair [u, v, |u - v|, u * v] goes into the head (arXiv:1705.02364, section
3.2); the second text begins behind the first separator.

    B  rows    S  positions    V  vocabulary    D  units of a vector    H  units of the teacher's embeddings
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from distilpeft.recipe.student import STATIC_TYPE


class StaticConfig(PretrainedConfig):  # type: ignore[misc]
    """Shape of a static model.

    Args:
        vocab_size: tokens with a vector.
        hidden_size: units of a vector.
        head_size: units of the head's hidden layer; None: a linear head.
        pair: it reads pairs of texts.
        ignored_ids: special tokens, which do not count.
        sep_token_id: what stands between the two texts of a pair.
        kwargs: what every configuration has.
    """

    model_type = STATIC_TYPE

    def __init__(
        self,
        vocab_size: int = 0,
        hidden_size: int = 0,
        head_size: int | None = None,
        *,
        pair: bool = False,
        ignored_ids: Sequence[int] = (),
        sep_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.head_size = vocab_size, hidden_size, head_size
        self.pair, self.ignored_ids, self.sep_token_id = pair, list(ignored_ids), sep_token_id


class _Static(PreTrainedModel):  # type: ignore[misc]
    """What static models share."""

    config_class = StaticConfig
    base_model_prefix = "static"
    main_input_name = "input_ids"

    def _init_weights(self, module: nn.Module) -> None:
        with torch.no_grad():
            if isinstance(module, StaticModel):
                nn.init.ones_(module.token_weights)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)


class StaticModel(_Static):
    """Weighted means of token vectors."""

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_weights = nn.Parameter(torch.ones(config.vocab_size))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token vectors."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Take others."""
        self.embeddings = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """The weighted token vectors [B, S, D], 0 where a token does not count, and their mean [B, D].

        Args:
            input_ids: [B, S].
            attention_mask: 0 for padding; None: there is none.
            token_type_ids: not looked at: separators tell two texts apart, in every tokenizer.
        """
        states_BSD = self.weighted(input_ids)
        counted_BS = self.counted(input_ids, attention_mask)
        states_BSD = states_BSD * counted_BS[..., None].to(states_BSD.dtype)
        return BaseModelOutputWithPooling(
            last_hidden_state=states_BSD, pooler_output=states_BSD.sum(1) / _number(counted_BS, states_BSD.dtype)
        )

    def weighted(self, ids_BS: Tensor) -> Tensor:
        """Token vectors times their weights, [B, S, D]."""
        states_BSD: Tensor = self.embeddings(ids_BS) * F.embedding(ids_BS, self.token_weights[:, None])
        return states_BSD

    def counted(self, ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Which tokens a mean is over, [B, S]."""
        counted_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
        for token in self.config.ignored_ids:
            counted_BS = counted_BS & (ids_BS != token)
        return counted_BS


class StaticForSequenceClassification(_Static):
    """A static model with a linear layer, or one of `head_size` ReLU units before it, for classes or numbers."""

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.static = StaticModel(config)
        width = config.hidden_size * (4 if config.pair else 1)
        first = [] if config.head_size is None else [nn.Linear(width, config.head_size), nn.ReLU()]
        self.classifier = nn.Sequential(*first, nn.Linear(config.head_size or width, config.num_labels))
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Logits [B, C]; see `StaticModel.forward` for the arguments."""
        if not self.config.pair:
            vector_BD = self.static(input_ids, attention_mask).pooler_output
            return SequenceClassifierOutput(logits=self.classifier(vector_BD))
        states_BSD = self.static.weighted(input_ids)
        counted_BS = self.static.counted(input_ids, attention_mask)
        present_BS = torch.ones_like(counted_BS) if attention_mask is None else attention_mask.bool()
        # Padding may have the separator's id.
        behind_BS = ((input_ids == self.config.sep_token_id) & present_BS).long().cumsum(1) > 0
        u, v = (_mean(states_BSD, counted_BS & part_BS) for part_BS in (~behind_BS, behind_BS))
        return SequenceClassifierOutput(logits=self.classifier(torch.cat([u, v, (u - v).abs(), u * v], dim=-1)))


def _mean(states_BSD: Tensor, counted_BS: Tensor) -> Tensor:
    """The mean of the counted positions, [B, D]."""
    return (states_BSD * counted_BS[..., None].to(states_BSD.dtype)).sum(1) / _number(counted_BS, states_BSD.dtype)


def _number(counted_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """How many positions count, 1 for none, [B, 1]."""
    return counted_BS.sum(1, keepdim=True).clamp(min=1).to(dtype)


def body_of(model: PreTrainedModel) -> StaticModel:
    """The token vectors of a static model with or without a head."""
    body: StaticModel = getattr(model, model.base_model_prefix, model)
    return body


def balance(model: PreTrainedModel) -> None:
    """Move the largest entry of each vector into its weight, in place: the products stay what they are.

    All vectors then have the same range, so that one scale for the whole table, as int8 graphs have it, is one for
    each token.
    """
    body = body_of(model)
    with torch.no_grad():
        largest_V = body.embeddings.weight.abs().amax(1)
        largest_V[largest_V == 0] = 1
        body.embeddings.weight.div_(largest_V[:, None])
        body.token_weights.mul_(largest_V)


AutoConfig.register(STATIC_TYPE, StaticConfig, exist_ok=True)
AutoModel.register(StaticConfig, StaticModel, exist_ok=True)
AutoModelForSequenceClassification.register(StaticConfig, StaticForSequenceClassification, exist_ok=True)
