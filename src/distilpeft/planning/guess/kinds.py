"""Which kinds of task some data can be for, by their columns: names first, then what the cells hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import TypeVar

from distilpeft.data.labels import is_missing, whole_number
from distilpeft.errors import InputError
from distilpeft.planning.data_profile import MOST_CLASSES, READ, Look, mean_words
from distilpeft.planning.text_profile import language_of, text_of

LABEL_NAMES = (
    "label", "labels", "class", "category", "intent", "topic", "topics", "target", "sentiment", "score", "rating",
    "stars",
)  # fmt: skip
FORMS: dict[str, Sequence[Mapping[str, Sequence[str]]]] = {
    "token_classification": [{"words": ("words", "tokens"), "tags": ("tags", "ner_tags", "pos_tags", "labels")}],
    "question_answering": [{"question": ("question",), "context": ("context",), "answers": ("answers", "answer")}],
    "causal_lm": [
        {"messages": ("messages",)},
        {"prompt": ("prompt",), "completion": ("completion",)},
        {"prompt": ("instruction",), "completion": ("output", "response", "completion")},
    ],
    "seq2seq": [
        {"source": ("source", "document", "article", "dialogue", "input"), "target": ("target", "summary", "output")},
        {"source": ("source",), "target": ("target", "translation")},
    ],
}
"""Tasks by the usual names of their columns: recipe key → names."""
KEYS: dict[str, Sequence[str]] = {
    "text_classification": ("text", "label"),
    "multi_label_classification": ("text", "label"),
    "regression": ("text", "label"),
    "image_classification": ("image", "label"),
    "embedding": ("text",),
    **{task: tuple(forms[0]) for task, forms in FORMS.items()},
    "causal_lm": ("text",),
}
"""Kind of task → the columns that it cannot do without."""
MOSTLY = 0.9
"""Share of the rows that have to show something before it is taken for a rule."""
T = TypeVar("T")
Given = Mapping[str, str]
"""Recipe key → column, as given on the command line."""


@dataclass(frozen=True)
class Guess:
    """A kind of task with its columns, and what in the data speaks for it."""

    task: str
    columns: Mapping[str, str]
    why: str

    def flags(self, default: Guess | None = None) -> str:
        """The options that ask for it, where they differ from those of the default."""
        names = {"task": self.task, **self.columns}
        known = {} if default is None else {"task": default.task, **default.columns}
        return " ".join(f"--{key} {column}" for key, column in names.items() if known.get(key) != column)


def guesses(task: str | None, options: Given, data: Look) -> list[Guess]:
    """Every kind of task that the data can be for, the likeliest first.

    Args:
        task: the kind, if it is given.
        options: columns that are given, and `separator`.
        data: the data.

    Raises:
        InputError: the prompts are in two columns.
    """
    keys = set(options) - {"separator"}
    plain_text = task in ("embedding", "causal_lm")
    for makers in (CERTAIN, LABELLED, (_two_texts,), (_text,)):
        if makers is LABELLED and (plain_text or keys & set(READ) - {"text", "pair", "image"}):
            continue
        choices = {
            (guess.task, *sorted(guess.columns.items())): guess
            for maker in makers
            for guess in maker(data, options)
            if task in (None, guess.task) and keys <= set(guess.columns)
        }
        if choices:
            _refuse_two_prompts(choices.values(), options, data)
            return list(choices.values())
    return []


def _choice(key: str, options: Given, columns: Iterable[str]) -> list[str]:
    """The column that is given for a key, or those that it can be."""
    return [options[key]] if key in options else [column for column in columns if column not in options.values()]


def _pictures(data: Look, options: Given) -> Iterator[Guess]:
    for image in _choice("image", options, data.pictures):
        for label in _choice("label", options, _label_order(data)):
            why = f"{image!r} holds pictures, {label!r} {_count(data, label)}"
            yield Guess("image_classification", {"image": image, "label": label}, why)


def _by_name(data: Look, options: Given) -> Iterator[Guess]:
    """By the usual names of columns, for those that are not given."""
    names = {name.lower(): name for name in data.filled()}
    for task, forms in FORMS.items():
        for form in forms:
            columns = {key: options.get(key) or next((names[n] for n in usual if n in names), "")
                     for key, usual in form.items()}  # fmt: skip
            if not all(columns.values()):
                continue
            if task == "seq2seq" and columns["target"] in data.classes:
                continue
            more = {"tools": names["tools"]} if "messages" in form and "tools" in names else {}
            listed = " and ".join(repr(column) for column in columns.values())
            yield Guess(task, {**columns, **more}, f"the {_s('column', len(columns))} {listed}")


def _refuse_two_prompts(choices: Iterable[Guess], options: Given, data: Look) -> None:
    """Refuse instructions with an input that would be left out.

    Raises:
        InputError: there are such.
    """
    more = next((name for name in data.filled() if name.lower() == "input"), None)
    prompts = [guess.columns["prompt"] for guess in choices if guess.columns.get("prompt", "").lower() == "instruction"]
    if more is None or not prompts or "prompt" in options:
        return
    count = sum(not is_missing(cell) for cell in data.rows[more])
    raise InputError(
        f"init: the prompts are in two columns, {prompts[0]!r} and {more!r} (with text in {count} of the first "
        f"{len(data.rows)} rows); join them into one column"
    )


def _chats(data: Look, options: Given) -> Iterator[Guess]:
    for name in _choice("messages", options, data.lists):
        if _all(data, name, lambda cell: all(isinstance(turn, Mapping) and "role" in turn for turn in _list(cell))):
            yield Guess("causal_lm", {"messages": name}, f"{name!r} holds chats")


def _tags(data: Look, options: Given) -> Iterator[Guess]:
    """Two columns of lists that are equally long in every row: the one with few different entries holds the tags."""
    for words, tags in permutations(data.lists, 2):
        if not _goes_with(options, words=words, tags=tags):
            continue
        pairs = zip(data.rows[words], data.rows[tags], strict=True)
        alike = all(isinstance(a, list) and isinstance(b, list) and len(a) == len(b) for a, b in pairs)
        kinds = _entries(data, tags)
        if alike and kinds and len(kinds) <= MOST_CLASSES and len(_entries(data, words)) > len(kinds):
            why = f"{tags!r} has {len(kinds)} tags, one for each word of {words!r}"
            yield Guess("token_classification", {"words": words, "tags": tags}, why)


def _answers(data: Look, options: Given) -> Iterator[Guess]:
    """A column whose texts stand in those of another, next to one of questions."""
    short = [name for name in data.filled() if name not in data.numbers and name not in data.pictures]
    for question, context, answers in permutations(short, 3):
        if context not in data.columns or question not in data.columns:
            continue
        if not _goes_with(options, question=question, context=context, answers=answers):
            continue
        if not _share(data.rows[question], lambda cell: text_of(cell).rstrip().endswith(("?", "？", "؟"))):
            continue
        pairs = zip(data.rows[answers], data.rows[context], strict=True)
        if _share(pairs, lambda pair: bool(_answer(pair[0])) and _answer(pair[0]) in text_of(pair[1])):
            why = f"the answers in {answers!r} stand in {context!r}, and {question!r} holds questions"
            yield Guess("question_answering", {"question": question, "context": context, "answers": answers}, why)


def _lists(data: Look, options: Given) -> Iterator[Guess]:
    """Several classes: a list of names, or a text with a separator."""
    for label in _choice("label", options, [] if "separator" in options else data.lists):
        kinds = _entries(data, label) if label in data.lists else set()
        if label in data.lists and not 0 < len(kinds) <= MOST_CLASSES:
            continue
        if label in data.lists or "separator" in options:
            why = f"{label!r} holds " + (f"lists of {len(kinds)} classes" if kinds else "several classes")
            yield from _with_texts("multi_label_classification", label, why, data, options)


def _classes(data: Look, options: Given) -> Iterator[Guess]:
    """One class for each row; of whole numbers that may be on a scale also the number itself."""
    if "separator" in options:
        return
    for label in _choice("label", options, _label_order(data)):
        if label in data.numbers or label in data.lists:
            continue
        yield from _with_texts("text_classification", label, f"{label!r} {_count(data, label)}", data, options)
        numbers = [whole_number(value) for value in data.classes.get(label, ())]
        if len(numbers) > 2 and None not in numbers:
            why = f"{label!r} holds numbers from {numbers[0]} to {numbers[-1]}, which may be a scale"
            yield from _with_texts("regression", label, why, data, options, most=1)


def _numbers(data: Look, options: Given) -> Iterator[Guess]:
    columns = [name for name in data.numbers if not _counts_rows(data, name)]
    usual = [name for name in columns if name.lower() in LABEL_NAMES]
    for label in _choice("label", options, [*usual, *(name for name in columns if name not in usual)]):
        if label in data.numbers:
            yield from _with_texts("regression", label, f"{label!r} holds numbers on a scale", data, options)


def _two_texts(data: Look, options: Given) -> Iterator[Guess]:
    texts = [name for name in data.columns if name not in options.values()]
    source = options.get("source") or options.get("prompt") or (texts[0] if texts else None)
    target = options.get("target") or options.get("completion")
    target = target or next((name for name in texts if name != source), None)
    if source is None or target is None or (len(texts) != 2 and not options):
        return
    langs = [language_of(map(text_of, data.rows[name])) for name in (source, target)]
    translated = None not in langs and langs[0] != langs[1]
    why = f"{source!r} is in {langs[0]}, {target!r} in {langs[1]}" if translated else f"{target!r} follows {source!r}"
    yield Guess("seq2seq", {"source": source, "target": target}, f"{why}: a text for each text")
    if not translated:
        yield Guess("causal_lm", {"prompt": source, "completion": target}, f"{why}: a prompt and its completion")


def _text(data: Look, options: Given) -> Iterator[Guess]:
    for text in _choice("text", options, _texts(data)):
        only = f"{text!r} is text without a label"
        yield Guess("embedding", {"text": text}, f"{only}: learn its vectors from a teacher")
        yield Guess("causal_lm", {"text": text}, f"{only}: learn to write such texts")


Maker = Callable[[Look, Given], Iterator[Guess]]
CERTAIN: tuple[Maker, ...] = (_pictures, _by_name, _chats, _tags, _answers)
"""What leaves no doubt."""
LABELLED: tuple[Maker, ...] = (_lists, _numbers, _classes)


def _with_texts(
    task: str, label: str, why: str, data: Look, options: Given, *, most: int | None = None
) -> Iterator[Guess]:  # fmt: skip
    """A label with the text or the two texts that it can belong to."""
    texts = [name for name in _texts(data) if name != label]
    if "pair" in options or ("text" not in options and len(texts) == 2):
        in_order = [name for name in data.columns if name != label]
        columns = [options.get("text"), options.get("pair")]
        rest = iter(name for name in in_order if name not in columns)
        text, pair = (column or next(rest, None) for column in columns)
        if text is not None and pair is not None:
            yield Guess(task, {"text": text, "pair": pair, "label": label}, f"{why}; {text!r} and {pair!r} are texts")
            if "pair" in options or most == 1:
                return
    for text in _choice("text", options, texts)[:most]:
        yield Guess(task, {"text": text, "label": label}, f"{why}; {text!r} is text")


def _texts(data: Look) -> list[str]:
    """Columns of text, the longest texts first."""
    return sorted(data.columns, key=lambda name: -mean_words(data.rows[name]))


def _label_order(data: Look) -> list[str]:
    """Columns of classes: by their usual names, or the last ones first."""
    usual = [name for name in data.classes if name.lower() in LABEL_NAMES]
    return usual or list(data.classes)[::-1]


def _count(data: Look, label: str) -> str:
    values = data.classes.get(label)
    return "holds the label" if values is None else f"has {len(values)} different values"


def _counts_rows(data: Look, name: str) -> bool:
    """Whether a column of whole numbers only numbers the rows."""
    numbers = [whole_number(cell) for cell in data.rows[name]]
    return None not in numbers and len({(b or 0) - (a or 0) for a, b in pairwise(numbers)}) == 1


def _goes_with(options: Given, **columns: str) -> bool:
    """Whether these columns are the given ones, as far as they are given."""
    return all(options.get(key, column) == column for key, column in columns.items())


def _list(cell: object) -> list[object]:
    return cell if isinstance(cell, list) else [cell]


def _all(data: Look, name: str, holds: Callable[[object], bool]) -> bool:
    cells = [cell for cell in data.rows[name] if cell]
    return bool(cells) and all(isinstance(cell, list) and holds(cell) for cell in cells)


def _entries(data: Look, name: str) -> set[object]:
    """The different entries of a column of lists; none if they are not names or numbers."""
    entries = [entry for cell in data.rows[name] for entry in _list(cell) if entry is not None]
    return set(entries) if all(isinstance(entry, str | int | float) for entry in entries) else set()


def _answer(cell: object) -> str:
    """The first answer of a cell: a text, or as SQuAD has them."""
    if isinstance(cell, Mapping):
        texts = cell.get("text")
        cell = texts[0] if isinstance(texts, list) and texts else texts
    return cell if isinstance(cell, str) else ""


def _share(cells: Iterable[T], holds: Callable[[T], bool]) -> bool:
    """Whether something is so for most cells."""
    answers = [holds(cell) for cell in cells]
    return bool(answers) and sum(answers) >= MOSTLY * len(answers)


def _s(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
