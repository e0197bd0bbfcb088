"""GGUF files of tiny models, read back by transformers' own reader; llama.cpp reads them in test_llama_cpp.py."""

from __future__ import annotations

import copy
import functools
import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from distilpeft.errors import InputError
from distilpeft.export.formats import gguf_file
from distilpeft.export.runtimes import load_exported
from distilpeft.recipe.export import FORMS

SPECIAL = ["<|pad|>", "<|end|>", "<|begin|>", "<|user|>", "<|assistant|>"]
PLAIN = "<think>"
TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
TEXTS = [
    "Plain words, then some more words.",
    "it's we'll THEY'RE I'd don'T",
    "0 12 345 6789 3.14159 1,000,000 x2 2x ½ Ⅷ ٣٤",
    "  two   three    spaces  12  and trailing   ",
    "lines\n\nand\r\nmore\n\n\n  indented\n\t\ttabs\t",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # note\n",
    "naïve café Ünïcödé — “quotes” … 日本語のテキスト Ελληνικά русский עברית العربية हिन्दी",
    "🙂👩‍👩‍👧‍👦🇫🇷 🏳️‍🌈",
    "<|user|>hi<|assistant|> <think> hm </think> yes<|end|>\n<|end|><|pad|>",
    "\u00a0no-break\u2003em\u200bzero\u3000wide",
    "!!!???;;;->>==<= #@$%^&*",
    " ",
    "a",
]
BEFORE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
AFTER = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = BEFORE + r"\p{N}{1,3}" + AFTER
SPLITS = {"qwen2": BEFORE + r"\p{N}" + AFTER, "llama-bpe": LLAMA3_SPLIT, "smaug-bpe": LLAMA3_SPLIT}
"""As the tokenizers of Qwen2 and Llama 3 have them."""


def split(pre):
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in SPLITS:
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"), plain])
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    assert pre == "gpt-2"
    return whole


@functools.cache
def tokenizer(pre="gpt-2", frame=""):
    """A byte-level tokenizer that has learned the texts; `frame` names what it puts around them."""
    core = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    core.pre_tokenizer, core.decoder = split(pre), decoders.ByteLevel()
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    core.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    core.add_tokens([PLAIN])
    if frame:
        ids = [(token, core.token_to_id(token)) for token in ("<|begin|>", "<|end|>")]
        core.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=frame, special_tokens=ids)]
        )
    named = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "bos_token": "<|begin|>", "unk_token": "<|user|>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def parsed(words):
    return json.loads(words.backend_tokenizer.to_str())


SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 512, "vocab_size": 700, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 20000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def config(kind=LlamaConfig, **changes):
    return kind(**{**SIZES, "tie_word_embeddings": True, **changes})


