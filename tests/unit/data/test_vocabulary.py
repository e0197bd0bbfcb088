"""Two tokenizers: when they read ids alike, and the one line that says where they do not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support import tiny, tiny_lm
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distilpeft.data.vocabulary import Vocabulary, check_same
from distilpeft.errors import InputError

WORDS = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "d": 4}


def vocabulary(name: str = "one", tokens: dict[str, int] = WORDS, template: str | None = None, **special):
    return Vocabulary(name, tokens, {"bos_token": None, "eos_token": "<eos>", "unk_token": None, **special}, template)


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny_lm.tokenizer])
def test_a_saved_tokenizer_reads_the_same_without_transformers(tmp_path, make):
    make().save_pretrained(str(tmp_path))
    saved = Vocabulary.of_folder("x", tmp_path)
    assert saved == Vocabulary.of_tokenizer("x", make())
    check_same(saved, Vocabulary.of_tokenizer("y", make()), chat=True)


def test_reading_a_folder_imports_neither_torch_nor_transformers(tmp_path):
    tiny_lm.tokenizer().save_pretrained(str(tmp_path))
    code = (
        "import sys; from pathlib import Path; from distilpeft.data.vocabulary import Vocabulary\n"
        f"found = Vocabulary.of_folder('x', Path({str(tmp_path)!r}))\n"
        "print(len(found.tokens), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(tiny_lm.tokenizer())), "False", "False"]


def test_a_folder_without_a_tokenizer_is_not_one(tmp_path):
    assert Vocabulary.of_folder("x", tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        Vocabulary.of_folder("x", tmp_path)


def test_special_tokens_written_as_objects_and_templates_by_name_are_understood(tmp_path):
    tiny_lm.tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    settings = {"eos_token": {"content": "<|end|>"}, "bos_token": None, "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = Vocabulary.of_folder("x", tmp_path)
    assert found.special == {"bos_token": None, "eos_token": "<|end|>", "unk_token": None}
    assert found.chat_template == "D"


def test_the_same_size_is_not_the_same_tokenizer():
    """Trap 12."""
    swapped = {**WORDS, "b": 3, "c": 2}
    message = r"student: two reads token 2 as 'c', the teacher \(one\) as 'b' \(2 such ids\); soft targets over tokens"
    with pytest.raises(InputError, match=message):
        check_same(vocabulary(), vocabulary("two", swapped), chat=False)


def test_a_token_under_two_ids_is_found_though_neither_id_is_taken_twice():
    with pytest.raises(InputError, match=r"student: two reads token 4 as None, the teacher \(one\) as 'd'"):
        check_same(
            vocabulary(), vocabulary("two", {**{t: i for t, i in WORDS.items() if t != "d"}, "d": 9}), chat=False
        )


@pytest.mark.parametrize("extra", [{"e": 5}, {"e": 7, "f": 9}])
def test_tokens_that_only_one_side_has_are_padding_to_the_other(extra):
    """Trap 11: sizes may differ inside one family."""
    check_same(vocabulary(), vocabulary("two", WORDS | extra), chat=False)
    check_same(vocabulary("two", WORDS | extra), vocabulary(), chat=False)


def test_vocabularies_that_share_next_to_nothing_are_refused_though_no_id_clashes():
    with pytest.raises(InputError, match=r"share 1 tokens"):
        check_same(vocabulary(), vocabulary("two", {"<eos>": 0, "x": 10, "y": 11, "z": 12}), chat=False)


def test_special_tokens_must_agree_unless_the_teachers_tokenizer_is_taken():
    other = vocabulary("two", eos_token="d")
    with pytest.raises(
        InputError, match=r"the eos_token of two is 'd', the teacher's \(one\) '<eos>'; student\.tokenizer"
    ):
        check_same(vocabulary(), other, chat=False)
    check_same(vocabulary(), other, chat=False, tokens_only=True)


def test_templates_must_agree_where_rows_are_chats():
    one, two = vocabulary(template="<u>{{ x }}\n"), vocabulary("two", template="<u>{{ y }}")
    with pytest.raises(
        InputError, match=r"differs from the teacher's from character 6 on: 'y }}' against 'x }}'; student"
    ):
        check_same(one, two, chat=True)
    with pytest.raises(InputError, match=r"from character 0 on: none at all against '<u>"):
        check_same(one, vocabulary("two"), chat=True)
    check_same(one, two, chat=False)
    check_same(one, two, chat=True, tokens_only=True)
    check_same(one, vocabulary("two", template="<u>{{ x }}"), chat=True)


def test_large_vocabularies_are_compared_token_by_token():
    large = {f"t{i}": i for i in range(151_643)}
    check_same(vocabulary(tokens=large), vocabulary("two", {**large, "extra": 151_700}), chat=False)
    with pytest.raises(InputError, match="reads token 150000 as 't150001'"):
        check_same(
            vocabulary(tokens=large), vocabulary("two", {**large, "t150000": 150_001, "t150001": 150_000}), chat=False
        )


def test_names_that_share_one_id_are_no_difference():
    aliased = {"<eos>": 0, "a": 1, "b": 2, "B": 2, "c": 3, "d": 4}
    turned = dict(reversed(aliased.items()))
    check_same(vocabulary(tokens=aliased), vocabulary("two", turned | {"e": 5}), chat=False)
    check_same(vocabulary(), vocabulary("two", aliased), chat=False)
    check_same(vocabulary(tokens=aliased), vocabulary("two"), chat=False)


def test_an_alias_that_is_a_token_of_its_own_elsewhere_is_named():
    with pytest.raises(InputError, match=r"two reads token 2 as 'd', the teacher \(one\) as 'b'"):
        check_same(vocabulary(), vocabulary("two", {"<eos>": 0, "a": 1, "b": 2, "d": 2, "c": 3}), chat=False)


@pytest.mark.parametrize("decoder", [{}, {"added_tokens_decoder": {}}], ids=["older layout", "newer layout"])
@pytest.mark.parametrize("eos", [None, "<|pad|>"])
def test_two_files_that_differ_over_a_special_token_are_read_as_transformers_reads_them(tmp_path, decoder, eos):
    tiny_lm.tokenizer().save_pretrained(str(tmp_path))
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("added_tokens_decoder", None)
    config.write_text(json.dumps(settings | decoder | {"eos_token": eos}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|user|>"}))
    loaded = Vocabulary.of_tokenizer("x", AutoTokenizer.from_pretrained(str(tmp_path)))
    assert Vocabulary.of_folder("x", tmp_path).special == loaded.special


def test_a_template_in_a_json_file_of_its_own_is_read(tmp_path):
    tiny_lm.tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert Vocabulary.of_folder("x", tmp_path).chat_template == "J"


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_a_damaged_file_beside_the_tokenizer_is_refused_by_name(tmp_path, file):
    tiny_lm.tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / file).write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=rf"{file}: cannot be read"):
        Vocabulary.of_folder("x", tmp_path)


@pytest.mark.parametrize("template", [["x"], [{"x": 1}], 3])
def test_a_template_of_another_form_is_none(tmp_path, template):
    tiny_lm.tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    assert Vocabulary.of_folder("x", tmp_path).chat_template is None


def test_a_byte_level_vocabulary_that_was_trained_and_extended_reads_the_same_from_its_folder(tmp_path):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["the film was fine, the story was dull", "naïve — 日本語 🙂"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], eos_token=special[1])
    made.add_tokens(["<added>"])
    made.save_pretrained(str(tmp_path))
    assert Vocabulary.of_folder("x", tmp_path) == Vocabulary.of_tokenizer("x", made)
