"""One text out of another by an encoder-decoder: translation, summaries; the rows that count are target tokens.

Columns after `encode`: input_ids (of the source), target_ids, reference (the target as the data have it); num_tokens
(of both), num_targets, num_bytes (of the target in UTF-8), truncated.

    B  rows of a batch    S  source positions    T  target positions    N  targets of a batch    H  hidden units
    K  what `measure` finds per row    R  rows

Training is teacher-forced: every target token is predicted from the source and the right tokens before it. At the end
models also write by themselves, and what they write is compared with the references (`written`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import GateError
from distilpeft.metrics.score import Score
from distilpeft.recipe.evaluate import Generate
from distilpeft.recipe.task import ROUGE, Seq2Seq
from distilpeft.tasks import text_rows
from distilpeft.tasks.language.next_tokens import VALUES, LanguageTask, bare, find_head
from distilpeft.tasks.task import Batch, Columns, Doubles, Rows, Sample, Text, Values

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import BatchEncoding, GenerationConfig, PreTrainedModel

    from distilpeft.tasks.task import InputReader

NO_TARGET = -100  # what transformers calls no label
BLEU_SUMS, CHRF_SUMS = 10, 18  # sacrebleu's: lengths, matches and totals by order
WRITTEN = 1 + len(ROUGE) + BLEU_SUMS + CHRF_SUMS
"""Sums over the rows that a model wrote, behind `VALUES`: how many, ROUGE's F, and the counts of BLEU and chrF."""


