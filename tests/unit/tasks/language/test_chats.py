"""Chats as templates render them: what is learnt, written out by hand, and what cannot be rendered."""

from __future__ import annotations

import json

import datasets
import pytest
from support import tiny_lm
from support.rows import checked, places

from distilpeft.errors import InputError
from distilpeft.recipe.task import CausalLM
from distilpeft.tasks.language.causal_lm import CausalLMTask
from distilpeft.tasks.language.chats import Chat, ChatFault, Template
from distilpeft.tasks.rows import template_check, usable

CHAT_ML = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response>"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Like Qwen's: tools in a system turn, calls and results in tags."""
LLAMA = (
    "<|begin|>{% for m in messages %}<|start|>{{ m['role'] }}<|stop|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
"""Like Gemma's: no system role, turns alternate."""
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
TASK = CausalLM(kind="causal_lm", messages="messages")
WITH_TOOLS = TASK.model_copy(update={"tools": "tools"})


@pytest.fixture
def template(monkeypatch):
    """Function: give the tiny tokenizer, whose tokens are bytes, another template."""
    tokenizer = tiny_lm.tokenizer()

    def use(text: str) -> Template:
        monkeypatch.setattr(tokenizer, "chat_template", text)
        return Template(tokenizer)

    return use


def turns(*said: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in said]


def learnt(template: Template, messages: list[dict], tools: object = None, *, everything: bool = False) -> list[str]:
    """The spans of the rendered text that are targets."""
    chat = Chat.of(messages, tools, needs_reply=not everything)
    text, spans = template.rendered(chat, everything=everything)
    return [text[start:end] for start, end in spans]


SAID = turns(("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CHAT_ML, ["hello<|im_end|>\n", "so long<|im_end|>\n"]),
        (LLAMA, ["hello<|eot|>", "so long<|eot|>"]),
        (GEMMA, ["hello<end>\n", "so long<end>\n"]),
    ],
)
def test_what_the_assistant_says_is_learnt_with_the_end_of_its_turn(template, text, expected):
    assert learnt(template(text), SAID) == expected
    (everything,) = learnt(template(text), SAID, everything=True)
    assert everything.endswith(expected[-1])
    assert "hi" in everything


def test_a_template_s_line_break_behind_a_special_end_token_is_not_learnt(template, monkeypatch):
    used = template(CHAT_ML)
    monkeypatch.setattr(type(used.tokenizer), "all_special_tokens", ["<|im_end|>"])
    assert learnt(used, SAID) == ["hello<|im_end|>", "so long<|im_end|>"]


CALLED = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "1", "name": "add"},
    {"role": "assistant", "content": "three", "reasoning_content": "1+2"},
]
LEARNT = ['<tool_call>add {"a": 1}</tool_call><|im_end|>\n', "<think>1+2</think>three<|im_end|>\n"]


@pytest.mark.parametrize("form", ["objects", "text of objects", "filled with None", "arguments as text"])
def test_tool_calls_are_learnt_and_results_and_tools_are_read(template, form):
    messages, tools = json.loads(json.dumps(CALLED)), TOOLS
    if form == "arguments as text":
        messages[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1}'
    if form == "filled with None":
        keys = {key for message in messages for key in message}
        messages = [dict.fromkeys(keys) | message for message in messages]
    if form == "text of objects":
        messages, tools = json.dumps(messages), json.dumps(tools)
    used = template(CHAT_ML)
    assert learnt(used, messages, tools) == LEARNT
    (everything,) = learnt(used, messages, tools, everything=True)
    assert everything.startswith('<|im_start|>system\nTools: [{"type": "function"')
    assert "<tool_response>3</tool_response>" in everything


def test_a_turn_of_weight_0_is_read_but_not_learnt(template):
    messages = [dict(message) for message in SAID]
    messages[1]["weight"] = 0
    assert learnt(template(CHAT_ML), messages) == ["so long<|im_end|>\n"]


def test_parts_of_text_are_one_text(template):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert learnt(template(LLAMA), [*turns(("user", "hi")), {"role": "assistant", "content": parts}]) == [
        "hello<|eot|>"
    ]


def test_an_assistant_may_speak_first_where_the_template_allows_it(template):
    messages = turns(("assistant", "welcome"), ("user", "hi"), ("assistant", "bye"))
    assert learnt(template(LLAMA), messages) == ["welcome<|eot|>", "bye<|eot|>"]
    fussy = LLAMA.replace("<|begin|>", "{% if not messages %}{{ raise_exception('empty') }}{% endif %}")
    assert learnt(template(fussy), messages) == ["welcome<|eot|>", "bye<|eot|>"]


