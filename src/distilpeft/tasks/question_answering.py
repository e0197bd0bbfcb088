"""Questions whose answer stands in a text: where it starts and where it ends are two distributions over tokens.

A text that is longer than `data.max_tokens` is read in windows that overlap by `task.stride` tokens; a row after
`encode` is a window, and the answer to a question is the best of its windows. Both distributions are over the text's
tokens and the first one ([CLS], which stands for "not here"): the question's tokens and padding are masked, so padding
is not part of any figure. Columns after `encode`: input_ids, num_tokens, truncated (the text took several windows),
token_types, label (tokens of start and end), first and last (of the text's tokens), starts and ends (characters of
these), window (its number, from 0), context, answers.

    B  rows of a batch    S  tokens    N  distributions: 2 B    Q  questions    R  windows
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.vocabulary import TYPES
from distilpeft.errors import InputError
from distilpeft.metrics.answer_spans import Span, choose, exact, f1
from distilpeft.metrics.score import Score
from distilpeft.recipe.task import QuestionAnswering
from distilpeft.tasks import text_rows
from distilpeft.tasks.task import Batch, Columns, Doubles, Rows, Task, Values, by_label, dense
from distilpeft.tasks.text_rows import logits_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from distilpeft.distillation.fused import Soft
    from distilpeft.distillation.losses import Loss
    from distilpeft.tasks.task import InputReader

MASKED = -1e8
"""The logit of a token that cannot start or end an answer: that of `losses`, which is not imported without torch."""
BOUNDS = {"log_loss": (0.0, np.inf)}


@dataclass(frozen=True)
class QuestionAnsweringTask(Task):
    """Questions whose answer stands in a text."""

    auto_class = "AutoModelForQuestionAnswering"
    peft_task = "QUESTION_ANS"
    section: QuestionAnswering

    def features(self) -> datasets.Features:
        """Columns after `encode`."""
        numbers, text = datasets.List(datasets.Value("int32")), datasets.Value("string")
        own = {
            "token_types": datasets.List(datasets.Value("int8")),
            "label": numbers,
            "starts": numbers,
            "ends": numbers,
        }
        counts = {name: datasets.Value("int32") for name in ("first", "last", "window")}
        return datasets.Features({**text_rows.BASE, **own, **counts, "context": text, "answers": datasets.List(text)})

    def model_options(self) -> dict[str, object]:
        """Configuration values of a model for this task: a start and an end."""
        return {"num_labels": 2}

    def columns(self) -> list[tuple[str, str]]:
        """Question, text and answers."""
        return [(key, getattr(self.section, key)) for key in ("question", "context", "answers")]

    def faults(self, rows: datasets.Dataset) -> Iterator[str | None]:
        """Why each row cannot be used; see `text_classification.faults`."""
        context, answers = self.section.context, self.section.answers
        texts = text_rows.text_faults(rows, self.section.question, context)
        if answers not in rows.column_names:
            return texts
        cells = zip(text_rows.cells(rows, context), text_rows.cells(rows, answers), strict=True)
        return text_rows.first_of(texts, (_fault(self.section, *pair) for pair in cells))

    def texts(self, rows: datasets.Dataset) -> Iterator[tuple[str, str]]:
        """What makes two rows the same, and what a deployed model reads."""
        cells = zip(
            text_rows.cells(rows, self.section.question), text_rows.cells(rows, self.section.context), strict=True
        )
        return ((question.strip(), context) for question, context in cells)

    def encode(self, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
        """Windows of rows that have no fault.

        Raises:
            InputError: a question leaves no room for its text.
        """
        limit = min(max_tokens, tokenizer.model_max_length)
        questions, contexts = (
            text_rows.masked(columns[name], tokenizer) for name in (self.section.question, self.section.context)
        )
        questions = [text.strip() for text in questions]
        ids = tokenizer(questions, truncation=False, verbose=False)["input_ids"]
        longest = max(range(len(ids)), key=lambda at: len(ids[at]))
        if len(ids[longest]) + self.section.stride + 2 >= limit:
            raise InputError(
                f"data.max_tokens: {limit} tokens leave no room for windows that overlap by {self.section.stride} "
                f"behind the question {questions[longest][:60]!r} of {len(ids[longest])} tokens"
            )
        read = tokenizer(
            questions, contexts, truncation="only_second", max_length=limit, stride=self.section.stride,
            return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
        )  # fmt: skip
        own = ("label", "starts", "ends", "first", "last", "window", "context", "answers")
        windows: Columns = {name: [] for name in (*text_rows.BASE, *own)}
        origins = read["overflow_to_sample_mapping"]
        cells = columns.get(self.section.answers, [None] * len(contexts))  # rows without a label have no such column
        for number, row in enumerate(origins):
            places = [at for at, part in enumerate(read.sequence_ids(number)) if part == 1]
            first, last = places[0], places[-1]
            offsets = read["offset_mapping"][number][first : last + 1]
            answers = listed(cells[row], contexts[row]) or []
            windows["input_ids"].append(read["input_ids"][number])
            windows["num_tokens"].append(len(read["input_ids"][number]))
            windows["truncated"].append(origins.count(row) > 1)
            windows["label"].append(_tokens_of(answers, offsets, first))
            windows["starts"].append([start for start, _ in offsets])
            windows["ends"].append([end for _, end in offsets])
            windows["first"].append(first)
            windows["last"].append(last)
            windows["window"].append(sum(1 for earlier in origins[:number] if earlier == row))
            windows["context"].append(contexts[row])
            windows["answers"].append([text for text, _ in answers])
        return {**windows, "token_types": read["token_type_ids"]}

    def collate(self, columns: Columns, tokenizer: InputReader) -> Batch:
        """Pad to the longest row of the batch.

        Returns:
            `inputs`: input_ids and attention_mask [B, S], token_type_ids where the model tells the texts apart by them.
            `labels_N`: token of the start and of the end of each row, one behind the other; `allowed_NS`: what can
            be one;
            `at_N`, `rows_N`: positions of both in an output of [B, 2, S], and the b of each.
        """
        import torch

        cells = {"input_ids": columns["input_ids"]}
        if TYPES in tokenizer.model_input_names:
            cells[TYPES] = columns["token_types"]
        inputs = dict(tokenizer.pad(cells, padding_side="right", return_tensors="pt"))
        size, width = inputs["input_ids"].shape
        places_S = torch.arange(width)
        first_B1, last_B1 = (torch.tensor(columns[name]).unsqueeze(-1) for name in ("first", "last"))
        allowed_BS = (places_S == 0) | ((places_S >= first_B1) & (places_S <= last_B1))
        return {
            "inputs": inputs,
            "labels_N": torch.tensor(columns["label"], dtype=torch.long).reshape(-1),
            "allowed_NS": allowed_BS.repeat_interleave(2, dim=0),
            "at_N": torch.arange(2 * size),
            "rows_N": torch.arange(size).repeat_interleave(2),
        }

    def soft(self, teacher: nn.Module, batch: Batch) -> Tensor:
        """What the frozen teacher knows of a batch: its logits."""
        return place_logits(teacher, batch)

    def num_positions(self, rows: Rows) -> NDArray[np.int64]:
        """How many soft targets each row has: its start and its end."""
        return np.full(len(rows.lengths_N), 2, dtype=np.int64)

    def vocabulary(self, teacher: PreTrainedModel, max_tokens: int) -> int:
        """Numbers in a soft target: a logit of each token of the longest row."""
        return max_tokens

    def loss_sum(self, model: nn.Module, batch: Batch, loss: Loss, soft: Soft | None) -> Tensor:
        """The loss summed over starts and ends."""
        from distilpeft.distillation.losses import counted_sum

        ours = place_logits(model, batch)
        return by_label(batch, loss, lambda own, rows: counted_sum(ours, batch["labels_N"], dense(soft), own, rows))

    def measure(self, model: nn.Module, batch: Batch, soft: Soft | None = None) -> Tensor:
        """What the scores of a row are computed from: logits of start and end of each token, [B, S * 2], then zeros."""
        logits_NS = place_logits(model, batch)
        return logits_NS.reshape(-1, 2, logits_NS.shape[-1]).transpose(1, 2).flatten(1)

    def majority_values(self, train: Rows, rows: Rows) -> NDArray[np.float32]:
        """`measure` of a model for which all tokens are as likely: its answer is the first word of the text."""
        return np.zeros((len(rows.lengths_N), 2 * int(rows.lengths_N.max())), dtype=np.float32)

    def metrics(self, values_RK: Values, rows: Rows) -> dict[str, float]:
        """All metrics: F1 over words and exact match by question, as SQuAD's script has them, and nats by window."""
        answers = answers_of(self.section, values_RK, rows)
        return {
            "f1": float(np.mean([f1(*pair) for pair in answers])),
            "exact_match": float(np.mean([exact(*pair) for pair in answers])),
            "log_loss": float(_nats(values_RK, rows).mean()),
        }

    def scores(self, names: tuple[str, ...], values_RK: Values, rows: Rows) -> dict[str, Score]:
        """Metric → value, 95 % interval and number of questions."""
        from distilpeft.metrics.classification import scored

        answers = answers_of(self.section, values_RK, rows)
        nats_R, window_R = _nats(values_RK, rows), rows.column("window")
        of_question_R = np.cumsum(window_R == 0) - 1
        nats_Q, windows_Q = np.bincount(of_question_R, nats_R), np.bincount(of_question_R)
        f1_Q, exact_Q = (np.array([score(*pair) for pair in answers]) for score in (f1, exact))

        def of(draw: NDArray[np.int64] | slice) -> dict[str, float]:
            return {
                "f1": float(f1_Q[draw].mean()), "exact_match": float(exact_Q[draw].mean()),
                "log_loss": float(nats_Q[draw].sum() / windows_Q[draw].sum()),
            }  # fmt: skip

        return scored(of, names, len(answers), BOUNDS)

    def added(self, values_RK: Values, rows: Rows) -> tuple[Doubles, Doubles]:
        """What each question adds to the sum of F1, and to its denominator."""
        f1_Q = np.array([f1(*pair) for pair in answers_of(self.section, values_RK, rows)])
        return f1_Q, np.ones(len(f1_Q))

    def against_teacher(self, values_RK: Values, teacher_RK: Values, rows: Rows) -> dict[str, float]:
        """KL(teacher || model) in nats per start or end, and the share of both that are at the same token."""
        from distilpeft.metrics.classification import agreement

        places_S = np.arange(values_RK.shape[1] // 2)
        first_R1, last_R1 = (rows.column(name)[:, None] for name in ("first", "last"))
        allowed_RS = (places_S == 0) | ((places_S >= first_R1) & (places_S <= last_R1))
        ours, theirs = (
            np.where(
                allowed_RS[:, None], values.reshape(len(values), -1, 2).transpose(0, 2, 1).astype(np.float64), MASKED
            )
            for values in (values_RK, teacher_RK)
        )
        return agreement(ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1]))


