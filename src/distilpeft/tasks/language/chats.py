"""Chats as a tokenizer's template renders them, and where in the text the assistant speaks.

A template gets the whole message and the tools. What it leaves out of that without a word (tool calls, tools,
reasoning, a role) is a fault of the row: learnt without them, a tool call would be silence. The targets are what the
assistant says, tool calls included, with the end of its turn; each turn begins with the template's generation prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distilpeft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
SPOKEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message, beside its content, that the assistant says; other keys are ids and the like."""
MARK = "zqxjkv"
"""Text that stands in for a message's to see whether a template renders it."""
SHOWN = 30


class ChatFault(ValueError):
    """What is wrong with a chat; a fault of its row."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: as a template takes them: content is text, arguments of tool calls are objects.
        tools: what may be called; None if nothing.
    """

    messages: list[Message]
    tools: list[Any] | None = None

    @staticmethod
    def of(cell: Any, tools: Any = None, *, needs_reply: bool) -> Chat:
        """A chat out of data cells, which hold lists or JSON text of lists.

        Raises:
            ChatFault: they do not.
        """
        messages = _without_none(_as_list(cell))
        if not isinstance(messages, list) or not messages:
            raise ChatFault("holds no list of messages")
        chat = Chat([_message(message) for message in messages], tools_of(tools))
        if needs_reply and not any(_is_learnt(message) for message in chat.messages):
            raise ChatFault("holds no message of the role assistant, so nothing to learn")
        return chat


def _as_list(cell: Any) -> Any:
    """A cell, read as JSON if it is text."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return None


def _without_none(value: Any) -> Any:
    """A value without keys that are None: Arrow fills them in where another row has them."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def tools_of(cell: Any) -> list[Any] | None:
    """The tools in a data cell: a list, or JSON text of one; None for none.

    Raises:
        ChatFault: it holds something else.
    """
    tools = _without_none(_as_list(cell))
    if tools is None and isinstance(cell, str) and cell.strip():
        raise ChatFault("its tools are no JSON list")
    if tools is not None and not isinstance(tools, list):
        raise ChatFault("its tools are no list")
    return tools or None


def _message(message: Any) -> Message:
    """A message as templates take it.

    Raises:
        ChatFault: it is none.
    """
    if isinstance(message, Mapping) and {"from", "value"} <= set(message):
        raise ChatFault("holds messages with from and value (ShareGPT); rename them to role and content")
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ChatFault("holds a message without the texts role and content")
    found = {**message, "content": _content(message)}
    if "tool_calls" in found:
        if not isinstance(found["tool_calls"], list):
            raise ChatFault("holds tool_calls that are no list")
        found["tool_calls"] = [_call(call) for call in found["tool_calls"]]
    return found


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None and any(message.get(key) for key in SPOKEN):
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        kinds = {part.get("type") for part in content} - {"text"}
        if kinds:
            raise ChatFault(f"holds content of the kind {sorted(map(str, kinds))[0]!r}; only text can be learnt")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ChatFault("holds a message without the texts role and content")
    return content


def _call(call: Any) -> Any:
    """A tool call whose arguments are an object: templates expect one, APIs give its JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ChatFault(f"holds a tool call whose arguments are no JSON: {arguments[:SHOWN]!r}") from None
    return {**call, "function": {**function, "arguments": arguments}} if arguments is not None else call


def _is_learnt(message: Message) -> bool:
    """Whether the assistant says it, and it counts; `weight: 0` leaves a turn out, as OpenAI's format has it."""
    return bool(message["role"] == "assistant" and message.get("weight", 1) != 0)


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template.

    Raises:
        InputError: there is none, or it does not compile.
    """

    tokenizer: PreTrainedTokenizerBase
    _roles: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import jinja2

        if not self.tokenizer.chat_template:
            raise InputError(f"task: the tokenizer of {self.name} has no chat template")
        try:
            self._text([{"role": "user", "content": MARK}])
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {error.message}"
            raise InputError(f"task: the chat template of {self.name} does not compile: {reason}") from None
        except Exception:
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

    def text(self, messages: Sequence[Message], tools: Any = None, *, begin: bool = False) -> str:
        """The same.

        Raises:
            ChatFault: the template does not render them.
        """
        try:
            return self._text(messages, tools, begin=begin)
        except Exception as error:
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            raise ChatFault(f"the chat template of {self.name} does not render it: {reason}") from None

    def rendered(self, chat: Chat, *, everything: bool) -> tuple[str, list[tuple[int, int]]]:
        """A chat's text, and the spans in it that are learnt.

        Args:
            chat: the chat.
            everything: learn all of it, not only what the assistant says.

        Raises:
            ChatFault: the template does not render it, or leaves something out.
        """
        text = self.text(chat.messages, chat.tools)
        self._check_nothing_is_left_out(chat, text)
        return text, [(0, len(text))] if everything else list(self._replies(chat, text))

    def _check_nothing_is_left_out(self, chat: Chat, text: str) -> None:
        if chat.tools is not None and self.text(chat.messages) == text:
            raise ChatFault(f"the chat template of {self.name} leaves out its tools")
        for key in SPOKEN:
            if any(message.get(key) for message in chat.messages):
                bare = [{name: value for name, value in one.items() if name != key} for one in chat.messages]
                if self.text(bare, chat.tools) == text:
                    raise ChatFault(f"the chat template of {self.name} leaves out its {key}")
        for index, message in enumerate(chat.messages):
            role = message["role"]
            if message["content"] and role not in self._roles:
                self._roles[role] = self._shows(chat, index)
            if message["content"] and not self._roles[role]:
                raise ChatFault(f"the chat template of {self.name} leaves out messages of the role {role!r}")

    def _shows(self, chat: Chat, index: int) -> bool:
        """Whether a message's content is rendered; looked at where it is the last, since some rewrite earlier ones."""
        marked = [*chat.messages[:index], {**chat.messages[index], "content": MARK}]
        try:
            return MARK in self._text(marked, chat.tools)
        except Exception:  # some want an answer at the end
            return MARK in self.text([*marked, *chat.messages[index + 1 :]], chat.tools)

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(str(token) for token in self.tokenizer.all_special_tokens)

    def _replies(self, chat: Chat, text: str) -> Iterator[tuple[int, int]]:
        """Where the assistant speaks, found by rendering every beginning of the chat."""
        for index, message in enumerate(chat.messages):
            if not _is_learnt(message):
                continue
            after = self.text(chat.messages[: index + 1], chat.tools)
            start = self._start(chat, index, after)
            if not text.startswith(after):
                raise ChatFault(
                    f"the chat template of {self.name} renders earlier turns differently once later ones follow (near "
                    f"{text[start - 20 : start + 20]!r}); give one reply per row"
                )
            stripped = after.rstrip()
            # A line break behind the end token is the template's, not the model's; without one it ends the turn itself.
            yield start, len(stripped) if stripped.endswith(self._ends) else len(after)

    def _start(self, chat: Chat, index: int, after: str) -> int:
        """Where in `after`, which ends with the message at this index, the assistant begins to speak."""
        try:
            before = self._text(chat.messages[:index], chat.tools, begin=True)
        except Exception:  # templates that want a user first, or any message at all, render no beginning without one
            return self._first_difference(chat, index, after)
        if after.startswith(before):
            return len(before)
        plain = self.text(chat.messages[:index], chat.tools) if index else ""
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
        at = self.text(marked, chat.tools).find(MARK)
        if at < 0 or at > len(after):
            raise ChatFault(f"the chat template of {self.name} does not show where the assistant's first turn begins")
        return at
