"""What a tokenizer means by its ids, and whether two tokenizers mean the same.

A language model's soft targets live over token ids, so teacher and student must read them alike. Equal vocabulary
sizes prove nothing, and unequal ones are no obstacle: models of one family pad their embeddings differently
(Qwen2.5: 151,936 and 152,064 rows over the same tokens). Works without torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilpeft.errors import InputError

SPECIAL = ("bos_token", "eos_token", "unk_token")
"""Not the padding token: padded positions never count."""
EXCERPT = 40
REMEDY = "student.tokenizer: teacher takes over the teacher's"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, as far as two of them must agree.

    Attributes:
        name: for messages.
        tokens: token → id, added tokens included.
        special: of `SPECIAL`, the token's text or None.
        chat_template: the default one.
    """

    name: str
    tokens: Mapping[str, int]
    special: Mapping[str, str | None]
    chat_template: str | None

    @staticmethod
    def of_tokenizer(name: str, tokenizer: Any) -> Vocabulary:
        """Of a tokenizer that transformers has loaded."""
        special = {key: getattr(tokenizer, key, None) for key in SPECIAL}
        return Vocabulary(name, tokenizer.get_vocab(), special, _default(tokenizer.chat_template))

    @staticmethod
    def of_folder(name: str, folder: Path) -> Vocabulary | None:
        """Of a folder written by `save_pretrained`; None if it holds no tokenizer.json."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            return None
        from tokenizers import Tokenizer

        settings = _read(folder / "chat_template.json") | _read(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in settings:  # the older layout: as in transformers, the map then wins
            settings |= _read(folder / "special_tokens_map.json")
        special = {key: _text(settings.get(key)) for key in SPECIAL}
        try:
            tokens = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None
        template = settings.get("chat_template")
        jinja = folder / "chat_template.jinja"
        if jinja.is_file():
            try:
                template = jinja.read_text(encoding="utf-8")
            except ValueError as error:
                raise InputError(f"{jinja}: cannot be read: {error}") from None
        return Vocabulary(name, tokens, special, _default(template))


def check_same(teacher: Vocabulary, student: Vocabulary, *, chat: bool, tokens_only: bool = False) -> None:
    """Refuse two tokenizers that read ids differently.

    Tokens that only one side has are allowed: their ids are padding to the other.

    Args:
        teacher: the teacher's.
        student: the student's own.
        chat: rows are rendered by the chat template, so it must be the same.
        tokens_only: the student takes over the teacher's tokenizer; only its ids must fit.

    Raises:
        InputError: the smallest id that names two tokens, or the special token or place of the template that differs.
    """
    _check_tokens(teacher, student)
    if tokens_only:
        return
    for key in SPECIAL:
        ours, theirs = student.special.get(key), teacher.special.get(key)
        if ours != theirs:
            raise InputError(
                f"student: the {key} of {student.name} is {ours!r}, the teacher's ({teacher.name}) {theirs!r}; {REMEDY}"
            )
    if chat:
        check_templates(teacher, student)


def check_templates(teacher: Vocabulary, student: Vocabulary) -> None:
    """Refuse two chat templates that differ.

    Raises:
        InputError: the first place where they do.
    """
    ours, theirs = ((side.chat_template or "").rstrip() for side in (student, teacher))
    if ours != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise InputError(
            f"student: its chat template differs from the teacher's from character {at} on: {_excerpt(ours, at)} "
            f"against {_excerpt(theirs, at)}; {REMEDY}"
        )


def _check_tokens(teacher: Vocabulary, student: Vocabulary) -> None:
    if teacher.tokens == student.tokens:
        return
    agreed, moved = set(), set()
    for token, number in student.tokens.items():
        twin = teacher.tokens.get(token)
        if twin == number:
            agreed.add(number)
        elif twin is not None:  # a token under two ids, of which neither may be taken on the other side
            moved.add(min(number, twin))
    ours, theirs = set(student.tokens.values()), set(teacher.tokens.values())
    # Several tokens may have one id (aliases): it means the same if both sides share one of them.
    differing = moved | ((ours & theirs) - agreed)
    if not differing and len(agreed) * 2 > min(len(ours), len(theirs)):
        return
    advice = "soft targets over tokens need the same tokens: take a student of the teacher's family"
    if not differing:
        raise InputError(
            f"student: {student.name} and the teacher ({teacher.name}) share {len(agreed)} tokens; {advice}"
        )
    first = min(differing)
    raise InputError(
        f"student: {student.name} reads token {first} as {_token(student, teacher, first)!r}, the teacher "
        f"({teacher.name}) as {_token(teacher, student, first)!r} ({len(differing)} such ids); {advice}"
    )


def _token(ours: Vocabulary, theirs: Vocabulary, number: int) -> str | None:
    """What one side calls an id: of several names, one that the other side does not give it."""
    names = [token for token, own in ours.tokens.items() if own == number]
    return next((token for token in names if theirs.tokens.get(token) != number), names[0] if names else None)


def _read(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def _text(entry: object) -> str | None:
    """A special token, written as text or as an object."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _default(template: object) -> str | None:
    """The default of several named templates, which are given as a mapping or a list."""
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _excerpt(text: str, at: int) -> str:
    return repr(text[at : at + EXCERPT]) if text else "none at all"


TYPES = "token_type_ids"
