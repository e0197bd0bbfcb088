"""One text out of another by an encoder-decoder: translation, summaries; the rows that count are target tokens.

Columns after `encode`: input_ids (of the source), target_ids, reference (the target as the data have it); num_tokens
(of both), num_targets, num_bytes (of the target in UTF-8), truncated.

    B  rows of a batch    S  source positions    T  target positions    N  targets of a batch    H  hidden units
    K  what `measure` finds per row    R  rows

Training is teacher-forced: every target token is predicted from the source and the right tokens before it. At the end
models also write by themselves, and what they write is held against the references (`written`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import GateError
from distilpeft.recipe.evaluate import Generate
from distilpeft.recipe.task import ROUGE, Seq2Seq
from distilpeft.tasks import text_rows
from distilpeft.tasks.language.next_tokens import (
    VALUES,
    Values,
    added,
    against_teacher,
    answers,
    as_often,
    bare,
    calibration,
    count_rows,
    find_head,
    head_of,
    measured,
    model_options,
    num_positions,
    of_sums,
    running,
    taught,
    vocabulary,
)
from distilpeft.tasks.language.next_tokens import scores as scores_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distilpeft.distillation.fused import Running, Soft
    from distilpeft.distillation.losses import Loss

__all__ = [  # what all language models share
    "added",
    "against_teacher",
    "answers",
    "calibration",
    "count_rows",
    "head_of",
    "model_options",
    "num_positions",
    "vocabulary",
]
AUTO_CLASS = "AutoModelForSeq2SeqLM"
PEFT_TASK = "SEQ_2_SEQ_LM"
TRAIN_HEADS = False  # the head is pretrained, often tied to the embeddings, and large
NO_TARGET = -100  # what transformers calls no label
BLEU_SUMS, CHRF_SUMS = 10, 18  # sacrebleu's: lengths, matches and totals by order
WRITTEN = 1 + len(ROUGE) + BLEU_SUMS + CHRF_SUMS
"""Sums over the rows that a model wrote, behind `VALUES`: how many, ROUGE's F, and the counts of BLEU and chrF."""


def features(task: Seq2Seq) -> datasets.Features:
    """Columns after `encode`."""
    del task
    own = {"target_ids": datasets.List(datasets.Value("int32")), "reference": datasets.Value("string")}
    own |= {"num_targets": datasets.Value("int32"), "num_bytes": datasets.Value("int64")}
    return datasets.Features({**text_rows.BASE, **own})


def check_columns(task: Seq2Seq, rows: datasets.Dataset, origin: str) -> None:
    """Refuse data without the recipe's columns; see `text_rows.check_columns`."""
    text_rows.check_columns({"source": task.source, "target": task.target}, rows, origin)


def faults(task: Seq2Seq, rows: datasets.Dataset) -> Iterator[str | None]:
    """Why each row cannot be used; see `text_classification.faults`."""
    return text_rows.text_faults(rows, task.source, task.target)


def texts(task: Seq2Seq, rows: datasets.Dataset) -> Iterator[str]:
    """What models read; two rows with the same source count as the same."""
    return (task.prefix + text for text in text_rows.cells(rows, task.source))


def encode(
    task: Seq2Seq, features: datasets.Features, batch: dict[str, list[Any]], tokenizer: Any, max_tokens: int
) -> dict[str, list[Any]]:
    """Tokenise rows that have no fault; sources are cut to `max_tokens`, targets to `max_target_tokens`."""
    del features
    limit = min(max_tokens, tokenizer.model_max_length)
    most = min(task.max_target_tokens or max_tokens, tokenizer.model_max_length)
    sources, references = [task.prefix + text for text in batch[task.source]], batch[task.target]
    full = tokenizer(sources, verbose=False)["input_ids"]
    cut = tokenizer(sources, truncation=True, max_length=limit)["input_ids"]
    whole = tokenizer(text_target=references, verbose=False)["input_ids"]
    wanted = tokenizer(text_target=references, truncation=True, max_length=most)["input_ids"]
    return {
        "input_ids": cut,
        "target_ids": wanted,
        "reference": references,
        "num_tokens": [len(one) + len(two) for one, two in zip(cut, wanted, strict=True)],
        "num_targets": [len(ids) for ids in wanted],
        "num_bytes": [len(text.encode("utf-8", "replace")) for text in references],
        "truncated": [len(one) > limit or len(two) > most for one, two in zip(full, whole, strict=True)],
    }


