"""What all language models share: a head over a vocabulary, the loss of every target token, and its scores.

B  rows of a batch    N  targets of a batch    H  hidden units    V  vocabulary    R  rows
K  what `measured` finds per row, see `VALUES`
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import GateError
from distilpeft.metrics.score import Score
from distilpeft.tasks.task import Batch, Doubles, Rows, Task, Values, by_label

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from distilpeft.distillation.fused import Head, Running, Soft
    from distilpeft.distillation.losses import Loss

BINS = 15  # of confidence; as for classes
VALUES = ("tokens", "nats", "right", "bytes", "kl", "agree", *(f"gap_{i}" for i in range(BINS)))
"""Sums over a row's targets; gap_i is confidence less right answers over those whose confidence is in bin i."""
AGAINST = ("kl", "top1_agreement")
RESAMPLES = 200
PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class LanguageTask(Task):
    """A task whose classes are a vocabulary: every target token is one row of the loss."""

    trains_heads = False  # the head is pretrained, often tied to the embeddings, and large

    @abstractmethod
    def target_states(self, model: nn.Module, batch: Batch) -> Tensor:
        """Last hidden states where a target is predicted, [N, H]."""

    @abstractmethod
    def target_ids(self, rows: Rows) -> Iterator[NDArray[np.int64]]:
        """The target ids of each row."""

    def num_positions(self, rows: Rows) -> NDArray[np.int64]:
        """How many soft targets each row has: one per token to be predicted."""
        return rows.column("num_targets").astype(np.int64)

    def vocabulary(self, teacher: PreTrainedModel, max_tokens: int) -> int:
        """Numbers in a soft target: the logits of the teacher's head."""
        from distilpeft.distillation.fused import vocabulary_of

        return vocabulary_of(head_of(teacher))

    def soft(self, teacher: nn.Module, batch: Batch) -> Running:
        """What the frozen teacher knows of a batch: its hidden states at the targets, and its head."""
        from distilpeft.distillation.fused import Running

        return Running(self.target_states(teacher, batch), head_of(teacher))

    def loss_sum(self, model: nn.Module, batch: Batch, loss: Loss, soft: Soft | None) -> Tensor:
        """The loss summed over targets, from the hidden states there; logits are never held at once."""
        from distilpeft.distillation.fused import linear_counted_sum

        states, head = self.target_states(model, batch), head_of(model)
        return by_label(
            batch, loss, lambda own, rows: linear_counted_sum(states, head, batch["labels_N"], soft, own, rows)
        )

    def measure(self, model: nn.Module, batch: Batch, soft: Soft | None = None) -> Tensor:
        """Sums over each row's targets, see `measured`; a teacher has to be running."""
        return measured(self.target_states(model, batch), model, batch, cast("Running | None", soft))

    def majority_values(self, train: Rows, rows: Rows) -> Doubles:
        """`measure` of the token frequencies in training, [R, K]; see `as_often`."""
        return as_often(self.target_ids(train), list(self.target_ids(rows)), rows.column("num_bytes"))

    def of_sums(self, sums_K: Doubles) -> dict[str, float]:
        """The metrics, from sums over rows."""
        return of_sums(sums_K)

    def metrics(self, values_RK: Values, rows: Rows) -> dict[str, float]:
        """All metrics of tokens, and with a teacher `kl` in nats per token and `top1_agreement`."""
        return self.of_sums(values_RK.astype(np.float64).sum(0))

    def scores(self, names: tuple[str, ...], values_RK: Values, rows: Rows) -> dict[str, Score]:
        """Metric → value, 95 % interval and number of targets; a seeded bootstrap over rows, whose tokens correlate."""
        wide_RK = values_RK.astype(np.float64)
        value = self.of_sums(wide_RK.sum(0))
        rng = np.random.default_rng(0)
        num_rows = len(wide_RK)
        even = np.full(num_rows, 1 / num_rows)
        draws = [self.of_sums(rng.multinomial(num_rows, even) @ wide_RK) for _ in range(RESAMPLES)]
        scores: dict[str, Score] = {}
        for name in names:
            low, high = np.percentile([draw[name] for draw in draws], [2.5, 97.5])
            scores[name] = {
                "value": value[name], "low": min(float(low), value[name]), "high": max(float(high), value[name]),
                "num_rows": int(wide_RK[:, 0].sum()),
            }  # fmt: skip
        return scores

    def added(self, values_RK: Values, rows: Rows) -> tuple[Doubles, Doubles]:
        """What each row adds to the nats, and to the targets that they are divided by."""
        nats_R, tokens_R = (values_RK[:, VALUES.index(name)].astype(np.float64) for name in ("nats", "tokens"))
        return nats_R, tokens_R

    def against_teacher(self, values_RK: Values, teacher_RK: Values, rows: Rows) -> dict[str, float] | None:
        """KL(teacher || model) in nats per token and the share of targets with the same top token.

        Both are in the values of a model that was measured next to the running teacher.
        """
        metrics = self.metrics(values_RK, rows)
        return None if np.isnan(metrics["kl"]) else {name: metrics[name] for name in AGAINST}