@pytest.mark.parametrize(
    ("text", "messages", "tools", "message"),
    [
        (GEMMA, turns(("system", "be kind"), *[("user", "a"), ("assistant", "b")]), None, "System role not supported"),
        (GEMMA, turns(("user", "a"), ("user", "b"), ("assistant", "c")), None, "roles must alternate"),
        (GEMMA, turns(("assistant", "b"), ("user", "a")), None, "roles must alternate"),
        (LLAMA, CALLED[:2], None, "leaves out its tool_calls"),
        (LLAMA, SAID, TOOLS, "leaves out its tools"),
        (LLAMA, [*turns(("user", "a")), {"role": "assistant", "content": "b", "reasoning_content": "c"}], None,
         "leaves out its reasoning_content"),
        (CHAT_ML.replace("m.role == 'tool'", "m.role == 'tol'").replace("{{ m.content }}{% for c", "{{ m.content if "
         "m.role != 'tool' }}{% for c"), CALLED, TOOLS, "leaves out messages of the role 'tool'"),
        (LLAMA.replace("m['content'] | trim", "m['text'] + ''"), SAID, None, "does not render it"),
        (LLAMA.replace("assistant<|stop|>\n\n{% endif", "assistant<|stop|>\n\n<think>{% endif"), SAID, None,
         "the generation prompt of .* ends in '.*<think>', and the rendered turn begins with '.*he'"),
        (LLAMA.replace("| trim", "if loop.last else '...'"), SAID, None, "renders earlier turns differently"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_render_is_said(template, text, messages, tools, message):
    with pytest.raises(ChatFault, match=message):
        learnt(template(text), messages, tools)


@pytest.mark.parametrize(
    ("cell", "tools", "message"),
    [
        ([], None, "no list of messages"), ("[", None, "no list of messages"), (None, None, "no list of messages"),
        ([{"from": "human", "value": "a"}], None, "from and value"), ([{"role": "user"}], None, "role and content"),
        ([{"role": "assistant"}], None, "role and content"), (turns(("user", "a")), None, "no message of the role"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], None, "content of the kind 'image'"),
        ([{"role": "assistant", "content": 3}], None, "role and content"),
        ([{"role": "assistant", "tool_calls": "f()"}], None, "tool_calls that are no list"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], None, "no JSON"),
        (SAID, "{", "its tools are no JSON list"), (SAID, {"a": 1}, "its tools are no list"),
        ([{"role": "assistant", "content": "a", "weight": 0}], None, "no message of the role"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_said(cell, tools, message):
    with pytest.raises(ChatFault, match=message):
        Chat.of(cell, tools, needs_reply=True)


def test_a_template_that_does_not_compile_is_one_line(template):
    with pytest.raises(InputError, match=r"the chat template of .* does not compile: line 1: unexpected '}'"):
        template("{% for m in messages %}{{ m['content'] }{% endfor %}")


def rows_of(*chats: object, tools: list | None = None) -> datasets.Dataset:
    columns = {"messages": list(chats)} | ({} if tools is None else {"tools": tools})
    features = datasets.Features(dict.fromkeys(columns, datasets.Json()))
    stored = {name: [json.dumps(cell) for cell in cells] for name, cells in columns.items()}
    return datasets.Dataset.from_dict(stored, features=features)


def test_rows_that_the_template_cannot_render_are_named_or_skipped(template):
    template(GEMMA)
    bad = turns(("system", "x"), ("user", "a"), ("assistant", "b"))
    rows, task = rows_of(SAID, bad, SAID, bad), CausalLMTask(TASK)
    with pytest.raises(InputError, match=r"rows\.csv: row 2: .*System role not supported \(2 bad rows of 4: 2, 4\)"):
        usable(task, rows, places("rows.csv", 4), more=[template_check(task, tiny_lm.tokenizer())])
    assert len(usable(task, rows, places("rows.csv", 4), "skip", more=[template_check(task, tiny_lm.tokenizer())])) == 2


def test_pairs_rendered_as_chats_are_checked_too(template):
    template(GEMMA.replace("'user') !=", "'system') =="))
    task = CausalLMTask(CausalLM(kind="causal_lm", prompt="p", completion="c", chat=True))
    rows = datasets.Dataset.from_dict({"p": ["a"], "c": ["b"]})
    with pytest.raises(InputError, match=r"row 1: .*roles must alternate"):
        usable(task, rows, places("rows.csv", 1), more=[template_check(task, tiny_lm.tokenizer())])


def test_a_column_of_tools_is_used_or_left_out_on_purpose_only(template):
    template(CHAT_ML)
    rows = rows_of(SAID, SAID, tools=[TOOLS, None])
    with pytest.raises(InputError, match=r"task\.tools: rows\.csv has a column 'tools' that the recipe does not name"):
        checked(CausalLMTask(TASK), rows)
    ignored = CausalLM(kind="causal_lm", messages="messages", tools=None)
    assert checked(CausalLMTask(ignored), rows).column_names == ["messages"]
    kept = checked(CausalLMTask(WITH_TOOLS), rows)
    found = CausalLMTask(WITH_TOOLS).encode(kept[:], tiny_lm.tokenizer(), 512)
    assert found["num_tokens"][0] > found["num_tokens"][1] + 40
    assert found["num_targets"][0] == found["num_targets"][1]
    assert checked(CausalLMTask(TASK), rows_of(SAID, tools=[None])).column_names == ["messages"]