def _fault(task: QuestionAnswering, context: Any, answers: object) -> str | None:
    spans = listed(answers, context) if isinstance(context, str) else []
    if spans is None:
        return (
            f"column {task.answers!r} holds {str(answers)[:60]!r}; it wants text and answer_start of each answer, as "
            "SQuAD has them, or one answer as a text"
        )
    if not spans and not task.no_answer:
        return "the question has no answer; allow for such ones with task.no_answer: true"
    for answer, start in spans:
        if start < 0 or context[start : start + len(answer)] != answer or not answer.strip():
            where = "anywhere" if start < 0 else f"at character {start}"
            return f"the answer {answer[:60]!r} does not stand {where} in {task.context!r}"
    return None


def listed(cell: Any, context: str) -> list[tuple[str, int]] | None:
    """The answers in a cell, each with its first character; None if they are not of a known form.

    Known are SQuAD's lists, of both layouts that data sets have it in, and a text, which stands where it first occurs
    (-1: nowhere); without any answer the cell is empty.
    """
    if cell is None or cell == "":
        return []
    if isinstance(cell, str):
        return [(cell, context.find(cell))]
    if isinstance(cell, dict):
        if not isinstance(cell.get("text"), list) or not isinstance(cell.get("answer_start"), list):
            return None
        cell = [{"text": t, "answer_start": s} for t, s in zip(cell["text"], cell["answer_start"], strict=False)]
    is_list = isinstance(cell, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("text"), str) and isinstance(entry.get("answer_start"), int)
        for entry in cell
    )
    return [(entry["text"], entry["answer_start"]) for entry in cell] if is_list else None


