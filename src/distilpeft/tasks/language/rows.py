"""Pairs, chats and plain text → rows of token ids, with what is to be predicted and how many bytes that is.

A document becomes one `Piece`; pieces are cut to `max_tokens` and, if the recipe says so, packed together. Columns of a
row: input_ids; target, whether a token is to be predicted (never the first of a document); segments, lengths of the
documents packed into it; num_tokens, num_targets, num_bytes (of the targets' text, in UTF-8; special tokens have none),
truncated.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets

from distilpeft.errors import InputError
from distilpeft.recipe.task import CausalLM
from distilpeft.tasks import text_rows
from distilpeft.tasks.language.chats import Chat, ChatFault, tools_of
from distilpeft.tasks.language.templates import Template
from distilpeft.tasks.task import Columns, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distilpeft.tasks.task import InputReader

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "target": datasets.List(datasets.Value("bool")),
        "segments": datasets.List(datasets.Value("int32")),
        "num_tokens": datasets.Value("int32"),
        "num_targets": datasets.Value("int32"),
        "num_bytes": datasets.Value("int64"),
        "truncated": datasets.Value("bool"),
    }
)


@dataclass
class Piece:
    """One document, or a block of it: token ids, which of them are targets, and the bytes of each."""

    ids: list[int]
    target: list[bool]
    num_bytes: list[int]
    truncated: bool = False


def columns(task: CausalLM) -> dict[str, str]:
    """The columns that the recipe names, by key."""
    keys = {name: getattr(task, name) for name in ("prompt", "completion", "messages", "tools", "text")}
    return {key: column for key, column in keys.items() if column is not None}


def faults(task: CausalLM, rows: datasets.Dataset) -> Iterator[str | None]:
    """Why each row cannot be used; see `text_classification.faults`."""

    def of_column(key: str, column: str) -> Iterator[str | None]:
        for cell in text_rows.cells(rows, column):
            fault = _fault(task, key, cell)
            yield f"column {column!r} {fault}" if fault else None

    return text_rows.first_of(*(of_column(key, column) for key, column in columns(task).items()))


def _fault(task: CausalLM, key: str, cell: object) -> str | None:
    if key in ("messages", "tools"):
        try:
            Chat.of(cell, needs_reply=task.loss_on != "all") if key == "messages" else tools_of(cell)
        except ChatFault as fault:
            return str(fault)
        return None
    if not isinstance(cell, str):
        return f"holds no text but {type(cell).__name__}"
    return "holds no text" if key == "text" and not cell.strip() else None  # a prompt or completion may be empty


def texts(task: CausalLM, rows: datasets.Dataset) -> Iterator[Text]:
    """What makes two rows the same, for counting duplicates between splits."""
    columns = [column for column in (task.prompt, task.completion, task.messages, task.text) if column is not None]
    for batch in rows.select_columns(columns).iter(batch_size=2_000):
        yield from (repr(cells) for cells in zip(*(batch[column] for column in columns), strict=True))


def encode(task: CausalLM, columns: Columns, tokenizer: InputReader, max_tokens: int) -> Columns:
    """Tokenise rows that have no fault into rows of at most `max_tokens` tokens.

    Pairs and chats are cut at the end. Plain text is cut into blocks, each begun with the last token of the one before,
    so that every token but a document's first is a target once. With `pack`, rows are put together, longest first,
    each where it leaves least room.

    Raises:
        InputError: there is no chat template, or it does not render a chat turn by turn.
    """
    limit = min(max_tokens, tokenizer.model_max_length)
    pieces = [piece for whole in _documents(task, columns, tokenizer) for piece in _cut(task, whole, limit)]
    bins = _pack(pieces, limit) if task.pack else [[piece] for piece in pieces]
    rows: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for group in bins:
        target = [flag for piece in group for flag in piece.target]
        sizes = [size for piece in group for size in piece.num_bytes]
        rows["input_ids"].append([token for piece in group for token in piece.ids])
        rows["target"].append(target)
        rows["segments"].append([len(piece.ids) for piece in group])
        rows["num_tokens"].append(len(target))
        rows["num_targets"].append(sum(target))
        rows["num_bytes"].append(sum(size for size, flag in zip(sizes, target, strict=True) if flag))
        rows["truncated"].append(any(piece.truncated for piece in group))
    return rows


def _documents(task: CausalLM, columns: Columns, tokenizer: InputReader) -> Iterator[Piece]:
    if task.messages is not None or task.chat:
        template, everything = Template(tokenizer), task.loss_on == "all"
        for chat in chats(task, columns):
            try:
                yield _chat(chat, template, everything=everything)
            except ChatFault as fault:
                raise InputError(
                    f"task: a chat that begins with {str(chat.messages[0]['content'])[:40]!r}: {fault}"
                ) from None
    elif task.text is not None:
        for text in columns[task.text]:
            ids, sizes = _tokens(text, tokenizer, begin=True)
            ids, sizes = _ended(ids, sizes, tokenizer)
            yield Piece(ids, [False] + [True] * (len(ids) - 1), sizes)
    else:
        assert task.prompt is not None
        assert task.completion is not None
        for prompt, completion in zip(columns[task.prompt], columns[task.completion], strict=True):
            yield _pair(task, prompt, completion, tokenizer)


def chats(task: CausalLM, columns: Columns) -> Iterator[Chat]:
    """The chats of rows: messages, or prompt and completion as a user's and an assistant's turn."""
    if task.messages is not None:
        tools = columns[task.tools] if task.tools is not None else [None] * len(columns[task.messages])
        for cell, callable_ in zip(columns[task.messages], tools, strict=True):
            yield Chat.of(cell, callable_, needs_reply=task.loss_on != "all")
        return
    assert task.prompt is not None
    assert task.completion is not None
    for prompt, completion in zip(columns[task.prompt], columns[task.completion], strict=True):
        yield Chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])


def template_faults(task: CausalLM, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[str | None]:
    """Why the tokenizer's template cannot render each row, None if it can; rows with another fault count as good."""
    template = Template(tokenizer)
    for batch in rows.select_columns(list(columns(task).values())).iter(batch_size=text_rows.BATCH_ROWS):
        for index in range(len(next(iter(batch.values())))):
            try:
                (chat,) = chats(task, {name: cells[index : index + 1] for name, cells in batch.items()})
            except (ChatFault, TypeError):
                yield None
                continue
            yield _template_fault(template, chat, everything=task.loss_on == "all")


