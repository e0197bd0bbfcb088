"""Chats with a mark in everything that they say: what is not in the rendered text, a template leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from distilpeft.tasks.language.chats import SPOKEN, Chat, Message

REASONING = SPOKEN[2:]
"""What templates leave out of earlier turns on purpose."""


@dataclass(frozen=True)
class Thing:
    """Something that a chat says.

    Attributes:
        name: what it is, for messages.
        without: the chat without it.
        marks: what is in the text of the marked chat if it is rendered; none if it takes no mark.
        text: what stands between two marks.
    """

    name: str
    without: Chat
    marks: tuple[str, ...] = ()
    text: str = ""


@dataclass
class Marked:
    """A chat while marks are put into it.

    Attributes:
        chat: the chat.
        things: what it says, as far as it has been gone through.
    """

    chat: Chat
    things: list[Thing] = field(default_factory=list)
    _marks: Iterator[str] = field(default_factory=lambda: (f"zqx{number}kv" for number in count()))

    def probe(self) -> Chat:
        """The chat with a mark in everything that it says."""
        messages = [self._message(index, message) for index, message in enumerate(self.chat.messages)]
        tools = None if self.chat.tools is None else [self._tool(tool) for tool in self.chat.tools]
        return replace(self.chat, messages=messages, tools=tools)

    def _without(self, index: int, key: str) -> Chat:
        messages = list(self.chat.messages)
        messages[index] = {name: value for name, value in messages[index].items() if name != key}
        return replace(self.chat, messages=messages)

    def _message(self, index: int, message: Message) -> Message:
        is_read = message["role"] == "assistant" and not self.chat.learnt[index]  # its thoughts may be left out
        copy = dict(message)
        for key in ("content", *SPOKEN):
            if not message.get(key) or (is_read and key in REASONING):
                continue
            if key == "tool_calls":
                copy[key] = [self._call(call, self._without(index, key)) for call in message[key]]
            elif key == "content":
                copy[key] = self._content(message, index, both_ends=not is_read)
            else:
                copy[key] = self._value(f"its {key}", message[key], self._without(index, key))
        return copy

    def _content(self, message: Message, index: int, *, both_ends: bool) -> str:
        text = message["content"]
        if not text.strip():
            return str(text)
        marks = (next(self._marks), next(self._marks))
        name = f"messages of the role {message['role']!r}"
        self.things.append(Thing(name, self._without(index, "content"), marks if both_ends else marks[1:], text))
        return f"{marks[0] if both_ends else ''}{text}{marks[1]}"

    def _value(self, name: str, value: Any, without: Chat) -> Any:
        marks = (next(self._marks),) if isinstance(value, str) else ()
        self.things.append(Thing(name, without, marks))
        return f"{value}{marks[0]}" if marks else value

    def _call(self, call: Mapping[str, Any], without: Chat) -> dict[str, Any]:
        """Marks at the end of the function's name, and as one argument more."""
        function = call.get("function", call)
        changed = {**function, "name": self._value("its tool_calls", function["name"], without)}
        if function["arguments"]:
            mark = next(self._marks)
            self.things.append(Thing("the arguments of its tool_calls", without, (mark,)))
            changed["arguments"] = {**function["arguments"], mark: ""}
        return {**call, "function": changed} if "function" in call else changed

    def _tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        function = tool.get("function", tool)
        has_name = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        name = f"its tools: {function['name']!r}" if has_name else "its tools"
        value = self._value(name, function["name"] if has_name else None, replace(self.chat, tools=None))
        if not has_name:
            return dict(tool)
        changed = {**function, "name": value}
        return {**tool, "function": changed} if "function" in tool else changed
