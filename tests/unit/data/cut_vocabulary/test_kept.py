"""Which tokens are kept, against the library tokenizers itself: texts that were counted are encoded as before."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from distilpeft.data.cut_vocabulary import kept, rewrite
from distilpeft.errors import InputError
from distilpeft.recipe.student import Vocabulary

SYLLABLES = [
    "ba",
    "na",
    "ko",
    "ri",
    "tan",
    "es",
    "ma",
    "lo",
    "an",
    "ak",
    "sto",
    "nab",
    "or",
    "rib",
    "é",
    "ñu",
    "дом",
    "語",
]


def texts(count: int, seed: int, syllables: list[str] = SYLLABLES) -> list[str]:
    """Words of syllables that overlap, so that pieces compete."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 5))) for _ in range(60)]
    return [", ".join(rng.choices(words, k=rng.randint(1, 12))) + rng.choice(".!?") for _ in range(count)]


CORPUS = texts(300, 1) + texts(300, 2)


def wordpiece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return core


def bytelevel(*, ignore_merges: bool = False) -> Tokenizer:
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.add_special_tokens(["<|end|>"])
    core.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return core


def with_ends() -> Tokenizer:
    """Like CLIP's: a mark at the end of words."""
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False),
    )
    return core


def with_bytes() -> Tokenizer:
    """Like Llama 2's: characters, and bytes for those that are no piece."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    merges = [tuple(merge) for merge in model["merges"]]
    core = Tokenizer(
        models.BPE({token: at for at, token in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return core


def unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    core.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    core.add_special_tokens(["<mask>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return core


def wordlevel() -> Tokenizer:
    core = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return core


KINDS = {
    "WordPiece": wordpiece, "bytes": bytelevel, "whole words": lambda: bytelevel(ignore_merges=True),
    "ends": with_ends, "byte fallback": with_bytes, "Unigram": unigram, "WordLevel": wordlevel,
}  # fmt: skip


@pytest.fixture(scope="module", params=list(KINDS))
def core(request) -> Tokenizer:
    return KINDS[request.param]()


def cut(core: Tokenizer, counted: list[str], named: tuple[int, ...] = (), **wanted: int) -> Tokenizer:
    spec = json.loads(core.to_str())
    ids = np.concatenate([np.array(encoded.ids, np.int64) for encoded in core.encode_batch(counted)])
    named = {*named, *rewrite.framing_ids(spec["post_processor"])}
    kept_K = kept.kept_ids(spec, np.bincount(ids), named, Vocabulary(**{"from": "data"}, **wanted))
    return Tokenizer.from_str(json.dumps(rewrite.cut(spec, kept_K, "it")))


def pieces(core: Tokenizer, some: list[str]) -> list[list[str]]:
    return [encoded.tokens for encoded in core.encode_batch(some)]


COUNTED = [*texts(25, 1), "", "  ", "東 ☃ Ω", "ba東na"]  # also what the tokenizers do not know


def test_every_counted_text_has_the_same_pieces_and_the_rest_is_gone(core):
    found = cut(core, COUNTED)
    assert found.get_vocab_size() < 0.9 * core.get_vocab_size()
    assert pieces(found, COUNTED) == pieces(core, COUNTED)
    assert sorted(found.get_vocab(with_added_tokens=True).values()) == list(range(found.get_vocab_size()))


def test_the_new_ids_are_in_the_order_of_the_old_ones(core):
    before, after = core.get_vocab(), cut(core, COUNTED).get_vocab()
    by_id = sorted(after, key=after.get)
    assert by_id == sorted(by_id, key=before.get)


def test_other_texts_of_the_same_scripts_are_never_unknown_where_they_were_not(core):
    if '"WordLevel"' in core.to_str():
        pytest.skip("words are whole there")
    found, others = cut(core, texts(40, 1)), texts(200, 2)
    spec = json.loads(core.to_str())["model"]
    unknown = spec.get("unk_token") or "<unk>"
    before, after = (Counter(token for row in pieces(one, others) for token in row)[unknown] for one in (core, found))
    assert pieces(found, others) != pieces(core, others), "they hold pieces that were not counted"
    assert after <= before


def test_texts_whose_pieces_are_all_kept_at_a_smaller_size_are_encoded_as_before(core):
    if '"WordLevel"' in core.to_str():
        pytest.skip("nothing to fall back to")
    whole = cut(core, COUNTED)
    found = cut(core, COUNTED, max_size=whole.get_vocab_size() - 10)
    assert whole.get_vocab_size() - 20 < found.get_vocab_size() <= whole.get_vocab_size() - 10
    gone = whole.get_vocab().keys() - found.get_vocab().keys()
    same = [text for text in COUNTED if not gone & set(pieces(core, [text])[0])]
    assert 0 < len(same) < len(COUNTED)
    assert pieces(found, same) == pieces(core, same)
    unknown = json.loads(core.to_str())["model"].get("unk_token") or "<unk>"
    before, after = (Counter(token for row in pieces(one, COUNTED) for token in row)[unknown] for one in (core, found))
    assert after <= before, "every piece has something to fall back to"


def test_a_smaller_size_drops_the_least_frequent_pieces_first():
    core = wordpiece()
    counts = Counter(index for encoded in core.encode_batch(COUNTED) for index in encoded.ids)
    whole = cut(core, COUNTED)
    found = cut(core, COUNTED, max_size=whole.get_vocab_size() - 10)
    gone = whole.get_vocab().keys() - found.get_vocab().keys()
    left = [piece for piece in found.get_vocab() if len(piece.removeprefix("##")) > 1 and not piece.startswith("[")]
    assert len(gone) == 10
    assert max(counts[core.token_to_id(piece)] for piece in gone) <= min(
        counts[core.token_to_id(piece)] for piece in left
    )


def test_pieces_below_the_least_count_are_dropped():
    core = wordpiece()
    ids = Counter(index for encoded in core.encode_batch(COUNTED) for index in encoded.ids)
    found = cut(core, COUNTED, min_count=4)
    for piece, index in core.get_vocab().items():
        if len(piece.removeprefix("##")) > 1 and piece not in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
            assert (piece in found.get_vocab()) == (ids[index] >= 4)


def test_merges_on_the_way_to_a_piece_stay_with_what_they_give():
    """By hand: `abc` may come out of `a` + `bc` or of `ab` + `c`; merging goes by way of `ab`."""
    vocabulary = {token: at for at, token in enumerate(["a", "b", "c", "d", "ab", "bc", "abc", "cd", "bcd"])}
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"), ("c", "d"), ("b", "cd")]
    core = Tokenizer(models.BPE(vocabulary, merges))
    found = json.loads(cut(core, ["abc"]).to_str())["model"]
    assert found["merges"] == [["a", "b"], ["ab", "c"]]
    assert list(found["vocab"]) == ["a", "b", "c", "d", "ab", "abc"], "single characters stay"


def test_an_unknown_character_costs_as_much_as_before_in_a_unigram_model():
    """It costs 10 more than the lowest score, here of a piece that no text has: -50, so two pieces at -25 are better
    than an unknown character and a piece at -1; without that piece it would be -35.
    """
    scored = [("<unk>", 0.0), ("xy", -25.0), ("zw", -25.0), ("yzw", -1.0), ("~~~", -40.0)]
    core = Tokenizer(models.Unigram(scored, unk_id=0))
    assert core.encode("xyzw").ids == [1, 2]
    assert Tokenizer(models.Unigram(scored[:-1], unk_id=0)).encode("xyzw").ids == [0, 3]
    found = cut(core, ["xyzw", "yzw"])
    assert [encoded.ids for encoded in found.encode_batch(["xyzw", "yzw"])] == [[1, 2], [3]]


def test_letters_of_scripts_that_no_text_has_are_dropped_and_digits_and_signs_kept():
    letters = ["a", "b", "##b", "я", "##я", "東", "7", "##7", "€", "é", "あ"]
    core = Tokenizer(models.WordPiece({token: at for at, token in enumerate(["[UNK]", *letters])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    assert set(cut(core, ["a a"]).get_vocab()) == {"[UNK]", "a", "b", "##b", "7", "##7", "€", "é"}
    assert set(cut(core, ["a я"]).get_vocab()) == {"[UNK]", "a", "b", "##b", "7", "##7", "€", "é", "я", "##я"}


def test_a_size_below_what_must_stay_is_refused():
    with pytest.raises(InputError, match=r"student.vocabulary.max_size: 100 tokens are not enough for special .* 25\d"):
        cut(bytelevel(), COUNTED, max_size=100)
