"""Next-token prediction: prompt/completion pairs, chat messages, or plain text; the rows that count are target tokens.

Columns after `encode`: see `language_rows`.

    B  rows of a batch    S  positions    N  targets of a batch    H  hidden units    V  vocabulary
    K  what `measure` finds per row, see `VALUES`

The loss never sees a [B, S, V] tensor: only hidden states at positions before a target go through the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import GateError
from distilpeft.task_sections import CausalLM
from distilpeft.tasks.language_rows import check_rows, encode, features, texts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distilpeft.fused import Head, Running, Soft
    from distilpeft.losses import Loss

__all__ = ["check_rows", "encode", "features", "texts"]  # the rows' part of what every task has

AUTO_CLASS = "AutoModelForCausalLM"
PEFT_TASK = "CAUSAL_LM"
TRAIN_HEADS = False  # the head is pretrained, often tied to the embeddings, and large
BINS = 15  # of confidence; as for classes
VALUES = ("tokens", "nats", "right", "bytes", "kl", "agree", *(f"gap_{i}" for i in range(BINS)))
"""Sums over a row's targets; gap_i is confidence less right answers over those whose confidence is in bin i."""
AGAINST = ("kl", "top1_agreement")
RESAMPLES = 200
PROBE_TOLERANCE = 1e-3


def model_options(_: CausalLM) -> dict[str, Any]:
    """Configuration values of a model for this task: none."""
    return {}


def collate(rows: dict[str, list[Any]], tokenizer: Any) -> dict[str, Any]:
    """Pad on the right to the longest row of the batch.

    Returns:
        `inputs`: input_ids [B, S] and attention_mask; for packed rows position_ids that begin anew with every document,
        which transformers turns into a mask between documents (padding is one more of them).
        `at_N`: flat positions b * S + s before each target, `labels_N` the target ids, `rows_N` the b of each.
        `num_bytes_B`.
    """
    import torch

    lengths = [len(ids) for ids in rows["input_ids"]]
    width = max(lengths)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids_BS = np.full((len(lengths), width), pad, dtype=np.int64)
    target_BS = np.zeros((len(lengths), width), dtype=bool)
    for b, (ids, target) in enumerate(zip(rows["input_ids"], rows["target"], strict=True)):
        ids_BS[b, : len(ids)] = ids
        target_BS[b, : len(ids)] = target
    inputs = {"input_ids": torch.from_numpy(ids_BS)}
    if any(len(segments) > 1 for segments in rows["segments"]):
        positions = [
            np.concatenate([np.arange(size) for size in (*segments, width - length)])
            for segments, length in zip(rows["segments"], lengths, strict=True)
        ]
        inputs["position_ids"] = torch.from_numpy(np.stack(positions))
    else:
        inputs["attention_mask"] = torch.from_numpy((np.arange(width) < np.array(lengths)[:, None]).astype(np.int64))
    at = np.flatnonzero(target_BS)
    assert not target_BS[:, 0].any(), "a row's first token cannot be predicted"
    return {
        "inputs": inputs,
        "at_N": torch.from_numpy(at - 1),
        "labels_N": torch.from_numpy(ids_BS.reshape(-1)[at]),
        "rows_N": torch.from_numpy(at // width),
        "num_bytes_B": torch.tensor(rows["num_bytes"], dtype=torch.float32),
    }


def count_rows(batch: dict[str, Any]) -> int:
    """How many targets a collated batch holds."""
    return len(batch["labels_N"])


def prepare(task: CausalLM, model: Any) -> None:
    """Find out how the model turns its head's output into logits, and prove it, and packing, on a probe.

    Raises:
        GateError: its logits are not a scaled and capped linear function of the last hidden state, or it looks from one
            packed document into another.
    """
    import torch

    from distilpeft.fused import Head

    bare = _bare(model)
    config = bare.config.get_text_config()
    ids = torch.arange(8, device=bare.device).unsqueeze(0) % config.vocab_size
    was_training = bare.training
    bare.eval()
    with torch.no_grad():
        expected = bare(input_ids=ids, use_cache=False).logits.float()
        hidden = bare.base_model(input_ids=ids, use_cache=False).last_hidden_state
        raw = bare.get_output_embeddings()(hidden)
        leak = _leak(bare, ids) if task.pack else 0.0
    bare.train(was_training)
    if not leak < PROBE_TOLERANCE:
        raise GateError(
            f"task.pack: {type(bare).__name__} looks from one packed document into the next (relative difference "
            f"{leak:.2g}); set pack: false"
        )
    found = []
    for scale, softcap in _shapes(bare, config):
        shaped = Head(bare.get_output_embeddings(), scale, softcap).shape(raw).float()
        found.append((float((shaped - expected).abs().max() / expected.abs().max().clamp(min=1e-6)), scale, softcap))
    error, scale, softcap = min(found, key=lambda entry: entry[0])
    if not error < PROBE_TOLERANCE:
        raise GateError(
            f"{type(bare).__name__}: its logits are not a scaled or capped linear function of its last hidden state "
            f"(relative error {error:.2g}); this architecture is not supported"
        )
    bare.logit_shape = (scale, softcap)


def _leak(model: Any, ids: Tensor) -> float:
    """How far the hidden states of a document differ when another is packed before it, relative to their size."""
    import torch

    alone = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    positions = torch.arange(ids.shape[-1], device=ids.device).unsqueeze(0)
    twice = {"input_ids": torch.cat([ids.flip(-1), ids], -1), "position_ids": torch.cat([positions, positions], -1)}
    packed = model.base_model(**twice, use_cache=False).last_hidden_state[:, ids.shape[-1] :]
    return float((packed - alone).abs().max() / alone.abs().max())


def _shapes(model: Any, config: Any) -> Iterator[tuple[float, float | None]]:
    """Scales and caps to try, by the names that architectures use; some divide by what others multiply by."""
    names = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    values = [getattr(owner, name, None) for owner in (config, model) for name in names]
    numbers = [float(value) for value in values if isinstance(value, int | float) and value]
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "output_logit_soft_cap")]
    for scale in dict.fromkeys([1.0, *numbers, *(1 / number for number in numbers)]):
        for cap in dict.fromkeys([None, *caps]):
            yield scale, cap


