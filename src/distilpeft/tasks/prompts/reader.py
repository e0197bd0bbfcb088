"""A reader of rows as prompts: the model's own tokenizer makes ids of them, maybe inside its chat template.

What stands behind every prompt are branches: an answer each, of several classes the rest of the question and yes or no.
An answer is scored by all of its tokens, which are read as they stand there; see `models.prompted`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distilpeft.errors import InputError
from distilpeft.tasks.prompts.prompt import Prompt

if TYPE_CHECKING:
    from distilpeft.tasks.task import InputReader

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Texts that say nothing (Zhao et al. 2021, arXiv:2102.09690, section 5)."""
PROBE = "x"


@dataclass(frozen=True)
class Branch:
    """What may stand behind a prompt.

    Attributes:
        ids: its tokens.
        start: the first of them that belongs to the answer; those before it are read, not scored.
    """

    ids: tuple[int, ...]
    start: int = 0


class PromptReader:
    """Makes prompts of rows and ids of prompts; what else is asked of a reader comes from the model's tokenizer.

    Args:
        tokenizer: of the model.
        prompt: how rows are asked.

    Raises:
        InputError: the tokenizer does not say where its tokens stand, has no chat template, or joins the prompt's end
            with an answer.
    """

    def __init__(self, tokenizer: InputReader, prompt: Prompt) -> None:
        if not tokenizer.is_fast:
            raise InputError(f"teacher.prompt: {type(tokenizer).__name__} has no tokenizer.json, which is needed")
        if prompt.chat and tokenizer.chat_template is None:
            raise InputError("teacher.chat: the model's tokenizer has no chat template; leave it out")
        self._tokenizer, self.prompt = tokenizer, prompt
        self.pad_token_id: int | None = tokenizer.pad_token_id
        self.pad_token: str | None = tokenizer.pad_token
        self.mask_token: str | None = tokenizer.mask_token
        self.unk_token: str | None = tokenizer.unk_token
        self.chat_template: str | None = tokenizer.chat_template
        self.model_max_length: int = tokenizer.model_max_length
        self.model_input_names = ["input_ids", "attention_mask"]  # and no types of tokens: a prompt is one text
        self.branches = tuple(self._branches())
        if len(set(self.branches)) < len(self.branches):
            raise InputError("teacher.answers: two answers become the same tokens")

    def get_vocab(self) -> dict[str, int]:
        """Of the tokenizer."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return vocabulary

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Of the tokenizer."""
        return self._tokenizer.convert_ids_to_tokens(ids)

    def pad(self, batch: Mapping[str, Any], **options: Any) -> Any:
        """A batch padded on the left, so that the answers' places come last."""
        return self._tokenizer.pad(batch, padding_side="left", **options)

    def encode(self, texts: Sequence[Sequence[str]], max_tokens: int) -> dict[str, list[Any]]:
        """Rows as prompts: input_ids, num_tokens of the whole prompt, and whether a text was cut to `max_tokens`."""
        rows = list(zip(*texts, strict=True))
        shown = [self.cut(row, max_tokens) for row in rows]
        ids = [self._ids(self.prompt.of(cut, row)) for row, cut in zip(rows, shown, strict=True)]
        return {
            "input_ids": ids,
            "num_tokens": [len(row) for row in ids],
            "truncated": [row != cut for row, cut in zip(rows, shown, strict=True)],
        }

    def content_free(self) -> list[list[int]]:
        """Prompts about nothing, by which answers are calibrated."""
        count = 2 if "{pair}" in self.prompt.template else 1
        return [self._ids(self.prompt.of((text,) * count)) for text in CONTENT_FREE]

    def cut(self, texts: Sequence[str], max_tokens: int) -> tuple[str, ...]:
        """A row's texts within `max_tokens` tokens; of a pair the longer one is cut first."""
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        kept = [len(places) for places in offsets]
        if sum(kept) <= max_tokens:
            return tuple(texts)
        while sum(kept) > max_tokens:
            kept[kept.index(max(kept))] -= 1
        ends = (places[count - 1][1] if count else 0 for places, count in zip(offsets, kept, strict=True))
        return tuple(text[:end] for text, end in zip(texts, ends, strict=True))

    def _ids(self, asked: str) -> list[int]:
        """A prompt without its ending, as the model reads it."""
        return self._tokens(self._rendered(asked, self.prompt.endings[:1])[0])

    def _rendered(self, asked: str, endings: Sequence[str]) -> tuple[str, Sequence[str]]:
        """A prompt as text, with what goes before it in a chat; and endings, with what goes behind them."""
        if not self.prompt.chat:
            return asked, endings
        turns = [[{"role": "user", "content": asked + ending}] for ending in endings]
        texts = [
            self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns
        ]
        if not self.prompt.labels:
            return texts[0], [""]
        if any(asked not in text for text in texts):
            raise InputError(
                "teacher.chat: the chat template changes the prompt, which cannot be asked for classes then"
            )
        at = texts[0].rindex(asked) + len(asked)
        return texts[0][:at], [text[at:] for text in texts]

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=not self.prompt.chat, verbose=False)["input_ids"]
        ends = self._tokenizer.eos_token_id, self._tokenizer.sep_token_id
        return ids[:-1] if not self.prompt.chat and ids and ids[-1] in ends else ids  # the answer is still to come

    def _branches(self) -> Iterator[Branch]:
        """What may stand behind a prompt, by the tokens that it has there: of each ending all answers."""
        before, endings = self._rendered(self.prompt.of([PROBE] * 2), self.prompt.endings)
        known = self._tokens(before)
        for ending in endings:
            asked = self._behind(known, before + ending, ending)
            for answer in self.prompt.answers:
                both = self._behind([*known, *asked], before + ending + answer, answer)
                if not both:
                    raise InputError(f"teacher.answers: the tokenizer makes no token of {answer!r}")
                yield Branch((*asked, *both), len(asked))

    def _behind(self, known: list[int], text: str, last: str) -> list[int]:
        """The tokens of a text behind those that it is known to begin with; `last` is what it ends with."""
        ids = self._tokens(text)
        if ids[: len(known)] != known:
            raise InputError(
                f"teacher.prompt: the tokenizer joins {last!r} with what stands before it; let the prompt end before a "
                "space, and the answers begin with it"
            )
        return ids[len(known) :]