def _template_fault(template: Template, chat: Chat, *, everything: bool) -> str | None:
    try:
        template.rendered(chat, everything=everything)
    except ChatFault as fault:
        return str(fault)
    return None


def _pair(task: CausalLM, prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Piece:
    """Prompt and completion are tokenised apart, as they will be when the model is asked; then the end token."""
    head, head_sizes = _tokens(prompt, tokenizer, begin=True)
    tail, tail_sizes = _tokens(completion, tokenizer, begin=False)
    if tail:  # an empty completion teaches nothing, not even to be silent
        tail, tail_sizes = _ended(tail, tail_sizes, tokenizer)
    target = [task.loss_on == "all"] * len(head) + [True] * len(tail)
    return Piece(head + tail, [False, *target[1:]], head_sizes + tail_sizes)


def _chat(chat: Chat, template: Template, *, everything: bool) -> Piece:
    """Render with the tokenizer's template; the targets are what the assistant says, with the end of its turn."""
    text, spans = template.rendered(chat, everything=everything)
    tokenizer = template.tokenizer
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    target = [end > start and any(a <= start < b for a, b in spans) for start, end in offsets]
    sizes = _sizes(text, encoded["input_ids"], offsets, tokenizer)
    return Piece(encoded["input_ids"], [False, *target[1:]], sizes)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, begin: bool) -> tuple[list[int], list[int]]:
    """Token ids (with the tokenizer's own first token if `begin`) and the bytes of text that each stands for."""
    encoded = tokenizer(text, add_special_tokens=begin, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    while begin and ids and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
        ids, offsets = ids[:-1], offsets[:-1]  # some tokenizers end whatever they begin
    return ids, _sizes(text, ids, offsets, tokenizer)


def _sizes(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Bytes of each token's text; what lies between two tokens' spans goes to the second. They add up to the text's."""
    special = set(tokenizer.all_special_ids)
    sizes, reached = [], 0
    for token, (_, end) in zip(ids, offsets, strict=True):
        sizes.append(0 if token in special else len(text[reached:end].encode("utf-8", "replace")))
        reached = max(reached, end)
    return sizes


def _ended(ids: list[int], sizes: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Append the end token, which is worth no bytes."""
    if tokenizer.eos_token_id is None or ids[-1:] == [tokenizer.eos_token_id]:
        return ids, sizes
    return [*ids, tokenizer.eos_token_id], [*sizes, 0]


def _cut(task: CausalLM, whole: Piece, limit: int) -> Iterator[Piece]:
    if task.text is None:
        cut = slice(0, limit)
        yield Piece(whole.ids[cut], whole.target[cut], whole.num_bytes[cut], truncated=len(whole.ids) > limit)
        return
    step = max(1, limit - 1)
    for start in range(0, max(1, len(whole.ids) - 1), step):
        block = slice(start, start + step + 1)
        ids = whole.ids[block]
        yield Piece(ids, [False] + [True] * (len(ids) - 1), whole.num_bytes[block])


def _pack(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """Best fit, longest first: each piece goes where it leaves least room. Order is a function of the pieces alone."""
    bins: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        size = len(piece.ids)
        place = bisect.bisect_left(room, (size, 0))
        if place < len(room):
            left, index = room.pop(place)
        else:
            left, index = limit, len(bins)
            bins.append([])
        bins[index].append(piece)
        if left > size:
            bisect.insort(room, (left - size, index))
    return bins