def _bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def head_of(model: Any) -> Head:
    """The model's head, as `prepare` has found it."""
    from distilpeft.fused import Head

    bare = _bare(model)
    scale, softcap = bare.logit_shape
    return Head(bare.get_output_embeddings(), scale, softcap)


def target_states(model: Any, batch: dict[str, Any]) -> Tensor:
    """Last hidden states at the positions before a target, [N, H]."""
    states: Tensor = _bare(model).base_model(**batch["inputs"], use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1])[batch["at_N"]]


def soft(teacher: Any, batch: dict[str, Any]) -> Running:
    """What the frozen teacher knows of a batch: its hidden states at the targets, and its head."""
    from distilpeft.fused import Running

    return Running(target_states(teacher, batch), head_of(teacher))


def num_positions(rows: Any) -> NDArray[np.int64]:
    """How many soft targets each row has: one per token to be predicted."""
    return rows.column("num_targets").astype(np.int64)  # type: ignore[no-any-return]


def vocabulary(task: CausalLM, teacher: Any, max_tokens: int) -> int:
    """Numbers in a soft target: the logits of the teacher's head."""
    from distilpeft.fused import vocabulary_of

    del task, max_tokens
    return vocabulary_of(head_of(teacher))


def loss_sum(model: nn.Module, batch: dict[str, Any], loss: Loss, soft: Soft | None) -> Tensor:
    """The loss summed over targets."""
    from distilpeft.fused import linear_distil_sum

    return linear_distil_sum(target_states(model, batch), head_of(model), batch["labels_N"], soft, loss)


def measure(model: nn.Module, batch: dict[str, Any], soft: Running | None = None) -> Tensor:
    """Sums over each row's targets, [B, K] in the order of `VALUES`; kl and agree are 0 without a teacher."""
    import torch

    from distilpeft.fused import linear_scores

    found = linear_scores(target_states(model, batch), head_of(model), batch["labels_N"], soft)
    num_rows = len(batch["num_bytes_B"])
    zero_N = torch.zeros_like(found["nats"])
    per_target = [torch.ones_like(zero_N), found["nats"], found["right"]]
    per_target += [zero_N, found.get("kl", zero_N), found.get("agree", zero_N)]
    values_BK = torch.zeros(num_rows, len(VALUES), device=zero_N.device)
    values_BK[:, : len(per_target)].index_add_(0, batch["rows_N"], torch.stack(per_target, dim=-1).float())
    bins_N = len(per_target) + (found["confidence"] * BINS).long().clamp(max=BINS - 1)
    gaps_N = (found["confidence"] - found["right"]).float()
    values_BK.index_put_((batch["rows_N"], bins_N), gaps_N, accumulate=True)
    values_BK[:, VALUES.index("bytes")] = batch["num_bytes_B"]
    return values_BK


def majority_values(task: CausalLM, train: Any, rows: Any) -> NDArray[np.float64]:
    """`measure` of the answer "as often as in training": token frequencies with one added to each, [B, K].

    Its distance from the teacher is not measured (NaN).
    """
    del task
    vocabulary = 1 + max(int(np.max(part, initial=0)) for rows_ in (train, rows) for part in _targets(rows_))
    counts = np.ones(vocabulary)
    for part in _targets(train):
        counts += np.bincount(part, minlength=vocabulary)
    nats = -np.log(counts / counts.sum())
    likeliest = int(counts.argmax())
    sizes, confidence = rows.column("num_bytes"), float(counts.max() / counts.sum())

    def gaps(count: int, right: int) -> list[float]:
        found = [0.0] * BINS
        found[min(int(confidence * BINS), BINS - 1)] = count * confidence - right
        return found

    return np.array(
        [
            [len(part), nats[part].sum(), right, size, np.nan, np.nan, *gaps(len(part), right)]
            for part, size in zip(_targets(rows), sizes, strict=True)
            for right in [(part == likeliest).sum()]
        ]
    )


