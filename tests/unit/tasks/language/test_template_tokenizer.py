"""Chats of a teacher in a GGUF file are rendered by the template in its header, before anything is converted."""

from __future__ import annotations

import pytest
import yaml
from support import commands, tiny_lm
from support.gguf_header import header

from distilpeft.data.sources import Source
from distilpeft.models import loading
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.language.chats import Chat
from distilpeft.tasks.language.template_tokenizer import template_tokenizer
from distilpeft.tasks.language.templates import Template

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ bos_token }}{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)


@pytest.fixture
def never_converted(monkeypatch):
    """A conversion is a failure."""

    def fail(source: Source) -> Source:
        raise AssertionError(f"converted {source.name}")

    monkeypatch.setattr(loading, "_from_gguf", fail)


def recipe(folder, rows, content):
    """A recipe on chats for a teacher in a GGUF file of this content."""
    (folder / "base.gguf").write_bytes(content)
    tiny_lm.write_jsonl(folder / "rows.jsonl", rows)
    settings = {
        "task": {"kind": "causal_lm", "messages": "messages"}, "student": {"from_teacher": {"first": 1}},
        "teacher__model": str(folder / "base.gguf"),
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_lm.recipe_tree(folder, **settings)))
    return folder / "tiny.yaml"


@pytest.mark.usefixtures("never_converted")
@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_chat_that_the_template_in_a_header_cannot_render_is_named(tmp_path, capsys, verb):
    rows = tiny_lm.chats(20)
    rows[6] = {"messages": [*rows[6]["messages"], {"role": "tool", "content": "3"}, rows[6]["messages"][1]]}
    path = recipe(tmp_path, rows, header(template=TEMPLATE))
    assert commands.run(path, verb=verb) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "rows.jsonl: row 7: the chat template of" in said
    assert "base.gguf does not render it: no tools here" in said


@pytest.mark.usefixtures("never_converted")
def test_turns_and_their_ends_are_found_with_the_special_tokens_of_the_header(tmp_path):
    path = recipe(tmp_path, tiny_lm.chats(20), header(template=TEMPLATE))
    tokenizer = template_tokenizer(load_recipe(path), download=False)
    assert tokenizer is not None
    chat = Chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])
    text, spans = Template(tokenizer).rendered(chat, everything=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert [text[begin:end] for begin, end in spans] == ["yes<|im_end|>"]


@pytest.mark.usefixtures("never_converted")
def test_a_header_without_a_template_is_refused_and_one_that_cannot_be_read_is_left_to_the_run(tmp_path, capsys):
    path = recipe(tmp_path, tiny_lm.chats(20), header())
    assert commands.run(path, verb="check") == 2
    assert "base.gguf has no chat template" in " ".join(capsys.readouterr().err.split())
    path = recipe(tmp_path, tiny_lm.chats(20), b"GGUF")
    assert template_tokenizer(load_recipe(path), download=False) is None
