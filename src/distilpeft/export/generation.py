"""Greedy generation through an exported graph with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distilpeft.export.runtimes import DECODER, Inputs, Runner


def generate(runner: Runner, ids: Sequence[int], max_new_tokens: int, stop: Sequence[int]) -> list[int]:
    """The likeliest continuation, token by token, up to one of the tokens in `stop`, which is left out.

    Of a model that reads a source first: the likeliest answer to it.
    """
    if runner.start is not None:
        source = np.array([ids], np.int64)
        return write_rows(runner, {"input_ids": source, "attention_mask": np.ones_like(source)}, max_new_tokens, stop)[
            0
        ]
    answer: list[int] = []
    cache = None
    new = list(ids)
    while len(answer) < max_new_tokens:
        length = len(ids) + len(answer)
        inputs = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, length), np.int64)}
        logits, cache = runner.run(inputs, cache, last=True)
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        answer.append(token)
        new = [token]
    return answer


def write_rows(runner: Runner, inputs: Inputs, max_new_tokens: int, stop: Sequence[int]) -> list[list[int]]:
    """The likeliest answer to each source, token by token, up to one of the tokens in `stop`, which is left out.

    Args:
        runner: a model that reads a source first.
        inputs: input_ids [B, S] and attention_mask.
        max_new_tokens: of an answer.
        stop: what ends one.
    """
    assert runner.start is not None
    rows = len(inputs["input_ids"])
    step_inputs = {**inputs, DECODER: np.full((rows, 1), runner.start, np.int64)}
    answers: list[list[int]] = [[] for _ in range(rows)]
    ended_B, cache = np.zeros(rows, bool), None
    for _ in range(max_new_tokens):
        logits, cache = runner.run(step_inputs, cache, last=True)
        token_B = logits[:, -1].argmax(-1)
        ended_B |= np.isin(token_B, list(stop))
        if ended_B.all():
            break
        for row in np.flatnonzero(~ended_B):
            answers[row].append(int(token_B[row]))
        step_inputs = {"attention_mask": inputs["attention_mask"], DECODER: token_B[:, None]}
    return answers
