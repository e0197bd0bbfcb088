"""Rows without labels: which labels a study keeps, and which rows must not teach because models are judged on them.

Works without torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from distilpeft.data.reading import data_sources
from distilpeft.data.sources import digest
from distilpeft.errors import InputError
from distilpeft.machine.files import digest_json
from distilpeft.recipe.data import Data
from distilpeft.recipe.recipe import result_settings


def unlabelled_digest(data: Data) -> str | None:
    """What names the rows without labels, beside what names all others; None for a recipe that has none."""
    if not data.may_have_unlabelled:
        return None
    if data.unlabelled is None:
        rows = "those of data.source"
    else:
        sources = {name: digest(source) for name, source in data_sources(data.unlabelled).items()}
        rows = digest_json([{**result_settings(data.unlabelled), "source": None}, sources])
    return rows if data.views is None else digest_json([rows, result_settings(data.views)])


def chosen_labels(classes: Sequence[Hashable], count: int, seed: int) -> NDArray[np.int64]:
    """Which training rows keep their labels: a random choice in which every class has its share.

    Args:
        classes: what each row belongs to; all the same for labels that are no classes.
        count: how many rows keep theirs.
        seed: of the choice. A smaller count keeps a part of what a larger one keeps, as far as shares allow.

    Returns:
        Row ids, ascending.

    Raises:
        InputError: there are fewer rows, or more classes than labels to keep.
    """
    if count > len(classes):
        raise InputError(f"data.labelled: {count} labels are to be kept, but there are {len(classes)} training rows")
    order = np.random.default_rng(seed).permutation(len(classes))
    members: dict[Hashable, list[int]] = {}
    for row in order.tolist():
        members.setdefault(classes[row], []).append(row)
    if len(members) > count:
        raise InputError(
            f"data.labelled: {count} labels are fewer than the {len(members)} classes of the training rows"
        )
    shares = {name: count * len(rows) / len(classes) for name, rows in members.items()}
    kept = {name: max(1, int(share)) for name, share in shares.items()}
    # The largest remainders get what rounding has left; small classes, which have one at least, may have taken more.
    by_need = sorted(members, key=lambda name: (shares[name] - kept[name], str(name)))
    while sum(kept.values()) != count:
        step = 1 if sum(kept.values()) < count else -1
        names = reversed(by_need) if step > 0 else by_need
        for name in list(names):
            if sum(kept.values()) != count and 1 <= kept[name] + step <= len(members[name]):
                kept[name] += step
    return np.sort(np.array([row for name, rows in members.items() for row in rows[: kept[name]]], dtype=np.int64))


def not_held_out(texts: Iterable[object], held_out: Iterable[object]) -> Iterator[bool]:
    """Whether each text is in none of the rows that models are judged on, but for case and white space."""
    known = {hash(evened(text)) for text in held_out}
    return (hash(evened(text)) not in known for text in texts)


def evened(text: object) -> object:
    """What stays the same when case and white space change."""
    if isinstance(text, str):
        return " ".join(text.casefold().split())
    return tuple(map(evened, text)) if isinstance(text, tuple) else text