@dataclass(frozen=True)
class Seq2SeqTask(LanguageTask):
    """One text out of another by an encoder-decoder."""

    auto_class = "AutoModelForSeq2SeqLM"
    peft_task = "SEQ_2_SEQ_LM"
    section: Seq2Seq

    def features(self) -> datasets.Features:
        """Columns after `encode`."""
        own = {"target_ids": datasets.List(datasets.Value("int32")), "reference": datasets.Value("string")}
        own |= {"num_targets": datasets.Value("int32"), "num_bytes": datasets.Value("int64")}
        return datasets.Features({**text_rows.BASE, **own})

    def columns(self) -> list[tuple[str, str]]:
        """Source and target."""
        return [("source", self.section.source), ("target", self.section.target)]

    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Why each row cannot be used; see `text_classification.faults`."""
        return text_rows.text_faults(rows, self.section.source, self.section.target)

    def texts(self, rows: datasets.Dataset) -> Iterator[Text]:
        """What models read; two rows with the same source count as the same."""
        return (self.section.prefix + text for text in text_rows.cells(rows, self.section.source))

    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Tokenise rows that have no fault; sources are cut to `max_tokens`, targets to `max_target_tokens`."""
        limit = min(max_tokens, tokenizer.model_max_length)
        most = min(self.section.max_target_tokens or max_tokens, tokenizer.model_max_length)
        sources, references = (
            [self.section.prefix + text for text in columns[self.section.source]],
            columns[self.section.target],
        )
        full = tokenizer(sources, verbose=False)["input_ids"]
        cut = tokenizer(sources, truncation=True, max_length=limit)["input_ids"]
        whole = tokenizer(text_target=references, verbose=False)["input_ids"]
        read = tokenizer(
            text_target=references, truncation=True, max_length=most, return_offsets_mapping=tokenizer.is_fast
        )
        target_ids = read["input_ids"]
        learnt = [
            _learnt_part(text, row, read, tokenizer) if len(whole[row]) > most else text
            for row, text in enumerate(references)
        ]
        return {
            "input_ids": cut,
            "target_ids": target_ids,
            "reference": references,
            "num_tokens": [len(source) + len(target) for source, target in zip(cut, target_ids, strict=True)],
            "num_targets": [len(ids) for ids in target_ids],
            "num_bytes": [len(text.encode("utf-8", "replace")) for text in learnt],
            "truncated": [len(a) > limit or len(b) > most for a, b in zip(full, whole, strict=True)],
        }

    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """Pad sources and targets on the right to the longest of the batch.

        Returns:
            `inputs`: input_ids [B, S] and attention_mask. `targets_BT`: target ids, `NO_TARGET` behind them.
            `at_N`: flat positions b * T + t of targets, `labels_N` their ids, `rows_N` the b of each. `num_bytes_B`,
            `references`.
        """
        import torch

        padded = tokenizer.pad({"input_ids": columns["input_ids"]}, return_tensors="pt")
        width = max(map(len, columns["target_ids"]))
        targets_BT = np.full((len(columns["target_ids"]), width), NO_TARGET, dtype=np.int64)
        for b, ids in enumerate(columns["target_ids"]):
            targets_BT[b, : len(ids)] = ids
        at = np.flatnonzero(targets_BT != NO_TARGET)
        return {
            "inputs": {name: padded[name] for name in ("input_ids", "attention_mask")},
            "targets_BT": torch.from_numpy(targets_BT),
            "at_N": torch.from_numpy(at),
            "labels_N": torch.from_numpy(targets_BT.reshape(-1)[at]),
            "rows_N": torch.from_numpy(at // width),
            "num_bytes_B": torch.tensor(columns["num_bytes"], dtype=torch.float32),
            "references": columns["reference"],
        }

    def inputs(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """What a collated batch holds, and `decoder_input_ids` [B, T], which start with the model's start token."""
        ids = bare(model).prepare_decoder_input_ids_from_labels(labels=batch["targets_BT"])
        return {**batch["inputs"], "decoder_input_ids": ids}

    def prepare(self, model: PreTrainedModel) -> None:
        """Find out how the model turns its head's output into logits, and prove it on a probe.

        Raises:
            GateError: its logits are not a shifted, scaled and capped linear function of its last hidden state, or it
                does not say which token its answers begin with.
        """
        import torch

        own = bare(model)
        if own.config.decoder_start_token_id is None or own.config.pad_token_id is None:
            raise GateError(
                f"{type(own).__name__}: its config.json names no decoder_start_token_id or no pad_token_id: what "
                "answers begin with, and what is put behind them"
            )
        ids = torch.arange(8, device=own.device).unsqueeze(0) % own.get_output_embeddings().out_features
        probe: Batch = {
            "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            "labels_N": ids,
            "targets_BT": ids,
        }
        was_training = own.training
        own.eval()
        with torch.no_grad():
            expected = own(**self.inputs(own, probe), use_cache=False).logits.float()
            hidden = self._states(own, probe)
            own.train(was_training)
            find_head(own, hidden, expected)

    def target_states(self, model: nn.Module, batch: Batch) -> Tensor:
        """Last hidden states where a target is predicted, [N, H]."""
        states = self._states(bare(model), batch)
        return states.reshape(-1, states.shape[-1])[batch["at_N"]]

    def target_ids(self, rows: Rows) -> Iterator[NDArray[np.int64]]:
        """The target ids of each row."""
        for batch in rows.dataset.select_columns(["target_ids"]).iter(batch_size=1000):
            yield from (np.asarray(ids, dtype=np.int64) for ids in batch["target_ids"])

    def _states(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The bare model's last hidden states at all target positions, [B, T, H]; no product with the vocabulary."""
        inputs = self.inputs(model, batch)
        if model.base_model is not model:  # BART, Marian, M2M100, ...: a body next to the head
            states: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
            return states
        with _headless(model.get_output_embeddings()):  # T5 and EncoderDecoderModel: head and decoder are siblings
            logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    def majority_values(self, train: Rows, rows: Rows) -> Doubles:
        """`measure` of the token frequencies in training, [R, K]; it writes nothing."""
        return np.pad(super().majority_values(train, rows), ((0, 0), (0, WRITTEN)))

    def written(self, model: PreTrainedModel, batch: Batch, tokenizer: InputReader, settings: Generate) -> Tensor:
        """Sums over what the model writes by itself for each row, [B, `WRITTEN`].

        Args:
            model: of transformers, or a graph, which writes the likeliest token each time.
            batch: collated, on the device.
            tokenizer: reads what it wrote.
            settings: how it writes.
        """
        import torch
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF

        texts = write(model, batch["inputs"], tokenizer, settings)
        rouge, rows = RougeScorer(list(ROUGE)), []
        bleu, chrf = BLEU(tokenize=self.section.tokenize), CHRF()
        for text, reference in zip(texts, batch["references"], strict=True):
            scored = rouge.score(reference, text)
            counts = [metric._extract_corpus_statistics([text], [[reference]])[0] for metric in (bleu, chrf)]
            rows.append([1.0, *(scored[name].fmeasure for name in ROUGE), *counts[0], *counts[1]])
        return torch.tensor(rows, device=batch["targets_BT"].device)

    def of_sums(self, sums_K: Doubles) -> dict[str, float]:
        """All metrics of tokens; of written texts BLEU, chrF and ROUGE."""
        metrics, more = super().of_sums(sums_K), sums_K[len(VALUES) :]
        if not len(more):
            return metrics
        count, rouge, bleu, chrf = np.split(more, np.cumsum([1, len(ROUGE), BLEU_SUMS]))
        metrics |= {name: float(value) / max(float(count[0]), 1.0) for name, value in zip(ROUGE, rouge, strict=True)}
        if count[0] == 0:
            return {**metrics, "bleu": 0.0, "chrf": 0.0}
        from sacrebleu.metrics import BLEU, CHRF

        metrics["bleu"] = float(BLEU()._compute_score_from_stats(bleu.astype(int).tolist()).score)
        metrics["chrf"] = float(CHRF()._compute_score_from_stats(chrf.astype(int).tolist()).score)
        return metrics

    def scores(self, names: tuple[str, ...], values_RK: Values, rows: Rows) -> dict[str, Score]:
        """Metric → value, 95 % interval over rows, and number of targets; of written texts the number of texts."""
        scores = super().scores(names, values_RK, rows)
        texts = int(values_RK[:, len(VALUES)].sum()) if values_RK.shape[1] > len(VALUES) else 0
        for name in set(scores) & {"bleu", "chrf", *ROUGE}:
            scores[name]["num_rows"] = texts
        return scores

    def samples(
        self, model: PreTrainedModel, tokenizer: InputReader, rows: Rows, count: int, max_new_tokens: int
    ) -> list[Sample]:
        """What the model makes of the first rows' sources, the likeliest token each time."""
        samples: list[Sample] = []
        for row in range(min(count, len(rows.dataset))):
            inputs = rows.load_batch(np.array([row]))["inputs"]
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            (text,) = write(model, inputs, tokenizer, Generate(max_new_tokens=max_new_tokens))
            source = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
            samples.append({"prompt": source, "completion": text})
        return samples


def _learnt_part(text: str, row: int, read: BatchEncoding, tokenizer: InputReader) -> str:
    """The part of a cut target that its tokens stand for; special tokens, such as the end token, stand for none.

    Of a tokenizer without offsets (Marian's, ByT5's: written in Python) it is what the tokens decode to.
    """
    if not tokenizer.is_fast:
        part: str = tokenizer.decode(read["input_ids"][row], skip_special_tokens=True)
        return part
    return text[: max((end for _, end in read["offset_mapping"][row]), default=0)]


@contextlib.contextmanager
def _headless(head: nn.Module) -> Iterator[None]:
    """Let a head pass on what it is given, as `logits`."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward  # the instance's own; the class has the layer's


def write(model: PreTrainedModel, inputs: dict[str, Tensor], tokenizer: InputReader, settings: Generate) -> list[str]:
    """What a model makes of some sources, as text."""
    import torch

    own = bare(model)
    with torch.no_grad():
        ids = own.generate(**inputs, generation_config=settings_of(own, settings))
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def settings_of(model: PreTrainedModel, settings: Generate) -> GenerationConfig:
    """The model's own generation settings, with the recipe's."""
    import copy

    config = copy.deepcopy(model.generation_config)
    changes = settings.model_dump(exclude={"rows"})
    config.update(**changes, do_sample=False, max_length=None)
    if config.decoder_start_token_id is None:
        config.decoder_start_token_id = model.config.decoder_start_token_id
    return config
