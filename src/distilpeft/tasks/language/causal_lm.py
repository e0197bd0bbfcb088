"""Next-token prediction: prompt/completion pairs, chat messages, or plain text; the rows that count are target tokens.

Columns after `encode`: see `language_rows`.

    B  rows of a batch    S  positions    N  targets of a batch    H  hidden units    V  vocabulary
    K  what `measure` finds per row    R  rows

The loss never sees a [B, S, V] tensor: only hidden states at positions before a target go through the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import GateError
from distilpeft.recipe.task import CausalLM
from distilpeft.tasks.language import rows as language_rows
from distilpeft.tasks.language.next_tokens import PROBE_TOLERANCE, LanguageTask, bare, find_head
from distilpeft.tasks.task import Batch, Columns, Rows, Sample, Text

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from distilpeft.tasks.task import InputReader


@dataclass(frozen=True)
class CausalLMTask(LanguageTask):
    """Next-token prediction."""

    auto_class = "AutoModelForCausalLM"
    peft_task = "CAUSAL_LM"
    section: CausalLM

    def features(self) -> datasets.Features:
        """See `language.rows`."""
        return language_rows.FEATURES

    def columns(self) -> list[tuple[str, str]]:
        """Those of the form that the recipe names."""
        return list(language_rows.columns(self.section).items())

    def watched(self) -> tuple[str, ...]:
        """The tools of chats, unless the recipe says which they are, or that there are none (`tools: null`)."""
        return ("tools",) if self.section.messages is not None and "tools" not in self.section.model_fields_set else ()

    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Why each row cannot be used."""
        return language_rows.faults(self.section, rows)

    def template_faults(self, rows: datasets.Dataset, tokenizer: InputReader) -> Iterator[str | None] | None:
        """Why the tokenizer's template cannot render each chat, None if it can."""
        if self.section.messages is None and not self.section.chat:
            return None
        return language_rows.template_faults(self.section, rows, tokenizer)

    def texts(self, rows: datasets.Dataset) -> Iterator[Text]:
        """The cells of all columns that the recipe names."""
        return language_rows.texts(self.section, rows)

    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Rows of at most `max_tokens` tokens; see `language_rows.encode`."""
        return language_rows.encode(self.section, columns, tokenizer, max_tokens)

    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """Pad on the right to the longest row of the batch.

        Returns:
            `inputs`: input_ids [B, S] and attention_mask; for packed rows position_ids that restart with every
            document, which transformers turns into a mask between documents (padding is one more of them).
            `at_N`: flat positions b * S + s before each target, `labels_N` the target ids, `rows_N` the b of each.
            `num_bytes_B`.
        """
        import torch

        lengths = [len(ids) for ids in columns["input_ids"]]
        width = max(lengths)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids_BS = np.full((len(lengths), width), pad, dtype=np.int64)
        target_BS = np.zeros((len(lengths), width), dtype=bool)
        for b, (ids, target) in enumerate(zip(columns["input_ids"], columns["target"], strict=True)):
            ids_BS[b, : len(ids)] = ids
            target_BS[b, : len(ids)] = target
        inputs = {"input_ids": torch.from_numpy(ids_BS)}
        if any(len(segments) > 1 for segments in columns["segments"]):
            positions = [
                np.concatenate([np.arange(size) for size in (*segments, width - length)])
                for segments, length in zip(columns["segments"], lengths, strict=True)
            ]
            inputs["position_ids"] = torch.from_numpy(np.stack(positions))
        else:
            inputs["attention_mask"] = torch.from_numpy(
                (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
            )
        at = np.flatnonzero(target_BS)
        assert not target_BS[:, 0].any(), "a row's first token cannot be predicted"
        return {
            "inputs": inputs,
            "at_N": torch.from_numpy(at - 1),
            "labels_N": torch.from_numpy(ids_BS.reshape(-1)[at]),
            "rows_N": torch.from_numpy(at // width),
            "num_bytes_B": torch.tensor(columns["num_bytes"], dtype=torch.float32),
        }

    def prepare(self, model: PreTrainedModel) -> None:
        """Find out how the model turns its head's output into logits, and prove it, and packing, on a probe.

        Raises:
            GateError: its logits are not a scaled and capped linear function of the last hidden state, or it attends
                across packed documents.
        """
        import torch

        own = bare(model)
        ids = torch.arange(8, device=own.device).unsqueeze(0) % own.config.get_text_config().vocab_size
        was_training = own.training
        own.eval()
        with torch.no_grad():
            expected = own(input_ids=ids, use_cache=False).logits.float()
            hidden = own.base_model(input_ids=ids, use_cache=False).last_hidden_state
            leak = _leak(own, ids) if self.section.pack else 0.0
            own.train(was_training)
            if not leak < PROBE_TOLERANCE:
                raise GateError(
                    f"task.pack: {type(own).__name__} attends across packed documents (relative "
                    f"difference {leak:.2g}); set pack: false"
                )
            find_head(own, hidden, expected)

    def target_states(self, model: nn.Module, batch: Batch) -> Tensor:
        """Last hidden states at the positions before a target, [N, H]."""
        states: Tensor = bare(model).base_model(**batch["inputs"], use_cache=False).last_hidden_state
        return states.reshape(-1, states.shape[-1])[batch["at_N"]]

    def target_ids(self, rows: Rows) -> Iterator[NDArray[np.int64]]:
        """The target ids of each row."""
        for batch in rows.dataset.with_format("numpy").iter(batch_size=1000):
            for ids, target in zip(batch["input_ids"], batch["target"], strict=True):
                yield np.asarray(ids, dtype=np.int64)[np.asarray(target, dtype=bool)]

    def samples(
        self, model: PreTrainedModel, tokenizer: InputReader, rows: Rows, count: int, max_new_tokens: int
    ) -> list[Sample]:
        """Greedy completions of the first rows: their prompt, or the first 16 tokens of plain text."""
        import torch
        from transformers import GenerationConfig

        samples: list[Sample] = []
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
            samples.append({"prompt": tokenizer.decode(ids[:begin]), "completion": tokenizer.decode(tail)})
        return samples


def _leak(model: PreTrainedModel, ids: Tensor) -> float:
    """How far the hidden states of a document differ when another is packed before it, relative to their size."""
    import torch

    alone = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    positions = torch.arange(ids.shape[-1], device=ids.device).unsqueeze(0)
    twice = {"input_ids": torch.cat([ids.flip(-1), ids], -1), "position_ids": torch.cat([positions, positions], -1)}
    packed = model.base_model(**twice, use_cache=False).last_hidden_state[:, ids.shape[-1] :]
    return float((packed - alone).abs().max() / alone.abs().max())
