"""Label cells to class ids: names first, exactly as the file has them; never by position unless that is certain.

A cell is a class if it is that class's name. Numbers are indices into `task.labels` only where nothing else is
possible: no class is called like a number or a boolean, no cell of the column is a name, and every whole number is a
position in the list; or where the recipe says `label_is: index`. Anything else is a fault of its row.

    C  classes
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import datasets
import numpy as np

LABEL = "__label__"
"""Column of checked rows with what the task learns: a class id, a list of them, a number."""
LabelIs = Literal["name", "index"] | None
MOST_SHOWN = 20
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")
_INDEX = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")
_BOOLEANS = frozenset({"true", "false", "yes", "no", "on", "off", "t", "f", "y", "n"})


class Fault(str):
    """What is wrong with a row."""

    __slots__ = ()


@dataclass(frozen=True)
class ClassReader:
    """Turns cells of one column into class ids.

    Attributes:
        labels: class names; the position is the class id.
        names: what cells are indices into, where they are that for sure: a ClassLabel column's own names, or `labels`.
        by_index: whether a whole number that is not a name is an index into `labels`.
        why: why it is not, for messages.
    """

    labels: Sequence[str]
    names: Sequence[str] | None = None
    by_index: bool = False
    why: str = ""

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.labels)}

    @cached_property
    def _cache(self) -> dict[tuple[type, object], int | Fault]:
        return {}

    def class_id(self, cell: Any) -> int | Fault:
        """The class id of a cell, or what is wrong with it."""
        if not isinstance(cell, Hashable):
            return self._class_id(cell)
        key = (type(cell), cell)  # cells repeat, and True equals 1
        result = self._cache.get(key)
        if result is None:
            result = self._cache[key] = self._class_id(cell)
        return result

    def _class_id(self, cell: object) -> int | Fault:
        if is_missing(cell):
            return Fault("the label is missing")
        if self.names is not None:
            return self._of_names(self.names, cell)
        position = self._id_by_name(cell)
        if position is not None:
            return position
        index = whole_number(cell)
        if self.by_index and index is not None and 0 <= index < len(self.labels):
            return index
        return Fault(f"label {shown(cell)} is {self._allowed(cell)}")

    def class_ids(self, cells: object) -> list[int] | Fault:
        """The class ids of a list of cells, or the first fault."""
        ids: list[int] = []
        for cell in cells if isinstance(cells, list | tuple) else ():
            result = self.class_id(cell)
            if isinstance(result, Fault):
                return result
            ids.append(result)
        return ids

    def is_name(self, cell: object) -> bool:
        """Whether a cell is the name of a class."""
        return self._id_by_name(cell) is not None

    def _of_names(self, names: Sequence[str], cell: object) -> int | Fault:
        index = whole_number(cell)
        if index is None or not 0 <= index < len(names):
            return Fault(f"label {shown(cell)} is not an index from 0 to {len(names) - 1}")
        class_id = self._ids.get(names[index])
        if class_id is None:
            return Fault(f"label {index} is class {names[index]!r} of the column, {self._allowed(names[index])}")
        return class_id

    def _id_by_name(self, cell: object) -> int | None:
        if isinstance(cell, bool | np.bool_):
            alike = [index for name, index in self._ids.items() if name.casefold() == str(cell).casefold()]
            return alike[0] if len(alike) == 1 else None
        text = str(cell)
        class_id = self._ids.get(text, self._ids.get(text.strip()))
        if class_id is None and text.strip().endswith("0"):  # 1.0 is how pandas writes a 1 in a column with holes
            whole = _INDEX.fullmatch(text.strip())
            class_id = self._ids.get(whole[1]) if whole else None
        return class_id

    def _allowed(self, cell: object) -> str:
        """What a cell may be, and why this one is not."""
        names = ", ".join(self.labels[:MOST_SHOWN]) + (", ..." if len(self.labels) > MOST_SHOWN else "")
        alike = [name for name in self.labels if name.casefold() == str(cell).strip().casefold()]
        more = f"; names must match exactly: the recipe has {alike[0]!r}" if alike else ""
        if self.by_index:
            return f"none of task.labels ({names}) nor an index 0..{len(self.labels) - 1}{more}"
        if self.why and whole_number(cell) is not None and not more:
            more = f"; numbers are not taken as positions, since {self.why} (task.label_is: index says that they are)"
        return f"none of task.labels ({names}){more}"


def class_reader(labels: Sequence[str], feature: object, cells: Iterable[object], label_is: LabelIs) -> ClassReader:
    """Find out how a column names its classes.

    Args:
        labels: the recipe's class names.
        feature: the column's type; a ClassLabel, or list of them, brings names of its own.
        cells: all single labels of the column.
        label_is: what the recipe says.
    """
    inner = getattr(feature, "feature", feature)
    if label_is == "index":
        return ClassReader(labels, names=labels)
    if isinstance(inner, datasets.ClassLabel):
        return ClassReader(labels, names=list(inner.names))
    plain = ClassReader(labels)
    if label_is == "name":
        return plain
    coded = [name for name in labels if _NUMBER.fullmatch(name) or name.casefold() in _BOOLEANS]
    if coded:
        return ClassReader(labels, why=f"the class {coded[0]!r} is itself called like a number or a boolean")
    return ClassReader(labels, **_positions(plain, cells))


def _positions(plain: ClassReader, cells: Iterable[Any]) -> dict[str, Any]:
    """Whether the numbers in a column can only be positions."""
    numbers = others = 0
    for (_, cell), count in Counter((type(cell), cell) for cell in cells if isinstance(cell, Hashable)).items():
        if is_missing(cell):
            continue
        if plain.is_name(cell):
            return {"why": f"other rows have names such as {shown(cell)}"}
        index = whole_number(cell)
        if index is not None and index >= len(plain.labels):
            return {"why": f"{index} is beyond the last position, {len(plain.labels) - 1}"}
        numbers += count * (index is not None)
        others += count * (index is None)
    if others > numbers:
        return {"why": "most rows have something else"}
    return {"by_index": numbers > 0}


def whole_number(cell: object) -> int | None:
    """A cell as a whole number, None if it is none; `007` is a code and True a boolean, so they are none."""
    if isinstance(cell, bool | np.bool_):
        return None
    if isinstance(cell, int | np.integer):
        return int(cell)
    if isinstance(cell, float | np.floating):
        return int(cell) if float(cell).is_integer() else None
    match = _INDEX.fullmatch(cell.strip()) if isinstance(cell, str) else None
    return int(match[1]) if match else None


def number(cell: object) -> float | None:
    """A label cell as a number, None if it is none."""
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def is_one_hot(labels: Sequence[str], cells: Iterable[list[object] | None]) -> bool:
    """Whether lists hold 0 or 1 for each class: all of them are as long as the list of classes, with nothing else."""
    some = False
    for cell in cells:
        if cell is None or len(cell) != len(labels) or any(value not in (0, 1, "0", "1") for value in cell):
            return False
        some = True
    return some and not {"0", "1"} & set(labels)


def is_missing(cell: object) -> bool:
    """Whether a cell holds nothing."""
    return (
        cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell))
    )


def shown(cell: object) -> str:
    """A cell for a message, cut where it is long."""
    text = repr(cell)
    return text if len(text) <= 60 else f"{text[:57]}..."


def flat(cells: Iterable[object]) -> Iterator[object]:
    """The single labels of a column of lists."""
    for cell in cells:
        if isinstance(cell, list | tuple):
            yield from cell
