"""The page's section on what the student answers: classes, the pairs that it confuses, and its surest mistakes."""

from __future__ import annotations

from html import escape

from distilpeft.report.figures import Answers, ClassAnswers
from distilpeft.report.page.markup import Cell, Column, table
from distilpeft.report.page.tables import share


def section(answers: Answers | None) -> str:
    """All of it; nothing for tasks without classes."""
    if answers is None:
        return ""
    return _classes(answers) + _confusion(answers) + _mistakes(answers)


def _classes(answers: Answers) -> str:
    """How common each class is in every split, and how well it is found."""
    splits = list(answers.classes[0].rows) if answers.classes else []
    columns = [
        Column("class", numeric=False), *(Column(split, "rows, or words of word tags") for split in splits),
        Column("answered", "how often the model answers so"), Column("precision", "right among those answered so"),
        Column("recall", "right among those that have it"), Column("F1"),
    ]  # fmt: skip
    rows = [
        [Cell(cls.name), *_counts(cls), *map(share, (cls.precision, cls.recall, cls.f1))] for cls in answers.classes
    ]
    return table(columns, rows, "Classes")


def _counts(cls: ClassAnswers) -> list[Cell]:
    return [Cell(f"{count:,}", count) for count in (*cls.rows.values(), cls.predicted)]


def _confusion(answers: Answers) -> str:
    """Labels in rows, answers in columns; the darker, the larger the share of its row."""
    if answers.confusion is None:
        return ""
    names = [cls.name for cls in answers.classes]
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{_shaded(at, counts)}</tr>'
        for at, (name, counts) in enumerate(zip(names, answers.confusion, strict=True))
    )
    return (
        '<h3>Labels (rows) and answers (columns)</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Confusion matrix"><table class="confusion"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _shaded(label: int, counts: tuple[int, ...]) -> str:
    total = sum(counts)
    cells = []
    for at, count in enumerate(counts):
        part = round(100 * count / total) if total else 0
        kind = "right" if at == label else "wrong"
        cells.append(f'<td class="number {kind}" style="--part: {part}%">{count or "·"}</td>')
    return "".join(cells)


def _mistakes(answers: Answers) -> str:
    """The wrong answers that the model was surest of."""
    columns = [
        Column("text", numeric=False), Column("label", numeric=False), Column("answer", numeric=False),
        Column("probability"),
    ]  # fmt: skip
    rows = [
        [Cell(row.text), Cell(row.label), Cell(row.answer), Cell(f"{row.probability:.3f}", row.probability)]
        for row in answers.mistakes
    ]
    if not rows:
        return ""
    title = "<h3>Wrong answers that the student is surest of</h3>"
    lead = '<p class="lead">The texts are from your data: mind with whom you share this page.</p>'
    return f"{title}{lead}{table(columns, rows, 'Wrong answers', kind='texts')}"
