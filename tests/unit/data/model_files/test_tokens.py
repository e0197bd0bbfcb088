"""What tokenizers know of texts, and which of their tokens have no embedding, from their files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from distilpeft.data.model_files.tokens import (
    Words,
    check_tokenizer_files,
    embedding_rows,
    longest_text,
    refuse_unreadable,
    share_of,
    strings,
    unembedded,
    unknown_share,
)
from distilpeft.data.sources import Source
from distilpeft.errors import InputError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder with the tiny tokenizer and a configuration that fits it."""
    tiny.tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(tiny.WORDS)}))
    return tmp_path


def source(folder: Path, **more: object) -> Source:
    return Source("base", folder, **more)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "source.spm",
             "tekken.json", "qwen.tiktoken", "bpe.codes"],
)  # fmt: skip
def test_any_file_with_a_vocabulary_will_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    check_tokenizer_files(source(tmp_path), "teacher.model")


@pytest.mark.parametrize("settings", [None, {}, {"tokenizer_class": "BertTokenizer", "model_max_length": 512}])
def test_a_folder_without_one_is_refused(tmp_path, settings):
    """transformers makes a tokenizer of five special tokens out of it: every word is unknown."""
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match=rf"^student\.model: {tmp_path} has no tokenizer files \(tokenizer\.json, vocab"
    ):
        check_tokenizer_files(source(tmp_path), "student.model")


@pytest.mark.parametrize(
    "settings", [{"tokenizer_class": "ByT5Tokenizer"}, {"auto_map": {"AutoTokenizer": ["own.Own", None]}}]
)
def test_tokenizers_of_bytes_and_of_own_code_need_none(tmp_path, settings):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    check_tokenizer_files(source(tmp_path), "teacher.model")


def test_an_adapters_folder_may_lack_one_if_its_base_has_it(tmp_path, folder):
    (tmp_path / "adapter").mkdir()
    check_tokenizer_files(source(folder, adapter=tmp_path / "adapter"), "teacher.model")


@pytest.mark.parametrize(("given", "expected"), [(64, 64), (None, None), (1e30, int(1e30))])
def test_the_tokenizers_own_limit_is_read(folder, given, expected):
    settings = {} if given is None else {"model_max_length": given}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert longest_text(source(folder)) == expected


def share(texts: list[str], folder: Path) -> tuple[float, float, str]:
    words = Words.of(source(folder))
    assert words is not None
    return unknown_share(texts, words)


def test_known_words_are_known(folder):
    assert share([text for text, _ in tiny.rows(20)], folder) == (0.0, 0.0, "")


def test_the_share_is_of_characters_and_blanks_do_not_count(folder):
    lost, dropped, first = share(["good  xyz", "bad abcde"], folder)
    assert (lost, dropped, first) == (8 / 15, 0.0, "xyz")


def test_runs_of_unknown_letters_count_each_letter(tmp_path):
    """SentencePiece makes one unknown token of a whole word in another script, and one of the blank before it."""
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁good", -2.0)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.save(str(tmp_path / "tokenizer.json"))
    lost, _, first = share(["דוגמה טובה", "good"], tmp_path)
    assert lost == pytest.approx(9 / 13)
    assert "דוגמה" in first


def test_letters_that_vanish_count_as_well(tmp_path):
    core = Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # without an unknown token others are left out
    core.save(str(tmp_path / "tokenizer.json"))
    assert share(["ab", "xyzw"], tmp_path) == (0.0, 4 / 6, "")


def test_letters_that_a_normalizer_changes_are_known(tmp_path):
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "cafe": 1}, unk_token="[UNK]"))
    core.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.save(str(tmp_path / "tokenizer.json"))
    assert share(["Café CAFE"], tmp_path) == (0.0, 0.0, "")


def test_no_text_at_all_is_nothing_unknown():
    assert share_of([], 1) == (0.0, 0.0, "")


def test_a_tokenizer_that_knows_hardly_anything_is_refused(folder):
    with pytest.raises(
        InputError, match=r"^teacher\.model: the tokenizer of base does not know 60% of the characters of the first 5 "
        r"training texts \(such as 'xyz'\); take a model for texts like these",
    ):  # fmt: skip
        refuse_unreadable((0.5, 0.1, "xyz"), source(folder), "teacher.model", 5)


def test_a_few_unknown_words_are_a_line(folder):
    line = refuse_unreadable((0.034, 0.0, "xyz"), source(folder), "student.model", 200)
    assert line.startswith("student.model: the tokenizer of base does not know 3.4% of the characters of the first 200")
    assert refuse_unreadable((0.005, 0.0, "xyz"), source(folder), "student.model", 200) is None


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        Words.of(source(tmp_path))


def widen(folder: Path, *tokens: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(str(folder))


def test_a_tokenizer_that_fits_its_embeddings_misses_none(folder):
    assert unembedded(source(folder), source(folder)) is None


def test_a_text_with_an_added_token_is_refused_with_both_sizes(folder):
    widen(folder, "pizza", "pasta")
    missing = unembedded(source(folder), source(folder))
    size = len(tiny.WORDS)
    assert missing.fault(["good film"], 16) is None
    assert missing.fault(["good film", "a pasta film"], 16) == (
        f"holds the token 'pasta' (id {size + 1}), for which base has no embedding: its tokenizer has {size + 2} "
        f"tokens, its embedding matrix {size} rows (resize_token_embeddings adds them)"
    )


def test_a_token_behind_the_cut_is_never_read(folder):
    widen(folder, "pizza")
    missing = unembedded(source(folder), source(folder))
    assert missing.fault(["good good good pizza"], 4) is None
    assert missing.fault(["good good good pizza"], None) is not None


@pytest.mark.parametrize(
    ("config", "overrides", "rows"),
    [
        ({"vocab_size": 30}, {}, 30),
        ({"vocab_size": 30}, {"vocab_size": 40}, 40),
        ({"text_config": {"vocab_size": 50}}, {}, 50),
        ({"encoder": {"vocab_size": 50}, "decoder": {"vocab_size": 40}}, {}, 40),
        ({}, {}, None),
    ],
    ids=["plain", "overridden", "nested", "two sides", "unknown"],
)
def test_rows_of_embeddings_come_from_the_configuration(folder, config, overrides, rows):
    (folder / "config.json").write_text(json.dumps(config))
    assert embedding_rows(source(folder), overrides) == rows


def test_embeddings_that_an_adapter_brings_are_the_models(tmp_path, folder, safetensors_bytes):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(
        safetensors_bytes({"base_model.model.model.embed_tokens.weight": (33, 8)})
    )
    assert embedding_rows(source(folder, adapter=adapter)) == 33


def test_all_texts_of_a_cell_are_found():
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two", "calls": None}]
    assert list(strings(chat)) == ["user", "one", "assistant", "two"]
    assert list(strings(["a", ["b"], None, 3])) == ["a", "b"]