def build(settings, seed=0):
    """A model in which every weight matters: norms and biases are not left at one and zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = "norm" in name
            weight.normal_(float(norm), 0.3 if norm or weight.ndim == 1 else weight.shape[-1] ** -0.5)
    return model.eval()


def write(model, folder, kind="f32", words=None, name="tiny"):
    words = words or tokenizer()
    assert gguf_file.fault(model.config, parsed(words)) is None
    special = {role: getattr(words, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")}
    gguf_file.write(model, parsed(words), special, TEMPLATE, folder / "model.gguf", kind, name=name)
    return folder / "model.gguf"


def read(path, **options):
    found = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, **options
    )  # fmt: skip
    return found.eval()


def logits(model):
    ids = torch.randint(0, 500, (2, 200), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids).logits


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def field(path, key):
    found = gguf.GGUFReader(path).fields.get(key)
    return None if found is None else found.contents()


@pytest.mark.parametrize(
    "settings",
    [
        config(),
        config(tie_word_embeddings=False),
        config(head_dim=32),
        config(num_key_value_heads=4),
        config(MistralConfig, sliding_window=None, head_dim=24, tie_word_embeddings=False),
        config(Qwen2Config),
        config(Qwen2Config, tie_word_embeddings=False),
        config(Qwen3Config, head_dim=128),
    ],
    ids=["llama", "untied", "head_dim", "no_groups", "mistral", "qwen2", "qwen2_untied", "qwen3"],
)
def test_f32_is_read_back_as_the_same_function(settings, tmp_path):
    model = build(settings)
    path = write(model, tmp_path)
    found = read(path)
    for name in ("tie_word_embeddings", "max_position_embeddings", "vocab_size", "rms_norm_eps", "bos_token_id"):
        assert getattr(found.config, name) == pytest.approx(getattr(settings, name)), name
    assert ("output.weight" in tensors(path)) != settings.tie_word_embeddings
    expected = logits(model)
    assert expected.std() > 0.3, "logits that say something"
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [config(rope_parameters=LLAMA3, head_dim=32), config(Qwen3Config, head_dim=32), config(Qwen2Config)],
    ids=["llama3", "qwen3", "qwen2"],
)
def test_what_the_file_does_not_tell_transformers_comes_from_a_configuration_beside_it(settings, tmp_path):
    model = build(settings)
    path = write(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    found = read(path, config=AutoConfig.from_pretrained(tmp_path))
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-5)


def test_an_exported_folder_is_opened_with_its_configuration(tmp_path):
    model = build(config(rope_parameters=LLAMA3, head_dim=32))
    write(model, tmp_path).rename(tmp_path / FORMS["gguf-f32"].file)
    model.config.save_pretrained(str(tmp_path))
    manifest = {"format": "gguf-f32", "file": FORMS["gguf-f32"].file, "auto_class": "AutoModelForCausalLM"}
    found = load_exported(tmp_path, manifest, torch.device("cpu"))
    ids = torch.randint(5, 400, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_stretching_of_wavelengths_is_that_of_the_model(tmp_path):
    model = build(config(rope_parameters=LLAMA3, head_dim=32))
    found = tensors(write(model, tmp_path))["rope_freqs.weight"].data
    plain = build(config(head_dim=32)).model.rotary_emb.inv_freq
    np.testing.assert_allclose(plain.numpy() / found, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert found.dtype == np.float32
    assert (found[0], found[-1]) == pytest.approx((1.0, 8.0)), "short waves as they are, long ones 8 times longer"
    assert len(set(found)) > 2, "some between"
    assert "rope_freqs.weight" not in tensors(write(build(config()), tmp_path))


def test_a_name_of_a_run_does_not_turn_into_an_architecture(tmp_path):
    path = write(build(config()), tmp_path, name="mistral")
    assert AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).model_type == "llama"


def test_errors_grow_as_bits_go(tmp_path):
    model = build(config(tie_word_embeddings=False))
    expected, far = logits(model), {}
    for kind in gguf_file.KINDS:
        path = write(model, tmp_path, kind)
        far[kind] = float((logits(read(path)) - expected).abs().max())
        stored = {tensor.tensor_type.name for tensor in tensors(path).values() if len(tensor.shape) > 1}
        assert stored == ({kind.upper(), "Q8_0"} if kind[1] in "45" else {kind.upper()})
    assert (
        far["f32"]
        < 1e-5
        < far["f16"]
        < far["bf16"]
        < far["q8_0"]
        < far["q5_0"]
        < far["q4_0"]
        < 3 * float(expected.abs().max())
    )
    assert far["q8_0"] < far["q5_1"] < far["q4_1"]


@pytest.mark.parametrize(("kind", "halves"), [("q8_0", 1.0), ("q4_0", 2.0)])
def test_a_quantized_weight_is_within_half_a_step(kind, halves, tmp_path):
    """q4_0 has no step beyond +7: there the largest may be a whole step away."""
    model = build(config(Qwen2Config))  # whose rows stay where they are
    stored = tensors(write(model, tmp_path, kind))["blk.1.ffn_up.weight"]
    weight = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    back = gguf.dequantize(stored.data, stored.tensor_type)
    blocks = weight.reshape(-1, 32)
    size = gguf.GGML_QUANT_SIZES[stored.tensor_type][1]
    scale = np.abs(stored.data.reshape(-1, size)[:, :2].copy().view(np.float16).astype(np.float32))
    off = np.abs(back.reshape(-1, 32) - blocks)
    rounding = np.abs(blocks).max(-1, keepdims=True) * 2**-11  # of the scale itself to f16
    assert (off <= halves * scale / 2 + rounding).all()
    assert off.max() > 0.4 * scale.min(), "something was rounded"


@pytest.mark.parametrize("tied", [True, False])
def test_what_stays_wider_follows_llama_cpp(tied, tmp_path):
    model = build(config(Qwen2Config, intermediate_size=80, tie_word_embeddings=tied))
    types = {name: tensor.tensor_type.name for name, tensor in tensors(write(model, tmp_path, "q4_1")).items()}
    assert types["blk.0.ffn_down.weight"] == "F16", "80 columns are no whole blocks of 32"
    assert types["token_embd.weight"] == ("Q8_0" if tied else "Q4_1")
    assert types.get("output.weight") == (None if tied else "Q8_0")
    assert types["blk.0.attn_q.weight"] == types["blk.0.ffn_up.weight"] == "Q4_1"
    assert types["blk.0.attn_q.bias"] == types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert field(tmp_path / "model.gguf", "general.file_type") == gguf.LlamaFileType.MOSTLY_Q4_1


def test_a_weight_too_large_for_f16_is_said(tmp_path):
    model = build(config())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight .* f16; gguf-bf16 holds them"):
        write(model, tmp_path, "f16")
    write(model, tmp_path, "bf16")


def test_a_weight_without_a_place_is_said(tmp_path):
    model = build(config())
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"model\.layers\.0\.extra\.weight has no place in a llama model"):
        write(model, tmp_path)


@pytest.mark.parametrize("frame", ["", "<|begin|> $A", "$A <|end|>", "<|begin|> $A <|end|>"])
@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_the_files_own_tokenizer_reads_as_the_original(pre, frame, tmp_path):
    words = tokenizer(pre, frame)
    path = write(build(config()), tmp_path, words=words)
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert field(path, "tokenizer.ggml.pre") == pre
    assert bool(field(path, "tokenizer.ggml.add_bos_token")) == frame.startswith("<|begin|>")
    assert bool(field(path, "tokenizer.ggml.add_eos_token")) == frame.endswith("<|end|>")
    for text in TEXTS:
        assert found(text)["input_ids"] == words(text)["input_ids"], text
    assert [getattr(found, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")] == [2, 1, 0, 3]
    turns = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(turns, tokenize=False) == "<|user|>hi<|end|>"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe"])
def test_the_way_of_cutting_text_is_recognised(pre, tmp_path):
    assert field(write(build(config()), tmp_path, words=tokenizer(pre)), "tokenizer.ggml.pre") == pre


def test_rows_without_a_token_are_filled(tmp_path):
    words = tokenizer()
    changed = copy.deepcopy(parsed(words))
    changed["added_tokens"].append({**changed["added_tokens"][-1], "id": 690, "content": "[PAD699]"})
    tokens, types = gguf_file._vocabulary(changed, 700)
    assert len(set(tokens)) == len(tokens) == 700
    kind = gguf.TokenType
    assert types[:5] == [kind.CONTROL] * 5
    assert types[5:500].count(kind.NORMAL) == 495
    assert (tokens[500], types[500]) == (PLAIN, kind.USER_DEFINED)
    assert (tokens[699], types[699]) == ("[PAD699]_", kind.UNUSED)
    path = write(build(config()), tmp_path)
    assert field(path, "tokenizer.ggml.tokens")[501:503] == ["[PAD501]", "[PAD502]"]
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert found("[PAD501]")["input_ids"] == words("[PAD501]")["input_ids"]


def test_frames_by_other_tokens_than_bos_are_refused(tmp_path):
    words = copy.deepcopy(tokenizer("gpt-2", "<|begin|> $A"))
    words.bos_token = "<|user|>"
    with pytest.raises(InputError, match=r"puts token 2 around texts, where llama\.cpp puts the bos token \(3\)"):
        write(build(config()), tmp_path, words=words)


YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (AutoConfig.for_model("gpt2"), "models of type gpt2 are not written as GGUF; llama, mistral, qwen2, qwen3 are"),
        (config(attention_bias=True), "a llama model with attention_bias"),
        (config(mlp_bias=True), "a llama model with mlp_bias"),
        (config(Qwen3Config, attention_bias=True), "a qwen3 model with attention_bias"),
        (config(hidden_act="gelu"), "its activation is gelu"),
        (config(MistralConfig, sliding_window=256), "a sliding window"),
        (config(Qwen2Config, use_sliding_window=True, max_window_layers=1), "a sliding window"),
        (config(rope_parameters=YARN), "rotary embedding is scaled (yarn)"),
        (config(Qwen2Config, rope_parameters=LLAMA3), "rotary embedding is scaled (llama3)"),
        (config(rope_parameters={**SIZES["rope_parameters"], "partial_rotary_factor": 0.5}), "part of each head"),
        (config(vocab_size=500), "has a token 500, its embeddings only 500 rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_cannot_become_gguf_is_told_why(settings, reason):
    assert reason in str(gguf_file.fault(settings, parsed(tokenizer())))


@pytest.mark.parametrize(
    "settings",
    [
        config(MistralConfig, sliding_window=512),
        config(Qwen2Config, use_sliding_window=True, max_window_layers=2),
        config(vocab_size=501),
        config(rope_parameters=LLAMA3),
    ],
    ids=["window as long as the context", "no layer with a window", "no padding", "llama3"],
)
def test_a_model_near_a_fault_is_not_refused(settings):
    assert gguf_file.fault(settings, parsed(tokenizer())) is None


def changed(*path, pre="gpt-2", **values):
    """A tokenizer.json in which the entry at `path` has other values."""
    found = parsed(tokenizer(pre))
    entry = functools.reduce(lambda inside, key: inside[key], path, found)
    entry.update(values)
    return found


SPLIT = ("pre_tokenizer", "pretokenizers", 0)
TWO = [{"SpecialToken": {"id": "a", "type_id": 0}}] * 2
AROUND = {
    "type": "TemplateProcessing", "single": [*TWO, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
    "special_tokens": {"a": {"id": "a", "ids": [2], "tokens": ["a"]}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (changed("model", type="Unigram"), "its tokenizer is of kind Unigram"),
        (changed("model", byte_fallback=True), "its tokenizer is SentencePiece's"),
        (changed("model", merges=[]), "its tokenizer merges nothing"),
        (changed("model", dropout=0.1), "has a dropout"),
        (changed("model", end_of_word_suffix="</w>"), "has a end_of_word_suffix"),
        (changed("model", unk_token="<|end|>", vocab={"a": 7}), "an unknown token for some bytes"),
        (changed("added_tokens", 5, lstrip=True), "its added token '<think>' has lstrip"),
        (changed("model", ignore_merges=True), "cuts text into pieces"),
        (changed("model", pre="qwen2", ignore_merges=True), "cuts text into pieces"),
        (changed(pre_tokenizer=None), "cuts text into pieces"),
        (changed("pre_tokenizer", add_prefix_space=True), "cuts text into pieces"),
        (changed("pre_tokenizer", use_regex=False), "cuts text into pieces"),
        (changed(*SPLIT, pre="smollm", individual_digits=False), "cuts text into pieces"),
        (changed(*SPLIT, pre="qwen2", behavior="Removed"), "cuts text into pieces"),
        (changed(*SPLIT, pre="qwen2", invert=True), "cuts text into pieces"),
        (changed(*SPLIT, pre="qwen2", pattern={"Regex": r"\s+"}), "cuts text into pieces"),
        (changed(normalizer={"type": "NFC"}), "changes text first (NFC)"),
        (changed(pre="qwen2", normalizer={"type": "NFKC"}), "changes text first (NFKC)"),
        (changed(post_processor=AROUND), "more around a text"),
        (changed(post_processor={"type": "BertProcessing"}), "more around a text"),
    ],
)
def test_a_tokenizer_that_cannot_become_gguf_is_told_why(words, reason):
    assert reason in str(gguf_file.fault(config(), words))