def _targets(rows: Any) -> Iterator[NDArray[np.int64]]:
    for batch in rows.dataset.with_format("numpy").iter(batch_size=1000):
        for ids, target in zip(batch["input_ids"], batch["target"], strict=True):
            yield np.asarray(ids, dtype=np.int64)[np.asarray(target, dtype=bool)]


def metrics(task: CausalLM, values_NK: NDArray[np.float64], rows: Any) -> dict[str, float]:
    """All metrics, and with a teacher `kl` in nats per token and `top1_agreement`."""
    del task, rows
    return _metrics(values_NK.astype(np.float64).sum(0))


def _metrics(sums_K: NDArray[np.float64]) -> dict[str, float]:
    total = dict(zip(VALUES, (float(value) for value in sums_K), strict=True))
    tokens = max(total["tokens"], 1.0)
    nats = total["nats"] / tokens
    return {
        "nats_per_token": nats,
        "perplexity": float(np.exp(min(nats, 700.0))),
        "bits_per_byte": total["nats"] / np.log(2) / max(total["bytes"], 1.0),
        "accuracy": total["right"] / tokens,
        "ece": float(np.abs(sums_K[-BINS:]).sum()) / tokens,
        "kl": total["kl"] / tokens,
        "top1_agreement": total["agree"] / tokens,
    }


def scores(
    task: CausalLM, names: tuple[str, ...], values_NK: NDArray[np.float64], rows: Any
) -> dict[str, dict[str, Any]]:
    """Metric → value, 95 % interval and number of targets; seeded bootstrap over rows, whose tokens hang together."""
    wide_NK = values_NK.astype(np.float64)
    value = metrics(task, wide_NK, rows)
    rng = np.random.default_rng(0)
    num_rows = len(wide_NK)
    draws = [_metrics(rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows)) @ wide_NK) for _ in range(RESAMPLES)]
    found = {}
    for name in names:
        low, high = np.percentile([draw[name] for draw in draws], [2.5, 97.5])
        interval = {"low": min(float(low), value[name]), "high": max(float(high), value[name])}
        found[name] = {"value": value[name], **interval, "num_rows": int(wide_NK[:, 0].sum())}
    return found


def added(task: CausalLM, values_NK: NDArray[np.float64], rows: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each row adds to the nats, and to the targets that they are divided by."""
    del task, rows
    nats_N, tokens_N = (values_NK[:, VALUES.index(name)].astype(np.float64) for name in ("nats", "tokens"))
    return nats_N, tokens_N


def calibration(task: CausalLM, values_NK: NDArray[np.float64], rows: Any) -> dict[str, list[float]] | None:
    """Not kept of tokens: only how far confidence and right answers are apart (`ece`)."""
    del task, values_NK, rows
    return None


def against_teacher(
    task: CausalLM, values_NK: NDArray[np.float64], teacher_NK: NDArray[np.float64], rows: Any
) -> dict[str, float] | None:
    """KL(teacher || model) in nats per token and the share of targets with the same top token."""
    del teacher_NK  # the values are of a model that was held against the running teacher
    found = metrics(task, values_NK, rows)
    return None if np.isnan(found["kl"]) else {name: found[name] for name in AGAINST}


def answers(
    logits_NV: NDArray[np.float32], labels_N: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Outputs and labels as the export's gate compares them: logits over the vocabulary, and token ids."""
    return logits_NV, labels_N


def samples(model: Any, tokenizer: Any, rows: Any, count: int, max_new_tokens: int) -> list[dict[str, str]]:
    """Greedy completions of the first rows: their prompt, or the first 16 tokens of plain text."""
    import torch
    from transformers import GenerationConfig

    found = []
    for row in rows.dataset.select(range(min(count, len(rows.dataset)))):
        ids = row["input_ids"][: row["segments"][0]]
        first = next((i for i, flag in enumerate(row["target"]) if flag), 1)
        begin = first if first > 1 else max(1, min(16, len(ids) // 2))
        prompt = torch.tensor([ids[:begin]], device=model.device)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        with torch.no_grad():
            out = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, use_cache=True
            )
        tail = out[0, begin:].tolist()
        found.append({"prompt": tokenizer.decode(ids[:begin]), "completion": tokenizer.decode(tail)})
    return found
