"""What shows of a model's tokenizer only once transformers has loaded it; all before any weight is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from support import commands, tiny, tiny_lm
from transformers import GPT2Config, GPT2LMHeadModel

from distilpeft.models import loading


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded first")

    monkeypatch.setattr(loading, "load_base", refuse)


def refused(recipe: Path, capsys) -> str:
    """What a run says of a recipe that `check` finds nothing wrong with."""
    assert commands.run(recipe, verb="check") == 0
    assert commands.run(recipe, "--until", "teacher") == 2
    return capsys.readouterr().err.splitlines()[-1]


def write_old_tokenizer(folder: Path, words: list[str], *added: str) -> None:
    """Files as they were before there was a tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokens = {str(len(words) + index): {"content": token, "special": False} for index, token in enumerate(added)}
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 64, "added_tokens_decoder": tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_texts_that_an_old_tokenizer_does_not_know_are_refused(tmp_path, capsys):
    recipe = commands.workspace(tmp_path, 40)
    write_old_tokenizer(tmp_path / "base", [*tiny.WORDS[:5], "the"])
    line = refused(recipe, capsys)
    assert line.startswith(f"error: teacher.model: the tokenizer of {tmp_path / 'base'} does not know 9")


def test_a_token_of_an_old_tokenizer_without_an_embedding_is_refused(tmp_path, capsys):
    recipe = commands.workspace(tmp_path, 40)
    write_old_tokenizer(tmp_path / "base", tiny.WORDS, "[pizza]")
    rows = (tmp_path / "rows.csv").read_text().replace("good", "good [pizza]")
    (tmp_path / "rows.csv").write_text(rows)
    line = refused(recipe, capsys)
    assert "of train holds the token '[pizza]' (id 25), for which" in line
    assert "its tokenizer has 26 tokens, its embedding matrix 25 rows" in line


def test_tokens_that_only_a_chat_template_writes_are_looked_for_in_the_encoded_rows(tmp_path, capsys):
    """A usual mistake: tokens of a chat format are added to the tokenizer of a base, and no rows to its embeddings."""
    recipe = commands.language_workspace(tmp_path, mode="online")
    words = tiny_lm.tokenizer.__wrapped__()
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    words.chat_template = "".join(
        part if number == 0 else f"<|im_start|>{part}"
        for number, part in enumerate(re.split(r"(?=<\|(?:\{\{|assistant))", tiny_lm.TEMPLATE))
    )
    words.save_pretrained(str(tmp_path / "base"))
    tree = yaml.safe_load(recipe.read_text())
    tree["task"] = {"kind": "causal_lm", "prompt": "prompt", "completion": "completion", "chat": True}
    recipe.write_text(yaml.safe_dump(tree))
    line = refused(recipe, capsys)
    assert line.startswith("error: teacher.model: row 0 of train holds the token '<|im_start|>' (id 261), for which")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_whose_prompts_leave_no_room_for_a_target_is_refused(tmp_path, capsys, split):
    recipe = commands.language_workspace(tmp_path, mode="online")
    tree = yaml.safe_load(recipe.read_text())
    names = ("train", "validation", "test")
    tree["data"] = {"source": {name: str(tmp_path / f"{name}.jsonl") for name in names}, "max_tokens": 40}
    tree["data"] |= {name: name for name in names}
    recipe.write_text(yaml.safe_dump(tree))
    for name in names:
        long = " and so on" * 10 if name == split else ""
        tiny_lm.write_jsonl(
            tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}{long}", "completion": "yes"} for n in range(8)]
        )
    line = refused(recipe, capsys)
    assert line.startswith(f"error: data.max_tokens: no {split} row has a target within 40 tokens")
    for name in names:
        tiny_lm.write_jsonl(tmp_path / f"{name}.jsonl", [
            {"prompt": f"{name} {n}", "completion": "" if name == split else "yes"} for n in range(8)])  # fmt: skip
    assert refused(recipe, capsys).endswith(f"no {split} row has anything to learn: every completion is empty")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "benchmark.new_tokens: 16 tokens written after a text of 64 are more than the 64 positions of"),
        ({"benchmark.lengths": "[8]", "evaluate.sample_tokens": "40"}, "evaluate.sample_tokens: 40 tokens written"),
    ],
    ids=["when it is timed", "in the samples"],
)
def test_a_model_with_a_table_needs_positions_for_what_it_writes(tmp_path, capsys, changes, message):
    recipe = commands.language_workspace(tmp_path, mode="online")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
    config = GPT2Config(vocab_size=len(tiny_lm.tokenizer()), pad_token_id=0, **sizes)
    GPT2LMHeadModel(config).save_pretrained(str(tmp_path / "base"))
    tree = yaml.safe_load(recipe.read_text())
    tree["data"]["max_tokens"] = 64
    tree["teacher"]["quantize"] = "none"
    tree["student"] = {"from_teacher": {"layers": [0]}}
    recipe.write_text(yaml.safe_dump(tree))
    overrides = [f"--set={key}={value}" for key, value in changes.items()]
    assert commands.run(recipe, *overrides, "--until", "teacher") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
