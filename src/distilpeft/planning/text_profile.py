"""How long texts are in tokens, and in which language they are; for `distilpeft init`.

Tokens are counted with a model's own tokenizer where it is on this machine; else they are estimated from words, and
from characters in scripts that put no spaces between words.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from distilpeft.data.model_files.tokens import Words
from distilpeft.data.sources import resolve_model
from distilpeft.errors import InputError

TOKENS_PER_WORD, LETTERS_PER_TOKEN = 1.4, 4
"""Of word pieces in English; where words are longer, as in German, Russian and code, letters decide."""
SPECIAL, TURN = 3, 6
"""Tokens that frame a row, and a turn of a chat."""
FRAME = 1
"""Tokens that frame a text, at least."""
ENOUGH_LETTERS, ENOUGH_CHARACTERS, ENOUGH_WORDS = 50, 8, 100
MIXED = 0.1
"""Share of the letters that are of another script than Latin, if texts are in several languages."""
COMMON = 0.08
"""Share of a text's words that are among its language's most common ones, at least; English has about 0.3."""
Count = Callable[[object], float]
"""Tokens of a cell."""
_IDEOGRAPHS = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Chinese characters and kana: about a token each."""
_SYLLABLES = re.compile("[\uac00-\ud7af\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
"""Hangul, Thai, Lao, Burmese and Khmer: about a token for two of them."""
_SCRIPTS = {
    "CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean", "CYRILLIC": "Cyrillic script",
    "ARABIC": "Arabic script", "GREEK": "Greek", "HEBREW": "Hebrew", "DEVANAGARI": "Devanagari script", "THAI": "Thai",
    "BENGALI": "Bengali", "TAMIL": "Tamil", "TELUGU": "Telugu", "GEORGIAN": "Georgian", "ARMENIAN": "Armenian",
}  # fmt: skip
_WORDS = {
    "English": "the of and to in is that it was for on with as are this be at have not but",
    "German": "der die das und ist nicht ein eine zu den mit von ich es auf für im dem sich auch",
    "French": "le la les de des et est un une du en que pour pas dans qui sur il plus au",
    "Spanish": "el la los las de que y en un una es por con para no se del lo al su",
    "Italian": "il la di che e un una è per non con del sono i della le si da nel come",
    "Portuguese": "o a os as de que e em um uma é não para com do da se no por mais",
    "Dutch": "de het een en van is dat niet in op te voor met zijn ik er maar aan ook je",
    "Polish": "i w nie na się jest z że do to o jak ale po za od tak przez już są",
    "Swedish": "och att det som en är på för med av inte den jag till ett om har de men var",
    "Turkish": "ve bir bu için çok da de ne ile daha ama gibi var olarak en kadar mi o ben değil",
}
_COMMON = {name: frozenset(words.split()) for name, words in _WORDS.items()}


def text_of(cell: object) -> str:
    """What a cell says: a text, a list of words, or a chat's turns one after another."""
    if isinstance(cell, Mapping):
        said = text_of(cell.get("content") or cell.get("value"))
        calls = cell.get("tool_calls")
        return f"{said} {json.dumps(calls, ensure_ascii=False, default=str)}" if calls else said
    if isinstance(cell, list | tuple):
        return " ".join(text_of(one) for one in cell)
    return cell if isinstance(cell, str) else ""


def estimate(cell: object) -> float:
    """Tokens of a cell, about."""
    text = text_of(cell)
    ideographs, syllables = len(_IDEOGRAPHS.findall(text)), len(_SYLLABLES.findall(text))
    words = _SYLLABLES.sub(" ", _IDEOGRAPHS.sub(" ", text)).split()
    spelled = max(TOKENS_PER_WORD * len(words), sum(map(len, words)) / LETTERS_PER_TOKEN)
    return spelled + ideographs + syllables / 2 + _turns(cell)


def num_words(cell: object) -> float:
    """Words of a cell, about; scripts without spaces count by their characters."""
    text = text_of(cell)
    alone = len(_IDEOGRAPHS.findall(text)) + len(_SYLLABLES.findall(text)) / 2
    return len(_SYLLABLES.sub(" ", _IDEOGRAPHS.sub(" ", text)).split()) + alone / TOKENS_PER_WORD


def _turns(cell: object) -> int:
    return TURN * sum(isinstance(one, Mapping) for one in cell) if isinstance(cell, list) else 0


def counter(model: str) -> Count | None:
    """Counts with a model's tokenizer; None if it is not on this machine."""
    try:
        words = Words.of(resolve_model(model, "--teacher"))
    except InputError:
        return None
    return None if words is None else count_with(words)


def count_with(words: Words) -> Count:
    """Counts with a tokenizer, without the tokens that frame a row."""
    return lambda cell: len(words.core.encode(text_of(cell), add_special_tokens=False).ids) + _turns(cell)


def length(rows: Iterable[Mapping[str, object]], columns: Iterable[str], count: Count) -> int:
    """Tokens that 98 % of the rows have at most, about, rounded up to a multiple of 16."""
    names = list(columns)
    counts = [sum(count(row[column]) for column in names) for row in rows]
    return max(16, 16 * math.ceil((float(np.percentile(counts, 98)) + SPECIAL) / 16))


def language_of(texts: Iterable[str]) -> str | None:
    """The language of texts, or their script where that is all that shows; None if they are too few to tell."""
    joined = " ".join(texts)[:200_000]
    scripts = Counter(unicodedata.name(char, "?").split()[0] for char in joined if char.isalpha())
    letters = sum(scripts.values())
    foreign = {name: count for name, count in scripts.items() if name in _SCRIPTS}
    if letters < (ENOUGH_CHARACTERS if foreign else ENOUGH_LETTERS):
        return None
    if MIXED * letters < sum(foreign.values()) <= letters / 2:
        return "several languages"
    if sum(foreign.values()) > letters / 2:
        kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
        return "Japanese" if kana > 0.1 * letters else _SCRIPTS[max(foreign, key=lambda name: foreign[name])]
    words = re.findall(r"[^\W\d_]+", joined.lower())
    shares = {name: sum(word in common for word in words) / max(1, len(words)) for name, common in _COMMON.items()}
    best = max(shares, key=lambda name: shares[name])
    return best if len(words) >= ENOUGH_WORDS and shares[best] >= COMMON else None
