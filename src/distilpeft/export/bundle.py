"""An exported model as its users have it: text in, labels or more text out; a graph without torch or transformers.

A classifier of pairs takes pairs of texts wherever others take texts.

B  rows    S  positions    C  classes
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.data.pictures import FILE, Reader
from distilpeft.errors import InputError
from distilpeft.export.generation import generate
from distilpeft.export.manifest import ExportManifest, check_files, read_manifest
from distilpeft.export.runtimes import PIXELS, TransformersRunner, open_runner
from distilpeft.metrics.answer_spans import choose
from distilpeft.metrics.probabilities import softmax
from distilpeft.metrics.word_spans import Span, entities, first_tokens, spans_of
from distilpeft.recipe.task import KINDS

TOKENIZER, CARD = "tokenizer.json", "README.md"
Text = str | tuple[str, str]


def answer(manifest: ExportManifest, logits_C: NDArray[np.float64]) -> dict[str, Any]:
    """A row's answer: `label` and `probabilities`; of several `labels` and `probabilities`; `value`; or `vector`."""
    if not KINDS[manifest["task"]].has_labels:
        return {"vector": [round(float(unit), 6) for unit in logits_C / max(float(np.linalg.norm(logits_C)), 1e-12)]}
    if KINDS[manifest["task"]].is_numeric:
        return {"value": round(float(logits_C[0]), 6)}
    labels = manifest["labels"]
    if manifest["task"] == "multi_label_classification":
        chances_C = softmax(np.stack([np.zeros_like(logits_C), logits_C], axis=-1))[:, 1]
        prediction: dict[str, Any] = {
            "labels": [name for name, chance in zip(labels, chances_C, strict=True) if chance > 0.5]
        }
    else:
        chances_C = softmax(logits_C)
        prediction = {"label": labels[int(chances_C.argmax())]}
    probabilities = {name: round(float(chance), 6) for name, chance in zip(labels, chances_C, strict=True)}
    return {**prediction, "probabilities": probabilities}


def tagged(
    labels: Sequence[str], text: str, offsets_S: Sequence[Span], logits_SC: NDArray[np.float64]
) -> dict[str, Any]:
    """A text's words with their tags, and its entities, each with its place in the text.

    Words beyond what the model reads have the tag null.
    """
    spans = spans_of(text)
    word_ids, at = first_tokens(spans, offsets_S)
    tags = dict(zip(word_ids, (labels[i] for i in logits_SC[at].argmax(-1)), strict=True))
    words = [{"word": text[start:end], "tag": tags.get(n)} for n, (start, end) in enumerate(spans)]
    mentions = [
        {"type": kind, "text": text[spans[word_ids[first]][0] : spans[word_ids[last]][1]],
         "start": spans[word_ids[first]][0], "end": spans[word_ids[last]][1]}
        for kind, first, last in entities([tags[word] for word in word_ids])
    ]  # fmt: skip
    return {"entities": mentions, "words": words}


def padded(rows: Sequence[Any], pad: int, *, typed: bool) -> dict[str, NDArray[np.int64]]:
    """Encoded texts as a model's inputs, [B, S], padded on the right.

    Args:
        rows: what `tokenizers` made of each text.
        pad: the id to pad with.
        typed: whether the model tells two texts apart by their type.
    """
    lengths_B = np.fromiter(map(len, rows), np.int64, len(rows))
    mask_BS = np.arange(lengths_B.max()) < lengths_B[:, None]

    def filled(lists: Iterable[list[int]], value: int) -> NDArray[np.int64]:
        array_BS = np.full(mask_BS.shape, value, np.int64)
        array_BS[mask_BS] = np.fromiter(chain.from_iterable(lists), np.int64, int(lengths_B.sum()))
        return array_BS

    inputs = {"input_ids": filled((row.ids for row in rows), pad), "attention_mask": mask_BS.astype(np.int64)}
    return inputs | ({"token_type_ids": filled((row.type_ids for row in rows), 0)} if typed else {})


class Bundle:
    """An exported folder, its tokenizer read, its model loaded when it is first asked.

    Args:
        folder: with manifest.json.
        threads: of the runtime; 0 leaves the choice to it.

    Attributes:
        num_cut: texts so far that were longer than the model takes and were cut as in training.

    Raises:
        InputError: it is not an exported folder, has no tokenizer.json, or a file but its card was altered.
    """

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        import tokenizers

        folder = Path(folder)
        self.folder, self.manifest = folder, read_manifest(folder)
        check_files(folder, self.manifest, CARD)
        self._threads = threads
        self._runner: Any = None
        self.num_cut = 0
        self.reader = Reader.of(folder / FILE, str(folder)) if KINDS[self.manifest["task"]].reads_images else None
        if self.reader is not None:
            return
        if not (folder / TOKENIZER).is_file():
            raise InputError(f"{folder}: has no {TOKENIZER}")
        self._words = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
        self._words.no_padding()
        self._words.no_truncation()
        if self.manifest["task"] == "question_answering":
            cut = {"stride": self.manifest["stride"], "strategy": "only_second"}
            self._words.enable_truncation(self.manifest["max_tokens"], **cut)
        elif not KINDS[self.manifest["task"]].has_cache:
            self._words.enable_truncation(self.manifest["max_tokens"])

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
        return [row.ids for row in self._words.encode_batch_fast(list(texts))]

    def answers(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        """What a model says of each text: see `answer` and `tagged`; of each question and text, see `_find`.

        An image model takes files' paths for texts.
        """
        if not texts:
            return []
        if self.reader is not None:
            values = self.reader.values(np.stack([self.reader.pixels(text) for text in texts]))
            logits_BC = np.asarray(self.runner.run({PIXELS: values})[0], dtype=np.float64)
            return [answer(self.manifest, logits_C) for logits_C in logits_BC]
        if self.manifest["task"] == "question_answering":
            return [self._find(pair[0], pair[1]) for pair in texts]
        tags = self.manifest["task"] == "token_classification"
        # Where in a text each token stands is looked up for tags only: it takes a while.
        rows = (self._words.encode_batch if tags else self._words.encode_batch_fast)(list(texts))
        self.num_cut += sum(bool(row.overflowing) for row in rows)
        logits = self._logits(rows)
        if tags:
            return [
                tagged(self.manifest["labels"], str(text), row.offsets, logits_SC)
                for text, row, logits_SC in zip(texts, rows, logits, strict=True)
            ]
        return [answer(self.manifest, logits_C) for logits_C in logits]

    def _find(self, question: str, context: str) -> dict[str, Any]:
        """The answer to a question, its place in the text, and how likely that is in its window; null for none."""
        first = self._words.encode(question.strip(), context)
        rows = [first, *first.overflowing]
        logits_R2S = self._logits(rows)
        width = logits_R2S.shape[-1]
        inside = [np.array([i == 1 for i in row.sequence_ids] + [False] * (width - len(row.ids))) for row in rows]
        manifest = self.manifest
        best = choose(
            zip(logits_R2S, inside, strict=True), manifest["longest_answer"], no_answer=bool(manifest["no_answer"])
        )
        if best is None:
            return {"answer": None, "start": None, "end": None, "score": None}
        number, span = best
        start, end = rows[number].offsets[span.start][0], rows[number].offsets[span.end][1]
        allowed_S = inside[number] | (np.arange(width) == 0)
        chances = [softmax(np.where(allowed_S, logits_S, -np.inf)) for logits_S in logits_R2S[number]]
        score = round(float(chances[0][span.start] * chances[1][span.end]), 6)
        return {"answer": context[start:end], "start": start, "end": end, "score": score}

    def _logits(self, rows: Sequence[Any]) -> NDArray[np.float64]:
        """Outputs [B, C]; of words [B, S, C]; of answers' starts and ends [B, 2, S]."""
        inputs = padded(rows, self.manifest["pad_token_id"] or 0, typed=self.manifest.get("typed", False))
        return np.asarray(self.runner.run(inputs)[0], dtype=np.float64)

    def complete(self, prompt: str, max_new_tokens: int) -> str:
        """The likeliest continuation; of a chat model, its answer; of an encoder-decoder, what it makes of the text.

        One that transformers runs writes as its generation_config.json says, maybe with beams.
        """
        if self.manifest.get("prefix"):
            prompt = self.manifest["prefix"] + prompt
        ids = self._chat(prompt) if self.manifest["chat"] else self.encode([prompt])[0]
        if isinstance(self.runner, TransformersRunner) and self.runner.start is not None:
            return str(self._words.decode(self.runner.write(ids, max_new_tokens)))
        new_ids = generate(self.runner, ids, max_new_tokens, self.manifest["eos_token_ids"])
        return str(self._words.decode(new_ids))

    def _chat(self, prompt: str) -> list[int]:
        """The prompt as a user's turn, by the chat template next to the model."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(str(self.folder))
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(self._words.encode(text, add_special_tokens=False).ids)  # the template has written those