def collate(rows: dict[str, list[Any]], tokenizer: Any) -> dict[str, Any]:
    """Pad sources and targets on the right to the longest of the batch.

    Returns:
        `inputs`: input_ids [B, S] and attention_mask. `targets_BT`: target ids, `NO_TARGET` behind them.
        `at_N`: flat positions b * T + t of targets, `labels_N` their ids, `rows_N` the b of each. `num_bytes_B`,
        `references`.
    """
    import torch

    found = tokenizer.pad({"input_ids": rows["input_ids"]}, return_tensors="pt")
    width = max(map(len, rows["target_ids"]))
    targets_BT = np.full((len(rows["target_ids"]), width), NO_TARGET, dtype=np.int64)
    for b, ids in enumerate(rows["target_ids"]):
        targets_BT[b, : len(ids)] = ids
    at = np.flatnonzero(targets_BT != NO_TARGET)
    return {
        "inputs": {name: found[name] for name in ("input_ids", "attention_mask")},
        "targets_BT": torch.from_numpy(targets_BT),
        "at_N": torch.from_numpy(at),
        "labels_N": torch.from_numpy(targets_BT.reshape(-1)[at]),
        "rows_N": torch.from_numpy(at // width),
        "num_bytes_B": torch.tensor(rows["num_bytes"], dtype=torch.float32),
        "references": rows["reference"],
    }


def inputs(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """All that a model takes: what a collated batch holds, and `decoder_input_ids` [B, T], which begin as it does."""
    begun = bare(model).prepare_decoder_input_ids_from_labels(labels=batch["targets_BT"])
    return {**batch["inputs"], "decoder_input_ids": begun}


def prepare(task: Seq2Seq, model: Any) -> None:
    """Find out how the model turns its head's output into logits, and prove it on a probe.

    Raises:
        GateError: its logits are not a shifted, scaled and capped linear function of its last hidden state, or it does
            not say which token its answers begin with.
    """
    import torch

    del task
    own = bare(model)
    if own.config.decoder_start_token_id is None or own.config.pad_token_id is None:
        raise GateError(
            f"{type(own).__name__}: its config.json names no decoder_start_token_id or no pad_token_id: what answers "
            "begin with, and what is put behind them"
        )
    ids = torch.arange(8, device=own.device).unsqueeze(0) % own.get_output_embeddings().out_features
    probe = {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "targets_BT": ids}
    was_training = own.training
    own.eval()
    with torch.no_grad():
        expected = own(**inputs(own, probe), use_cache=False).logits.float()
        hidden = _states(own, probe)
        own.train(was_training)
        find_head(own, hidden, expected)


def _states(model: Any, batch: dict[str, Any]) -> Tensor:
    """The bare model's last hidden states at all target positions, [B, T, H], without a product with the vocabulary."""
    given = inputs(model, batch)
    if model.base_model is not model:  # BART, Marian, M2M100, ...: a body beside the head
        states: Tensor = model.base_model(**given, use_cache=False).last_hidden_state
        return states
    with _headless(model.get_output_embeddings()):  # T5 and EncoderDecoderModel: head and decoder are siblings
        logits: Tensor = model(**given, use_cache=False).logits
    return logits


@contextlib.contextmanager
def _headless(head: nn.Module) -> Iterator[None]:
    """Let a head pass on what it is given, as `logits`."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward  # the instance's own; the class has the layer's


def target_states(model: Any, batch: dict[str, Any]) -> Tensor:
    """Last hidden states where a target is predicted, [N, H]."""
    states = _states(bare(model), batch)
    return states.reshape(-1, states.shape[-1])[batch["at_N"]]


def soft(teacher: Any, batch: dict[str, Any]) -> Running:
    """What the frozen teacher knows of a batch: its hidden states at the targets, and its head."""
    return running(target_states(teacher, batch), teacher)


def loss_sum(model: nn.Module, batch: dict[str, Any], loss: Loss, soft: Soft | None) -> Tensor:
    """The loss summed over targets."""
    return taught(target_states(model, batch), model, batch, loss, soft)


def measure(model: nn.Module, batch: dict[str, Any], soft: Running | None = None) -> Tensor:
    """Sums over each row's targets, see `next_tokens.measured`."""
    return measured(target_states(model, batch), model, batch, soft)


def majority_values(task: Seq2Seq, train: Any, rows: Any) -> NDArray[np.float64]:
    """`measure` of the answer "as often as in training", [R, K]; see `next_tokens.as_often`. It writes nothing."""
    del task
    found = as_often(_targets(train), list(_targets(rows)), rows.column("num_bytes"))
    return np.pad(found, ((0, 0), (0, WRITTEN)))


def _targets(rows: Any) -> Iterator[NDArray[np.int64]]:
    for batch in rows.dataset.select_columns(["target_ids"]).iter(batch_size=1000):
        yield from (np.asarray(ids, dtype=np.int64) for ids in batch["target_ids"])


def written(model: Any, batch: dict[str, Any], tokenizer: Any, settings: Generate, cut: str) -> Tensor:
    """Sums over what the model writes by itself for each row, [B, `WRITTEN`].

    Args:
        model: of transformers, or a graph, which writes the likeliest token each time.
        batch: collated, on the device.
        tokenizer: reads what it wrote.
        settings: how it writes.
        cut: how BLEU cuts text into words.
    """
    import torch
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    told = write(model, batch["inputs"], tokenizer, settings)
    rouge, found = RougeScorer(list(ROUGE)), []
    bleu, chrf = BLEU(tokenize=cut), CHRF()
    for text, reference in zip(told, batch["references"], strict=True):
        scored = rouge.score(reference, text)
        counts = [one._extract_corpus_statistics([text], [[reference]])[0] for one in (bleu, chrf)]
        found.append([1.0, *(scored[name].fmeasure for name in ROUGE), *counts[0], *counts[1]])
    return torch.tensor(found, device=batch["targets_BT"].device)


def write(model: Any, inputs: dict[str, Tensor], tokenizer: Any, settings: Generate) -> list[str]:
    """What a model makes of some sources, as text."""
    import torch

    own = bare(model)
    with torch.no_grad():
        ids = own.generate(**inputs, generation_config=settings_of(own, settings))
    found: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found


def settings_of(model: Any, settings: Generate) -> Any:
    """The model's own generation settings, with the recipe's."""
    import copy

    found = copy.deepcopy(model.generation_config)
    asked = settings.model_dump(exclude={"rows"})
    found.update(**asked, do_sample=False, max_length=None)
    if found.decoder_start_token_id is None:
        found.decoder_start_token_id = model.config.decoder_start_token_id
    return found


def metrics(task: Seq2Seq, values_RK: Values, rows: Any) -> dict[str, float]:
    """All metrics of tokens; with a teacher `kl` and `top1_agreement`; of written texts BLEU, chrF and ROUGE."""
    del task, rows
    return _of_sums(values_RK.astype(np.float64).sum(0))


def _of_sums(sums_K: NDArray[np.float64]) -> dict[str, float]:
    found, more = of_sums(sums_K), sums_K[len(VALUES) :]
    if not len(more):
        return found
    count, rouge, bleu, chrf = np.split(more, np.cumsum([1, len(ROUGE), BLEU_SUMS]))
    found |= {name: float(value) / max(float(count[0]), 1.0) for name, value in zip(ROUGE, rouge, strict=True)}
    if count[0] == 0:
        return {**found, "bleu": 0.0, "chrf": 0.0}
    from sacrebleu.metrics import BLEU, CHRF

    found["bleu"] = float(BLEU()._compute_score_from_stats(bleu.astype(int).tolist()).score)
    found["chrf"] = float(CHRF()._compute_score_from_stats(chrf.astype(int).tolist()).score)
    return found


def scores(task: Seq2Seq, names: tuple[str, ...], values_RK: Values, rows: Any) -> dict[str, dict[str, Any]]:
    """Metric → value, 95 % interval over rows, and number of targets; of written texts the number of texts."""
    found = scores_of(task, names, values_RK, rows, _of_sums)
    texts = int(values_RK[:, len(VALUES)].sum()) if values_RK.shape[1] > len(VALUES) else 0
    for name in set(found) & {"bleu", "chrf", *ROUGE}:
        found[name]["num_rows"] = texts
    return found


def samples(model: Any, tokenizer: Any, rows: Any, count: int, max_new_tokens: int) -> list[dict[str, str]]:
    """What the model makes of the first rows' sources, the likeliest token each time."""
    found = []
    for row in range(min(count, len(rows.dataset))):
        given = rows.load_batch(np.array([row]))["inputs"]
        given = {name: tensor.to(model.device) for name, tensor in given.items()}
        (text,) = write(model, given, tokenizer, Generate(max_new_tokens=max_new_tokens))
        source = tokenizer.decode(given["input_ids"][0], skip_special_tokens=True)
        found.append({"prompt": source, "completion": text})
    return found