def _tokens_of(answers: list[tuple[str, int]], offsets: list[tuple[int, int]], first: int) -> list[int]:
    """The tokens of the first answer, if all of it is in the window; else those of [CLS]."""
    if not answers:
        return [0, 0]
    text, begin = answers[0]
    end = begin + len(text)
    if begin < offsets[0][0] or end > offsets[-1][1]:
        return [0, 0]
    inside = [at for at, (start, stop) in enumerate(offsets) if start < end and stop > begin]
    return [first + inside[0], first + inside[-1]] if inside else [0, 0]


def place_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of start and end of each row over the tokens that can be one, [N, S]."""
    logits_B2S: Tensor = logits_of(model(**batch["inputs"]))
    return logits_B2S.flatten(0, 1).float().masked_fill(~batch["allowed_NS"], MASKED)


def _windows(rows: Rows) -> Iterator[dict[str, Any]]:
    names = ["window", "first", "last", "label", "starts", "ends", "context", "answers"]
    for batch in rows.dataset.select_columns(names).iter(batch_size=500):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def answers_of(task: QuestionAnswering, values_RK: Values, rows: Rows) -> list[tuple[str, list[str]]]:
    """Every question's answer by these logits, empty for none, and the right ones."""
    questions: list[list[tuple[Values, dict[str, Any]]]] = []
    for values_K, row in zip(values_RK, _windows(rows), strict=True):
        if row["window"] == 0:
            questions.append([])
        questions[-1].append((values_K.reshape(-1, 2).T, row))
    pairs = []
    for windows in questions:
        places = [(logits_2S, _inside(row, logits_2S.shape[-1])) for logits_2S, row in windows]
        chosen = choose(places, task.longest_answer, no_answer=task.no_answer)
        answer = "" if chosen is None else text_of(chosen[1], windows[chosen[0]][1])
        pairs.append((answer, windows[0][1]["answers"]))
    return pairs


def _inside(row: dict[str, Any], width: int) -> NDArray[np.bool_]:
    places_S = np.arange(width)
    inside_S: NDArray[np.bool_] = (places_S >= row["first"]) & (places_S <= row["last"])
    return inside_S


def text_of(span: Span, row: dict[str, Any]) -> str:
    """The characters of a stretch of tokens."""
    start, end = row["starts"][span.start - row["first"]], row["ends"][span.end - row["first"]]
    return str(row["context"][start:end])


def _nats(values_RK: Values, rows: Rows) -> Doubles:
    """Negative log-likelihood of start and end of each window, on average of the two."""
    nats = []
    for values_K, row in zip(values_RK, _windows(rows), strict=True):
        allowed = np.r_[0, row["first"] : row["last"] + 1]
        logits_A2 = values_K.reshape(-1, 2)[allowed].astype(np.float64)
        at = [int(np.flatnonzero(allowed == place)[0]) for place in row["label"]]
        log_p_A2 = logits_A2 - np.logaddexp.reduce(logits_A2, axis=0)
        nats.append(-(log_p_A2[at[0], 0] + log_p_A2[at[1], 1]) / 2)
    return np.array(nats)
