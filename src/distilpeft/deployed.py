"""An exported model as its users have it: text in, labels or more text out; a graph without torch or transformers.

A classifier of pairs takes pairs of texts wherever others take texts.

B  rows    S  positions    C  classes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import InputError
from distilpeft.kinds import KINDS
from distilpeft.probabilities import softmax
from distilpeft.runners import generate, open_runner, read_manifest

TOKENIZER = "tokenizer.json"
Text = str | tuple[str, str]


def answer(manifest: Mapping[str, Any], logits_C: NDArray[np.float64]) -> dict[str, Any]:
    """A row's answer: `label` and `probabilities`; of several classes `labels` and `probabilities`; or `value`."""
    if KINDS[manifest["task"]].values:
        return {"value": round(float(logits_C[0]), 6)}
    labels = manifest["labels"]
    if manifest["task"] == "multi_label_classification":
        chances_C = softmax(np.stack([np.zeros_like(logits_C), logits_C], axis=-1))[:, 1]
        told = {"labels": [name for name, chance in zip(labels, chances_C, strict=True) if chance > 0.5]}
    else:
        chances_C = softmax(logits_C)
        told = {"label": labels[int(chances_C.argmax())]}
    named = {name: round(float(chance), 6) for name, chance in zip(labels, chances_C, strict=True)}
    return {**told, "probabilities": named}


class Deployed:
    """An exported folder, its tokenizer read, its model loaded when it is first asked.

    Args:
        folder: with manifest.json.
        threads: of the runtime; 0 leaves the choice to it.

    Raises:
        InputError: it is no exported folder, or has no tokenizer.json.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        import tokenizers

        self.folder, self.manifest = folder, read_manifest(folder)
        if not (folder / TOKENIZER).is_file():
            raise InputError(f"{folder}: has no {TOKENIZER}")
        self._words = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
        self._words.no_padding()
        self._words.no_truncation()
        if not KINDS[self.manifest["task"]].language:
            self._words.enable_truncation(self.manifest["max_tokens"])
        self._threads = threads
        self._runner: Any = None

    @property
    def runner(self) -> Any:
        """The loaded model."""
        if self._runner is None:
            self._runner = open_runner(self.folder, self._threads)
        return self._runner

    @property
    def vocabulary_size(self) -> int:
        """Ids that the tokenizer knows."""
        return int(self._words.get_vocab_size())

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Token ids, as in training: with special tokens, a classifier's cut to `max_tokens`."""
        return [found.ids for found in self._words.encode_batch(list(texts))]

    def answers(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        """What a classifier says of each text: see `answer`."""
        return [answer(self.manifest, logits_C) for logits_C in self.logits(texts)]

    def logits(self, texts: Sequence[Text]) -> NDArray[np.float64]:
        """Outputs [B, C]."""
        rows = self._words.encode_batch(list(texts))
        width = max(len(row.ids) for row in rows)

        def padded(lists: list[list[int]], value: int) -> NDArray[np.int64]:
            return np.array([one + [value] * (width - len(one)) for one in lists], dtype=np.int64)

        inputs = {
            "input_ids": padded([row.ids for row in rows], self.manifest["pad_token_id"] or 0),
            "attention_mask": padded([row.attention_mask for row in rows], 0),
        }
        if self.manifest.get("typed"):
            inputs["token_type_ids"] = padded([row.type_ids for row in rows], 0)
        logits_BC, _ = self.runner.run(inputs)
        return np.asarray(logits_BC, dtype=np.float64)

    def complete(self, prompt: str, max_new_tokens: int) -> str:
        """The likeliest continuation; of a chat model, its answer."""
        ids = self._chat(prompt) if self.manifest["chat"] else self.encode([prompt])[0]
        found = generate(self.runner, ids, max_new_tokens, self.manifest["eos_token_ids"])
        return str(self._words.decode(found))

    def _chat(self, prompt: str) -> list[int]:
        """The prompt as a user's turn, by the chat template that lies beside the model."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(str(self.folder))
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(self._words.encode(text, add_special_tokens=False).ids)  # the template has written those
