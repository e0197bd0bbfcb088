"""A language model that is asked: its logits are the log-probabilities of whole answers, or follow from them.

log p(answer | prompt) is the sum over all of the answer's tokens. Answers stand behind the prompt all at once: each
token of one attends to the prompt and to those before it in the same answer, at the positions that it would have alone.
So a row costs one pass of its prompt and of the answers' tokens. The mean over tokens instead of the sum does not
favour short answers. Calibrating subtracts log p(answer | a text that says nothing), as in arXiv:2102.09690, section 5
(which divides the probabilities, with a diagonal W and b = 0).

    B  rows    S  tokens of the longest prompt    A  answers    C  classes    G  groups of answers
    E  tokens of answers that are read    T  tokens of all of them    V  vocabulary
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from distilpeft.data.labels import LABEL
from distilpeft.errors import InputError
from distilpeft.models.pair import Pair
from distilpeft.tasks.prompts.prompt import Shot
from distilpeft.tasks.prompts.reader import Branch, PromptReader
from distilpeft.tasks.rows import TaskData
from distilpeft.tasks.text_rows import cells

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLOSE, CHECKED = 0.02, 4
"""By how much, in nats, an answer's score may differ from the one that it has alone, and how many are compared."""
SHOTS = 27
"""The stream of random numbers that draws shots."""


@dataclass(frozen=True)
class Answers:
    """What may stand behind a prompt, and how it is scored.

    Attributes:
        branches: answers, group by group; see `prompts.Branch`.
        size: answers of a group: all of them, or yes and no to each class.
        asks_each: whether the groups are yes and no to a class each.
        numbers: what each answer is worth, if a number is asked for.
        per_token: an answer counts by the mean over its tokens instead of the sum.
        content_free: prompts by which scores are calibrated; none: they are not.
        pad: id to pad these with.
    """

    branches: tuple[Branch, ...]
    size: int
    asks_each: bool = False
    numbers: tuple[float, ...] = ()
    per_token: bool = False
    content_free: tuple[tuple[int, ...], ...] = ()
    pad: int = 0

    @cached_property
    def read(self) -> list[tuple[int, int]]:
        """Branch and place of each token that is read behind the prompt: all but the last of each; [E]."""
        return [(at, place) for at, branch in enumerate(self.branches) for place in range(len(branch.ids) - 1)]

    @cached_property
    def scored(self) -> list[tuple[int, int, int]]:
        """Branch, token, and where it is predicted: 0 behind the prompt, 1 + e behind the e-th token that is read."""
        places = {read: 1 + number for number, read in enumerate(self.read)}
        return [
            (at, branch.ids[place], 0 if place == 0 else places[at, place - 1])
            for at, branch in enumerate(self.branches)
            for place in range(branch.start, len(branch.ids))
        ]

    @property
    def counts(self) -> list[int]:
        """Tokens of each answer."""
        return [len(branch.ids) - branch.start for branch in self.branches]


