"""Prompts: how a language model is asked for what an encoder would say of a text. Torch-free.

A prompt is the recipe's `teacher.prompt` with a row's texts in it, behind some training rows with their answers
(`shots`). Of several classes each is asked for: the rest of the question, with its name, is an ending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distilpeft.machine.files import digest_json
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import MultiLabelClassification, Regression
from distilpeft.recipe.teacher import YES_NO

SEPARATOR = "\n\n"
"""Between shots, and before the prompt."""
LABEL_PLACE = "{label}"


@dataclass(frozen=True)
class Shot:
    """A training row with its answer.

    Attributes:
        texts: its text, or both of a pair.
        shown: the same, cut to `data.max_tokens`.
        answer: as the recipe spells it.
    """

    texts: tuple[str, ...]
    shown: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Prompt:
    """How rows are asked.

    Attributes:
        template: with the places {text}, and {pair} of pairs; {label} if classes are asked for one by one.
        answers: of each class, of yes and no, or of each number.
        labels: the classes that are asked for one by one.
        numbers: what each answer is worth on a scale.
        shots: training rows that go before.
        chat: the whole is what a user says in the model's chat template.
    """

    template: str
    answers: tuple[str, ...]
    labels: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()
    shots: tuple[Shot, ...] = ()
    chat: bool = False

    @property
    def digest(self) -> str:
        """Names what the model reads."""
        shots = [[list(shot.shown), shot.answer] for shot in self.shots]
        return digest_json([self.template, list(self.answers), list(self.labels), shots, self.chat])

    @property
    def endings(self) -> list[str]:
        """The rest of the question for each class that is asked for, or nothing."""
        if not self.labels:
            return [""]
        ending = self.template[len(self._beginning) :]
        return [ending.replace(LABEL_PLACE, label) for label in self.labels]

    @property
    def _beginning(self) -> str:
        """What all questions about a row have in common: the template, up to the space before a class's name."""
        return self.template.partition(LABEL_PLACE)[0].rstrip() if self.labels else self.template

    def of(self, shown: Sequence[str], texts: Sequence[str] = ()) -> str:
        """The prompt of a row, without its ending.

        Args:
            shown: its texts, maybe cut.
            texts: as they are; a shot that is this very row is left out, since it holds the answer.
        """
        shots = [self._filled(shot.shown) + shot.answer for shot in self.shots if shot.texts != tuple(texts)]
        return SEPARATOR.join([*shots, self._filled(shown)])

    def _filled(self, texts: Sequence[str]) -> str:
        """The beginning with these texts, in which braces mean nothing."""
        places = dict(zip(("{text}", "{pair}"), texts, strict=False))
        parts = [self._beginning]
        for place in places:
            parts = [piece for part in parts for piece in _split(part, place)]
        return "".join(places.get(part, part) for part in parts)


def prompt_of(recipe: Recipe, shots: Sequence[Shot] = ()) -> Prompt | None:
    """How the recipe's teacher is asked; None if it is not."""
    teacher, task = recipe.teacher, recipe.task
    if teacher.prompt is None:
        return None
    labels = task.labels if isinstance(task, MultiLabelClassification) else ()
    names = YES_NO if labels else getattr(task, "labels", tuple(teacher.answers or ()))
    spelled = teacher.answers or {name: name if teacher.chat else f" {name}" for name in names}
    numbers = tuple(map(float, names)) if isinstance(task, Regression) else ()
    answers = tuple(spelled[name] for name in names)
    return Prompt(teacher.prompt, answers, labels, numbers, tuple(shots), teacher.chat)


def _split(part: str, place: str) -> list[str]:
    """A part at every mention of a place, which stays as a part of its own."""
    pieces = part.split(place)
    return [piece for number, text in enumerate(pieces) for piece in ([place] if number else []) + [text]]