def bare(model: PreTrainedModel) -> Any:
    """The model without its adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_head(model: PreTrainedModel, hidden: Tensor, expected: Tensor) -> None:
    """Find out how a bare model turns its head's output into logits, and prove it.

    Args:
        model: it gets the attribute `logit_shape`, which `head_of` reads.
        hidden: last hidden states of a probe.
        expected: the model's own logits for it.

    Raises:
        GateError: its logits are not a shifted, scaled and capped linear function of the last hidden state.
    """
    from distilpeft.distillation.fused import Head

    raw, candidates = model.get_output_embeddings()(hidden), []
    for shape in _shapes(model, model.config.get_text_config(decoder=True)):
        shaped = _head(Head, model, shape).shape(raw).float()
        candidates.append((float((shaped - expected).abs().max() / expected.abs().max().clamp(min=1e-6)), shape))
    error, shape = min(candidates, key=lambda entry: entry[0])
    if not error < PROBE_TOLERANCE:
        raise GateError(
            f"{type(model).__name__}: its logits are not a scaled or capped linear function of its last hidden state "
            f"(relative error {error:.2g}); this architecture is not supported"
        )
    model.logit_shape = shape


Shape = tuple[float, float | None, bool]
"""Scale, cap, and whether the model's `final_logits_bias` is added."""


def _shapes(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[Shape]:
    """Scales and caps to try, by the names that architectures use; some divide by what others multiply by."""
    names = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    values = [getattr(owner, name, None) for owner in (config, model) for name in names]
    numbers = [float(value) for value in values if isinstance(value, int | float) and value]
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "output_logit_soft_cap")]
    bias = getattr(model, "final_logits_bias", None)
    for scale in dict.fromkeys([1.0, *numbers, *(1 / number for number in numbers)]):
        for cap in dict.fromkeys([None, *caps]):
            yield scale, cap, bias is not None and bool(bias.any())


def _head(make: type[Head], model: PreTrainedModel, shape: Shape) -> Head:
    scale, cap, shifted = shape
    return make(model.get_output_embeddings(), scale, cap, model.final_logits_bias[0] if shifted else None)


def head_of(model: PreTrainedModel) -> Head:
    """The model's head, as `find_head` has found it."""
    from distilpeft.distillation.fused import Head

    own = bare(model)
    return _head(Head, own, own.logit_shape)


def measured(states_NH: Tensor, model: PreTrainedModel, batch: Batch, soft: Running | None) -> Tensor:
    """Sums over each row's targets, [B, K] in the order of `VALUES`; kl and agree are 0 without a teacher."""
    import torch

    from distilpeft.distillation.fused import linear_scores

    scores = linear_scores(states_NH, head_of(model), batch["labels_N"], soft)
    num_rows = len(batch["num_bytes_B"])
    zero_N = torch.zeros_like(scores["nats"])
    per_target = [torch.ones_like(zero_N), scores["nats"], scores["right"]]
    per_target += [zero_N, scores.get("kl", zero_N), scores.get("agree", zero_N)]
    values_BK = torch.zeros(num_rows, len(VALUES), device=zero_N.device)
    values_BK[:, : len(per_target)].index_add_(0, batch["rows_N"], torch.stack(per_target, dim=-1).float())
    bins_N = len(per_target) + (scores["confidence"] * BINS).long().clamp(max=BINS - 1)
    gaps_N = (scores["confidence"] - scores["right"]).float()
    values_BK.index_put_((batch["rows_N"], bins_N), gaps_N, accumulate=True)
    values_BK[:, VALUES.index("bytes")] = batch["num_bytes_B"]
    return values_BK


def as_often(
    train: Iterable[NDArray[np.int64]], rows: Sequence[NDArray[np.int64]], sizes_R: NDArray[Any]
) -> NDArray[np.float64]:
    """`measured` of the answer of token frequencies in training: token frequencies with one added to each, [R, K].

    Its distance from the teacher is not measured (NaN).

    Args:
        train: the target ids of each training row.
        rows: those of the rows that are judged.
        sizes_R: bytes of their text.
    """
    counts = np.ones(1 + max((int(np.max(part, initial=0)) for part in rows), default=0))
    for part in train:
        part_counts = np.bincount(part, minlength=len(counts))
        counts = np.pad(counts, (0, len(part_counts) - len(counts)), constant_values=1) + part_counts
    nats = -np.log(counts / counts.sum())
    likeliest = int(counts.argmax())
    confidence = float(counts.max() / counts.sum())

    def gaps(count: int, right: int) -> list[float]:
        bins = [0.0] * BINS
        bins[min(int(confidence * BINS), BINS - 1)] = count * confidence - right
        return bins

    return np.array(
        [
            [len(part), nats[part].sum(), right, size, np.nan, np.nan, *gaps(len(part), right)]
            for part, size in zip(rows, sizes_R, strict=True)
            for right in [(part == likeliest).sum()]
        ]
    )


def of_sums(sums_K: NDArray[np.float64]) -> dict[str, float]:
    """The metrics, from sums over rows."""
    total = dict(zip(VALUES, (float(value) for value in sums_K), strict=False))  # a task may have more behind them
    tokens = max(total["tokens"], 1.0)
    nats = total["nats"] / tokens
    return {
        "nats_per_token": nats,
        "perplexity": float(np.exp(min(nats, 700.0))),
        "bits_per_byte": total["nats"] / np.log(2) / max(total["bytes"], 1.0),
        "accuracy": total["right"] / tokens,
        "ece": float(np.abs(sums_K[VALUES.index("gap_0") :][:BINS]).sum()) / tokens,
        "kl": total["kl"] / tokens,
        "top1_agreement": total["agree"] / tokens,
    }
