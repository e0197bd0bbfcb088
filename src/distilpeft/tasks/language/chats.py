"""Chats: cells with messages and tools, as conversations that templates take.

A file holds structures, whose missing keys Arrow fills with None, or JSON text. What a template makes of a chat is in
`templates`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, Any]
SPOKEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message, beside its content, that the assistant says; other keys are ids and the like."""
SHOWN = 30


class ChatFault(ValueError):
    """What is wrong with a chat; a fault of its row."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: as a template takes them: content is text, arguments of tool calls are objects.
        tools: what may be called; None if nothing.
        arguments_as_text: templates get the arguments as JSON text instead.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    arguments_as_text: bool = False

    @staticmethod
    def of(cell: object, tools: Any = None, *, needs_reply: bool) -> Chat:
        """A chat out of data cells, which hold lists or JSON text of lists.

        Raises:
            ChatFault: they do not.
        """
        messages = _plain_data(cell)
        if not isinstance(messages, list) or not messages:
            raise ChatFault("holds no list of messages")
        chat = Chat([_message(message) for message in messages], tools_of(tools))
        if needs_reply and not any(chat.learnt):
            raise ChatFault("holds no message of the role assistant, so nothing to learn")
        return chat

    @property
    def learnt(self) -> list[bool]:
        """Whether each message is said by the assistant, and counts; `weight: 0` is OpenAI's for one that does not."""
        return [message["role"] == "assistant" and message.get("weight", 1) != 0 for message in self.messages]

    def given(self, stop: int | None = None) -> list[Message]:
        """The messages before `stop` as a template gets them."""
        messages = self.messages[:stop]
        return [_with_arguments(message, _as_json) for message in messages] if self.arguments_as_text else messages

    def with_argument(self, name: str) -> Chat:
        """The same with one argument more in every tool call."""
        messages = [_with_arguments(message, lambda arguments: {**arguments, name: ""}) for message in self.messages]
        return replace(self, messages=messages)


def _as_json(arguments: Mapping[str, object]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _with_arguments(message: Message, change: Callable[[Mapping[str, Any]], Any]) -> Message:
    """A message with the arguments of its tool calls changed."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        changed = {**function, "arguments": change(function["arguments"])}
        calls.append({**call, "function": changed} if "function" in call else changed)
    return {**message, "tool_calls": calls}


def _plain_data(cell: object) -> Any:
    """A cell as plain data: what JSON text says, or structures without the keys that Arrow fills in."""
    if not isinstance(cell, str):
        return _without_none(cell)
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return None


def _without_none(value: object) -> Any:
    """A value without keys that are None: Arrow fills them in where another row has them."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def tools_of(cell: object) -> list[Any] | None:
    """The tools in a data cell: a list, or JSON text of one; None for none.

    Raises:
        ChatFault: it holds something else.
    """
    tools = _plain_data(cell)
    if tools is None and isinstance(cell, str) and cell.strip() not in ("", "null"):
        raise ChatFault("its tools are not a JSON list")
    if tools is not None and not isinstance(tools, list):
        raise ChatFault("its tools are not a list")
    objects = [_plain_data(tool) if isinstance(tool, str) else tool for tool in tools or ()]
    if not all(isinstance(tool, Mapping) for tool in objects):
        raise ChatFault("its tools are not a list of objects, such as {type: function, function: {name: ...}}")
    return objects or None


def _message(message: object) -> Message:
    """A message as templates take it.

    Raises:
        ChatFault: it is none.
    """
    if isinstance(message, Mapping) and {"from", "value"} <= set(message):
        raise ChatFault("holds messages with from and value (ShareGPT); rename them to role and content")
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ChatFault("holds a message without the texts role and content")
    fields = {key: value for key, value in message.items() if value is not None} | {"content": _content(message)}
    if fields.get("weight", 1) not in (0, 1):
        raise ChatFault(f"holds the weight {fields['weight']!r}; it is 0 (read only) or 1 (learnt)")
    if "tool_calls" in fields:
        if not isinstance(fields["tool_calls"], list):
            raise ChatFault("holds tool_calls that are not a list")
        fields["tool_calls"] = [_call(call) for call in fields["tool_calls"]]
    return fields


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


def _call(call: Any) -> dict[str, Any]:
    """A tool call whose arguments are an object: templates expect one, APIs give its JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatFault("holds a tool call that names no function")
    arguments = function.get("arguments") or {}
    values = _plain_data(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(values, Mapping):
        raise ChatFault(f"holds a tool call whose arguments are not a JSON object: {str(arguments)[:SHOWN]!r}")
    function = {**function, "arguments": values}
    return {**call, "function": function} if "function" in call else function
