"""Tiny tokenizers of words and parts of words, with many tokens that tiny rows never use, and models of that size."""

from __future__ import annotations

import functools
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from support import tiny, tiny_lm

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NEVER = ["elephant", "giraffe", "##phant", "##affe", "zebra", "##bra", "привет", "п", "##п", "я", "##я", "東", "##東"]
"""Pieces that no tiny row holds; some are of other scripts."""


def _special(core: Tokenizer) -> dict[str, str]:
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return dict(zip(names, SPECIAL, strict=True))


@functools.cache
def wordpiece() -> PreTrainedTokenizerFast:
    """Like BERT's: the special tokens stand behind tokens that no text has, and a few words are in parts."""
    unused = [f"[unused{number}]" for number in range(20)]
    letters = [*string.ascii_lowercase, *string.digits, *",.!?"]
    words = [word for word in (*tiny.GOOD, *tiny.BAD, *tiny.PLAIN) if word not in ("a", "superb", "awful", "story")]
    pieces = ["super", "##b", "aw", "##ful", "st", "##ory", "##or"]
    tokens = ["[PAD]", *unused, *SPECIAL[1:], *letters, *NEVER, *words, *(f"##{letter}" for letter in letters), *pieces]
    core = Tokenizer(models.WordPiece({token: at for at, token in enumerate(dict.fromkeys(tokens))}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=64, model_input_names=names, **_special(core)
    )


def save_classifier(folder: Path, **changes: Any) -> Path:
    """A random body, without a head, that reads by `wordpiece`."""
    tokenizer = wordpiece()
    tiny.classifier(vocab_size=len(tokenizer), **changes).bert.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@functools.cache
def bytelevel() -> PreTrainedTokenizerFast:
    """Like GPT-2's, trained on tiny rows and on other words; its special tokens are the first."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=tiny_lm.SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    other = ["the elephant and the giraffe sat there, there they are, superbly storied otherwise"] * 20
    core.train_from_iterator(
        [*(f"{pair['prompt']}{pair['completion']}" for pair in tiny_lm.pairs(200)), *other], trainer
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=4096
    )
    found.chat_template = tiny_lm.TEMPLATE
    return found


def save_language_model(folder: Path, rows: int | None = None, seed: int = 0, **changes: Any) -> Path:
    """A random language model that reads by `bytelevel`; `rows` of its embeddings may be more than there are tokens."""
    tokenizer = bytelevel()
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_lm.config(vocab_size=rows or len(tokenizer), **changes)).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder
