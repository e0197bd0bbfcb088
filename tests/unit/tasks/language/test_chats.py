"""Chats as templates render them: what is learnt, written out by hand, and what cannot be rendered."""

from __future__ import annotations

import json

import datasets
import pytest
import tokenizers
from support import tiny_lm
from support.rows import checked, places
from transformers import PreTrainedTokenizerFast

from distilpeft.errors import InputError
from distilpeft.recipe.task import CausalLM
from distilpeft.tasks.checked_rows import usable
from distilpeft.tasks.language.causal_lm import CausalLMTask
from distilpeft.tasks.language.chats import Chat, ChatFault, tools_of
from distilpeft.tasks.language.templates import Template
from distilpeft.tasks.rows import template_check

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


def writing(call: str) -> str:
    """A template that writes each call so, as `f`."""
    calls = "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + call + "{% endfor %}"
    return LLAMA.replace("<|eot|>", calls + "<|eot|>")


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


def tokens_of(words: PreTrainedTokenizerFast, messages: object, tools: object = None) -> list[tuple[str, bool]]:
    """Each token of a chat, and whether it is a target."""
    found = CausalLMTask(WITH_TOOLS).encode({"messages": [messages], "tools": [tools]}, words, 4096)
    return list(zip(words.convert_ids_to_tokens(found["input_ids"][0]), found["target"][0], strict=True))


def words_with(template: str, end: str, *marks: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and these marks; only `end`, its end token, is among its special tokens by name."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core.model = tokenizers.models.BPE({token: at for at, token in enumerate([end, *marks, *alphabet])}, [])
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens([end, *marks])
    found = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, model_max_length=4096)
    found.chat_template = template
    return found


def by_hand(*pieces: tuple[bool, str | list[str]]) -> list[tuple[str, bool]]:
    """Tokens of pieces, each learnt or read: a list of marks, or text of which every letter is a token."""
    signs = {" ": "Ġ", "\n": "Ċ"}
    return [(signs.get(token, token), is_learnt) for is_learnt, piece in pieces for token in piece]


def test_of_chatml_with_tools_every_token_is_learnt_or_read_as_written_by_hand():
    """Traps 7, 37: the end of a turn is learnt with it, once, and the line break behind it is not."""
    start, end = ["<|im_start|>"], ["<|im_end|>"]
    words = words_with(CHAT_ML, "<|im_end|>", "<|im_start|>")
    assert tokens_of(words, CALLED, TOOLS) == by_hand(
        (False, start), (False, 'system\nTools: [{"type": "function", "function": {"name": "add"}}]'), (False, end),
        (False, "\n"), (False, start), (False, "user\nadd"), (False, end),
        (False, "\n"), (False, start), (False, "assistant\n"),
        (True, '<tool_call>add {"a": 1}</tool_call>'), (True, end),
        (False, "\n"), (False, start), (False, "user\n<tool_response>3</tool_response>"), (False, end),
        (False, "\n"), (False, start), (False, "assistant\n"), (True, "<think>1+2</think>three"), (True, end),
        (False, "\n"),
    )  # fmt: skip


def test_the_end_of_a_turn_may_be_an_added_token_that_is_not_the_end_token():
    """Gemma's: its end token is <eos>, and its turns end in <end>."""
    start, end = ["<start>"], ["<end>"]
    messages = turns(("user", "hi"), ("assistant", "yes "))
    assert tokens_of(words_with(GEMMA, "<eos>", "<start>", "<end>"), messages) == by_hand(
        (False, start), (False, "user\nhi"), (False, end), (False, "\n"),
        (False, start), (False, "model\n"), (True, "yes"), (True, end), (False, "\n"),
    )  # fmt: skip