class Prompted:
    """Stands before a causal language model's class, so that its output is an encoder's."""

    answers: Answers
    offset_A: Tensor | None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> SequenceClassifierOutput:
        """Logits: log p(answer | prompt) of each class, [B, C]; log p(yes) - log p(no) of each; or a number, [B, 1].

        Args:
            input_ids: prompts, [B, S].
            attention_mask: 0 for padding, which may be on either side.
            options: what PEFT passes on; nothing of it is used.
        """
        del options
        answers = self.answers
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        scores_BA = self._scores(input_ids, mask_BS)
        if answers.content_free:
            scores_BA = scores_BA - self._offset(scores_BA.device)
        if answers.numbers:
            numbers_A = torch.tensor(answers.numbers, device=scores_BA.device)
            return SequenceClassifierOutput(logits=(scores_BA.softmax(-1) * numbers_A).sum(-1, keepdim=True))
        if answers.asks_each:
            yes_no_BC2 = scores_BA.view(len(scores_BA), -1, answers.size)
            return SequenceClassifierOutput(logits=yes_no_BC2[..., 0] - yes_no_BC2[..., 1])
        return SequenceClassifierOutput(logits=scores_BA)

    def _offset(self, device: torch.device) -> Tensor:
        """Scores where the text says nothing, [A]: of each group the mean of the probabilities, in logarithms."""
        if self.offset_A is None:
            rows, answers = self.answers.content_free, self.answers
            width = max(map(len, rows))
            ids_BS = torch.tensor([[answers.pad] * (width - len(row)) + list(row) for row in rows], device=device)
            mask_BS = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
            with torch.no_grad():
                logs_BGA = self._scores(ids_BS, mask_BS).view(len(rows), -1, answers.size).log_softmax(-1)
            self.offset_A = logs_BGA.exp().mean(0).log().flatten()
        return self.offset_A

    def _scores(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """What each answer has behind its prompt, and behind what is read before it, [B, A]: log p."""
        ids_BS, mask_BS = _to_the_right(ids_BS, mask_BS)
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        read = self.answers.read
        inputs: dict[str, Tensor] = {"input_ids": ids_BS, "attention_mask": mask_BS, "position_ids": positions_BS}
        if read:
            inputs = _with_answers(self.answers, **inputs)
            if self.config._attn_implementation != "sdpa":  # type: ignore[attr-defined]
                inputs["attention_mask"] = _to_be_added(inputs["attention_mask"])
        if _keeps(type(self)):
            inputs["logits_to_keep"] = 1 + len(read)  # type: ignore[assignment]
        output = super().forward(**inputs, use_cache=False)  # type: ignore[misc]
        logs_BEV = output.logits[:, -1 - len(read) :].float().log_softmax(-1)
        branches, tokens, places = (list(column) for column in zip(*self.answers.scored, strict=True))
        found_BT = logs_BEV[:, places, tokens]
        at_T = torch.tensor(branches, device=found_BT.device).expand(len(found_BT), -1)
        counts_A = torch.tensor(self.answers.counts, device=found_BT.device)
        sums_BA = found_BT.new_zeros(len(found_BT), len(counts_A)).scatter_add(1, at_T, found_BT)
        scores_BA: Tensor = sums_BA / counts_A if self.answers.per_token else sums_BA
        return scores_BA


def _keeps(kind: type) -> bool:
    """Whether a model gives the logits of its last positions alone."""
    return "logits_to_keep" in inspect.signature(kind.__mro__[2].forward).parameters  # type: ignore[attr-defined]


def _to_the_right(ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with their padding before them, wherever it was."""
    if bool(mask_BS[:, -1].all()):
        return ids_BS, mask_BS
    width = ids_BS.shape[1]
    order_BS = (torch.arange(width, device=ids_BS.device) + mask_BS.sum(-1, keepdim=True)) % width
    return ids_BS.gather(1, order_BS), mask_BS.gather(1, order_BS)


def _with_answers(
    answers: Answers, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
) -> dict[str, Tensor]:
    """The answers' tokens behind each prompt, and which tokens see which: a mask of booleans [B, 1, S + E, S + E].

    A token sees itself even where it is padding: a row of nothing has no softmax.
    """
    read, rows, device = answers.read, len(input_ids), input_ids.device
    tokens_E = torch.tensor([answers.branches[at].ids[place] for at, place in read], device=device)
    branch_E, place_E = (torch.tensor(column, device=device) for column in zip(*read, strict=True))
    ids = torch.cat([input_ids, tokens_E.expand(rows, -1)], 1)
    positions = torch.cat([position_ids, position_ids[:, -1:] + 1 + place_E], 1)
    width = input_ids.shape[1]
    total = width + len(read)
    causal_TT = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    causal_TT[width:, width:] &= branch_E[:, None] == branch_E
    counted_BT = torch.cat([attention_mask.bool(), torch.ones(rows, len(read), dtype=torch.bool, device=device)], 1)
    seen_BTT = causal_TT & counted_BT[:, None] | torch.eye(total, dtype=torch.bool, device=device)
    return {"input_ids": ids, "attention_mask": seen_BTT[:, None], "position_ids": positions}


def _to_be_added(seen: Tensor) -> Tensor:
    """The mask for attention that adds it to its scores.

    Only there: torch 2.13's fused attention on CPUs takes a float32 mask with float64 queries, and computes nonsense.
    """
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)


def with_shots(pair: Pair, data: TaskData) -> Pair:
    """The pair with training rows before its teacher's prompts, if the recipe says so.

    They are drawn by the seed, of each answer in turn, and stand in random order.

    Raises:
        InputError: there are not as many rows.
    """
    recipe, count = pair.recipe, pair.recipe.teacher.shots
    if not count:
        return pair
    reader = pair.teacher_reader.tokenizer
    assert isinstance(reader, PromptReader), "shots stand before prompts"
    rows = data.first_rows("train", data.num_rows("train"))
    if count > len(rows):
        raise InputError(f"teacher.shots: {count} are more than the {len(rows)} training rows with a label")
    random, prompt = np.random.default_rng([recipe.seed, SHOTS]), reader.prompt
    labels_N = np.array(list(cells(rows, LABEL)))
    if prompt.numbers:  # a number is shown as the nearest of those that the model may answer
        labels_N = np.abs(labels_N[:, None] - np.array(prompt.numbers)).argmin(1)
    order_N = random.permutation(len(rows))
    turn_N = np.empty(len(rows), np.int64)  # how many of its answer stand before each row
    for label in np.unique(labels_N):
        own_N = order_N[labels_N[order_N] == label]
        turn_N[own_N] = np.arange(len(own_N))
    picked = random.permutation(order_N[np.argsort(turn_N[order_N], kind="stable")][:count])
    shots = []
    for row, text in zip(picked.tolist(), data.texts_of("train", picked), strict=True):
        texts = text if isinstance(text, tuple) else (str(text),)
        shots.append(Shot(texts, reader.cut(texts, recipe.data.max_tokens), prompt.answers[labels_N[row]]))
    return replace(pair, shots=tuple(shots))


def attach(model: PreTrainedModel, reader: PromptReader, *, per_token: bool, calibrate: bool) -> None:
    """Let a causal language model answer with classes; in place.

    Args:
        model: as it was loaded, maybe with an adapter on it.
        reader: how its rows are asked.
        per_token: score answers by the mean over their tokens.
        calibrate: subtract what it answers to nothing.

    Raises:
        InputError: answers of several tokens cannot be read at once by this architecture.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    free = tuple(map(tuple, reader.content_free())) if calibrate else ()
    kind = type(base)
    base.__class__ = type(kind.__name__, (Prompted, kind), {"__module__": kind.__module__})
    prompt, pad = reader.prompt, reader.pad_token_id or 0
    base.answers = Answers(
        reader.branches, len(prompt.answers), bool(prompt.labels), prompt.numbers, per_token, free, pad
    )
    base.offset_A = None
    if base.answers.read:
        _check(base, reader.content_free()[0])


def _check(model: Any, prompt: Sequence[int]) -> None:
    """Compare the first answers' scores with those that they have alone, token by token, on one prompt."""
    training = model.training
    model.eval()
    device, whole = next(model.parameters()).device, model.answers
    try:
        with torch.no_grad():
            ids_BS = torch.tensor([list(prompt)], device=device)
            together_BA = model._scores(ids_BS, torch.ones_like(ids_BS))
            for at, branch in enumerate(whole.branches[:CHECKED]):
                alone = 0.0
                for place in range(branch.start, len(branch.ids)):
                    model.answers = Answers((Branch(branch.ids[place : place + 1]),), 1)
                    text_BS = torch.tensor([[*prompt, *branch.ids[:place]]], device=device)
                    alone += float(model._scores(text_BS, torch.ones_like(text_BS)))
                alone /= whole.counts[at] if whole.per_token else 1
                if not abs(alone - float(together_BA[0, at])) <= CLOSE * max(1.0, abs(alone)):
                    raise InputError(
                        f"teacher.answers: {type(model).__name__} does not read several answers behind one prompt; "
                        "give answers of one token each"
                    )
    finally:
        model.answers = whole
        model.train(training)
