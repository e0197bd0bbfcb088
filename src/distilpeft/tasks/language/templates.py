"""Chats as a tokenizer's template renders them, and where in the text the assistant speaks.

A template gets the whole message and the tools. What it leaves out of that without a word (tool calls, tools,
reasoning, a role, the thoughts in a content) is a fault of the row: learnt without them, a tool call would be silence.
The targets are what the assistant says, tool calls included, with the end of its turn; each turn begins with the
template's generation prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distilpeft.errors import InputError
from distilpeft.tasks.language.chats import SHOWN, Chat, ChatFault, Message
from distilpeft.tasks.language.marks import Marked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "zqxjkv"
"""Text that stands in for a message's to see where a template renders it."""


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template.

    Raises:
        InputError: there is none, or it does not compile.
    """

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        import jinja2

        if not self.tokenizer.chat_template:
            raise InputError(f"task: the tokenizer of {self.name} has no chat template")
        try:
            self._text([{"role": "user", "content": MARK}])
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {error.message}"
            raise InputError(f"task: the chat template of {self.name} does not compile: {reason}") from None
        except Exception:  # it compiles; what it cannot render is a fault of the row that asks for it
            pass

    @property
    def name(self) -> str:
        """The tokenizer's."""
        return str(self.tokenizer.name_or_path)

    def _text(self, messages: Sequence[Message], tools: Any = None, *, begin: bool = False) -> str:
        """Rendered messages; `begin`: with the generation prompt behind them."""
        return str(
            self.tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=begin)
        )

    def text(self, chat: Chat, stop: int | None = None, *, begin: bool = False) -> str:
        """The rendered messages before `stop`; `begin`: with the generation prompt behind them.

        Raises:
            ChatFault: the template does not render them.
        """
        try:
            text = self._text(chat.given(stop), chat.tools, begin=begin)
        except Exception as error:
            reason = _readable(" ".join(str(error).split())[:150]) or type(error).__name__
            raise ChatFault(f"the chat template of {self.name} does not render it: {reason}") from None
        if _readable(text) != text:
            raise ChatFault("holds half of a surrogate pair, which is not text")
        return text

    def rendered(self, chat: Chat, *, everything: bool) -> tuple[str, list[tuple[int, int]]]:
        """A chat's text, and the spans in it that are learnt.

        Args:
            chat: the chat.
            everything: learn all of it, not only what the assistant says.

        Raises:
            ChatFault: the template does not render it, or leaves something out.
        """
        chat = self._fitted(chat)
        text = self.text(chat)
        spans = [(0, len(text))] if everything else list(self._replies(chat, text))
        self._check_nothing_is_left_out(chat, text)
        return text, spans

    def _fitted(self, chat: Chat) -> Chat:
        """The chat with the arguments of its calls as this template writes JSON: from objects, or from JSON text."""
        if not any("tool_calls" in message for message in chat.messages):
            return chat
        try:
            text = self.text(chat.with_argument(MARK))
        except ChatFault:  # such as a template that joins texts
            return replace(chat, arguments_as_text=True)
        return replace(chat, arguments_as_text=f"'{MARK}'" in text)  # Python's quotes: it prints what it is given

    def _check_nothing_is_left_out(self, chat: Chat, text: str) -> None:
        """Refuse a chat of which something is not in its text.

        A template that takes a content apart, such as into thoughts and answer, loses one of its marks: then all of it
        has to be in the text. What takes no mark is rendered if the text is another one without it.
        """
        marked = Marked(chat)
        try:
            rendering = self.text(marked.probe())
        except ChatFault:  # the template reads what the marks have changed
            rendering = ""
        bare = "".join(text.split())
        for thing in marked.things:
            if not rendering or not thing.marks:
                if not self._changes(text, thing.without):
                    raise self._left_out(thing.name)
                continue
            hits = [mark in rendering for mark in thing.marks]
            if not any(hits):
                raise self._left_out(thing.name)
            if not all(hits) and "".join(thing.text.split()) not in bare:
                raise self._left_out(f"a part of {thing.text[:SHOWN]!r}")

    def _left_out(self, what: str) -> ChatFault:
        remedy = "use a model whose template renders it, or remove it from the chats"
        return ChatFault(f"the chat template of {self.name} leaves out {what}; {remedy}")

    def _changes(self, text: str, without: Chat) -> bool:
        """Whether a chat without something has another text, or none."""
        try:
            return self.text(without) != text
        except ChatFault:
            return True

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """What may end a turn: tokens that are not text, the end-of-turn tokens of Gemma and others among them."""
        return tuple(map(str, (*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab())))

    def _replies(self, chat: Chat, text: str) -> Iterator[tuple[int, int]]:
        """Where the assistant speaks, found by rendering every beginning of the chat."""
        for index, is_learnt in enumerate(chat.learnt):
            if not is_learnt:
                continue
            after = self.text(chat, index + 1)
            start = self._start(chat, index, after)
            if not text.startswith(after):
                raise ChatFault(
                    f"the chat template of {self.name} renders earlier turns differently once later ones follow (near "
                    f"{text[start - 20 : start + 20]!r}); give a row per reply, with "
                    "weight: 0 on the replies before it"
                )
            stripped = after.rstrip()
            # A line break behind the end token is the template's, not the model's; without one it ends the turn itself.
            yield start, len(stripped) if stripped.endswith(self._ends) else len(after)

    def _start(self, chat: Chat, index: int, after: str) -> int:
        """Where in `after`, which ends with the message at this index, the assistant begins to speak."""
        try:
            before = self._text(chat.given(index), chat.tools, begin=True)
        except Exception:  # templates that want a user first, or any message at all, render no beginning without one
            return self._first_difference(chat, index, after)
        if after.startswith(before):
            return len(before)
        plain = self.text(chat, index) if index else ""
        if after.startswith(plain) and before.startswith(plain):
            opened, turn = before[len(plain) :], after[len(plain) :]
            raise ChatFault(
                f"the generation prompt of {self.name} ends in {opened[-SHOWN:]!r}, and the rendered turn begins with "
                f"{turn[:SHOWN]!r}: the model would be asked differently from how it is trained. Give the assistant's "
                "messages what the prompt opens (such as reasoning), or use a template whose generation prompt fits"
            )
        raise ChatFault(
            f"the chat template of {self.name} renders earlier turns differently once later ones follow (near "
            f"{after[: len(before)][-SHOWN:]!r}); give one reply per row"
        )

    def _first_difference(self, chat: Chat, index: int, after: str) -> int:
        """Where two contents of the message make the text differ: where its own begins."""
        marked = [*chat.messages[:index], {"role": "assistant", "content": MARK}]
        at = self.text(replace(chat, messages=marked)).find(MARK)
        if at < 0 or at > len(after):
            raise ChatFault(f"the chat template of {self.name} does not show where the assistant's first turn begins")
        return at


def _readable(text: str) -> str:
    """Text that can be encoded."""
    return text.encode("utf-8", "replace").decode("utf-8")