def test_of_a_template_like_llamas_each_answer_is_learnt_with_its_end():
    words = words_with(LLAMA, "<|eot|>", "<|begin|>", "<|start|>", "<|stop|>")
    assert tokens_of(words, turns(("system", "be kind"), ("user", "hi"), ("assistant", "yes "))) == by_hand(
        (False, ["<|begin|>", "<|start|>"]), (False, "system"), (False, ["<|stop|>"]), (False, "\n\nbe kind"),
        (False, ["<|eot|>", "<|start|>"]), (False, "user"), (False, ["<|stop|>"]), (False, "\n\nhi"),
        (False, ["<|eot|>", "<|start|>"]), (False, "assistant"), (False, ["<|stop|>"]), (False, "\n\n"),
        (True, "yes"), (True, ["<|eot|>"]),
    )  # fmt: skip


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


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}', '{"a":1}'])
@pytest.mark.parametrize(
    "write",
    [
        "{{ f.name }} {{ f.arguments | tojson }}",
        "{{ f.name + ' ' + f.arguments }}",  # DeepSeek's joins texts
        "{{ f.name }} {{ f.arguments }}",  # would print Python's quotes
    ],
)
def test_arguments_are_written_as_json_whatever_the_file_and_the_template_have(template, write, arguments, flat):
    call = {"name": "add", "arguments": arguments}
    messages = [CALLED[0], {"role": "assistant", "content": "", "tool_calls": [call if flat else {"function": call}]}]
    text = writing(write).replace("c.function %}", "c.function if c.function else c %}")
    assert learnt(template(text), messages) == ['add {"a": 1}<|eot|>']


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_may_have_no_arguments(template, arguments):
    messages = [CALLED[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    assert learnt(template(writing("{{ f.name }} {{ f.arguments | tojson }}")), messages) == ["f {}<|eot|>"]


def test_a_null_that_json_text_gives_to_an_argument_is_kept(template):
    call = {"function": {"name": "f", "arguments": {"a": None}}}
    messages = json.dumps([CALLED[0], {"role": "assistant", "content": None, "name": None, "tool_calls": [call]}])
    assert learnt(template(writing("{{ f.name }} {{ f.arguments | tojson }}")), messages) == ['f {"a": null}<|eot|>']


def test_thoughts_that_a_template_writes_in_its_own_way_are_not_missed(template):
    text = LLAMA.replace("m['content'] | trim", "m['content'].replace('</think>', '</think>\n\n') | trim")
    messages = turns(("user", "a"), ("assistant", "<think>so</think>b"))
    assert learnt(template(text), messages) == ["<think>so</think>\n\nb<|eot|>"]
    text = LLAMA.replace("m['content'] | trim", "'<think>' ~ m['content'].split('<think>')[-1] | trim")
    messages = turns(("user", "<think>a"), ("assistant", "<think>so</think>b"))
    assert learnt(template(text), messages) == ["<think>so</think>b<|eot|>"]


@pytest.mark.parametrize("cell", [None, "", " ", [], "[]", "null"])
def test_a_row_may_have_no_tools(cell):
    assert tools_of(cell) is None


def test_a_description_of_a_tool_may_be_json_text():
    assert tools_of([json.dumps(TOOLS[0])]) == TOOLS


def test_earlier_thoughts_may_be_dropped_where_the_turn_is_only_read(template):
    text = LLAMA.replace("m['content'] | trim", "(m.reasoning_content if loop.last) ~ m['content'] | trim")
    messages = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "no", "so"
    with pytest.raises(ChatFault, match=r"earlier turns differently .*weight: 0 on the replies before it"):
        learnt(template(text), messages)
    messages[1]["weight"] = 0
    assert learnt(template(text), messages) == ["sod<|eot|>"]


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
        (LLAMA, CALLED[:2], None, "leaves out its tool_calls; use a model whose template"),
        (LLAMA, SAID, TOOLS, "leaves out its tools"),
        (LLAMA, [*turns(("user", "a")), {"role": "assistant", "content": "b", "reasoning_content": "c"}], None,
         "leaves out its reasoning_content"),
        (CHAT_ML.replace("m.role == 'tool'", "m.role == 'tol'").replace("{{ m.content }}{% for c", "{{ m.content if "
         "m.role != 'tool' }}{% for c"), CALLED, TOOLS, "leaves out messages of the role 'tool'"),
        (LLAMA.replace("m['content'] | trim", "m['text'] + ''"), SAID, None, "does not render it"),
        (LLAMA.replace("assistant<|stop|>\n\n{% endif", "assistant<|stop|>\n\n<think>{% endif"), SAID, None,
         "the generation prompt of .* ends in '.*<think>', and the rendered turn begins with '.*he'"),
        (LLAMA.replace("| trim", "if loop.last else '...'"), SAID, None, "renders earlier turns differently"),
        (writing("{{ f.name }}"), CALLED[:2], None, "leaves out the arguments of its tool_calls"),
        (LLAMA.replace("m['content']", "m['content'].split('</think>')[-1]"),
         turns(("user", "a"), ("assistant", "<think>so</think>b")), None, "leaves out a part of '<think>so</think>b'"),
        (LLAMA.replace("m['content'] | trim", "m['content'] if loop.first or m.role != 'system'"),
         turns(("system", "a"), ("user", "b"), ("system", "c"), ("assistant", "d")), None,
         "leaves out messages of the role 'system'"),
        ("{{ tools[0] | tojson }}" + LLAMA, turns(("user", "a"), ("assistant", "b")), [*TOOLS, {"name": "two"}],
         "leaves out its tools: 'two'"),
        (LLAMA, turns(("user", "a\ud800"), ("assistant", "b")), None, "half of a surrogate pair"),
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
        ([{"role": "assistant", "tool_calls": "f()"}], None, "tool_calls that are not a list"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], None, "not a JSON"),
        ("[" * 100_000, None, "no list of messages"), ([{**SAID[1], "weight": 0.5}], None, "holds the weight 0.5"),
        ([{**SAID[1], "weight": "0"}], None, "holds the weight '0'"),
        ([{"role": "assistant", "tool_calls": ["f()"]}], None, "a tool call that names no function"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}], None, "that names no function"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], None, "a JSON object: '.1.'"),
        (SAID, [1], "its tools are not a list of objects"), (SAID, ["add"], "its tools are not a list of objects"),
        (SAID, "{", "its tools are not a JSON list"), (SAID, {"a": 1}, "its tools are not a list"),
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
    for nothing in (None, "", [], "[]", "null"):
        assert checked(CausalLMTask(TASK), rows_of(SAID, tools=[nothing])).column_names == ["messages"]
