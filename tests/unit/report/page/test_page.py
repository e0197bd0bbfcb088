"""The page as text: what is in it, that nothing outside is needed, and that nobody's text becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from support import reports

from distilpeft.report.page import page, sections
from distilpeft.report.schema import Report

VOID = {"meta", "br", "path", "circle", "rect", "polygon", "img", "line", "link", "input", "hr"}
CASES = {
    "classifier": lambda: [reports.classifier()],
    "language model": lambda: [reports.language_model()],
    "two runs": reports.two_runs,
    "two tasks": lambda: [reports.classifier(), reports.language_model()],
}


class Reader(HTMLParser):
    """Every element with its attributes; fails on markup that does not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.found if name == tag and wanted.items() <= found.items()]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    found = CASES[request.param]()
    return found, page.render(found)


def test_the_markup_is_whole_and_every_id_is_there_once(case):
    reader = Reader(case[1])
    ids = [found["id"] for _, found in reader.found if "id" in found]
    assert len(ids) == len(set(ids))
    assert {found["href"].removeprefix("#") for found in reader.all("a")} <= set(ids)


def test_nothing_from_outside_is_needed(case):
    _, text = case
    reader = Reader(text)
    assert not [tag for tag, _ in reader.found if tag in ("link", "img", "iframe", "object", "embed", "base", "form")]
    for tag, found in reader.found:
        assert not any(name in found for name in ("src", "srcset", "xlink:href", "action")), (tag, found)
        assert (found.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in found), (tag, found)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [found for found in reader.all("meta") if found.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none';")


def test_every_plot_is_a_table_too(case):
    text = case[1]
    figures = text.split("<figure")[1:]
    assert len(figures) >= 8
    for figure in figures:
        inner = figure[: figure.index("</figure>")]
        assert inner.count("<svg") >= 1
        assert inner.count("<table") == 1


def test_every_model_is_in_the_table_and_sortable(case):
    found, text = case
    table = text[text.index('<table class="models"') :]
    heads = re.findall(r'data-sort="(number|text)"', table[: table.index("</thead>")])
    assert len(heads) >= 10
    for report in found:
        for model in report.models:
            assert model.role in text


def test_the_verdict_stands_at_the_top(case):
    found, text = case
    top = re.sub(r"<[^>]*>", "", text[: text.index("<nav")])
    for report in found:
        for line in report.verdict.sentences:
            assert line.replace("'", "&#x27;") in top


def test_what_was_not_measured_and_where_it_was_run_is_told(case):
    found, text = case
    for report in found:
        for line in report.not_measured:
            assert line in text
        for name, version in report.environment.versions.items():
            assert name in text
            assert version in text
    assert "Recipe as given" in text


def test_texts_of_models_labels_and_data_never_become_markup():
    nasty = '</script></style><img src=x onerror="alert(1)">&amp;"\'`${1}'
    report = reports.language_model().as_json()
    report["samples"] = [{"prompt": nasty, "teacher": nasty, "student": nasty}]
    report["recipe"] = nasty
    report["given"]["task"]["text"] = nasty
    report["verdict"]["sentences"] = [nasty]
    report["not_measured"] = [nasty]
    report["environment"]["device"] = report["benchmark"]["machine"] = nasty
    report["benchmark"]["skipped"] = [{"role": nasty, "why": nasty}]
    for model in report["models"][-1:]:
        model["role"] = f"export:{nasty}"
    text = page.render([Report.model_validate(report)])
    reader = Reader(text)
    assert len(reader.all("script")) == 1
    assert not reader.all("img")
    assert '</script></style><img src=x onerror="alert(1)">&amp;"\'`${1}' in "".join(reader.words)


def test_names_of_groups_and_licences_are_shown_as_they_are():
    nasty = "<b>north</b> | \n# `south`"
    report = reports.grouped(nasty, f"{nasty} 2", column=nasty)
    report = reports.changed(report, given={**report.given, "export": {"license": nasty}})
    reader = Reader(page.render([report]))
    assert not reader.all("b")
    words = "".join(reader.words)
    assert words.count(nasty) >= 4, "in the table, its column, and the warning"


@pytest.mark.parametrize(
    ("task", "settings", "given", "call"),
    [
        ("text_classification", {}, '"a text"', 'answers(["a text"])'),
        (
            "text_classification",
            {"pair": "other"},
            '"a text" "a second text"',
            'answers([("a text", "a second text")])',
        ),
        ("question_answering", {}, '"a question" "a text"', 'answers([("a question", "a text")])'),
        ("image_classification", {}, '"picture.png"', 'answers(["picture.png"])'),
        ("causal_lm", {}, '"a prompt"', 'complete("a prompt", 50)'),
    ],
)
def test_the_code_to_deploy_gives_a_model_what_it_reads(task, settings, given, call):
    report = reports.classifier().model_copy(update={"task": task, "settings": {"task": settings}})
    words = "".join(Reader(sections.deploying(report)).words)
    assert f"distilpeft predict exports/onnx-int8 {given}\n" in words
    assert words.endswith(f'model = distilpeft.Bundle("exports/onnx-int8")\nprint(model.{call})')


def test_nothing_is_deployed_of_a_run_that_timed_nothing():
    assert sections.deploying(reports.bare()) == ""


def test_answers_by_class_are_tables_and_their_texts_are_no_markup():
    text = page.render([reports.classifier()])
    reader = Reader(text)
    assert len(reader.all("script")) == 1
    words = "".join(reader.words)
    assert "</script><script>alert(1)</script> | 1" in words
    assert "<b>positive</b>" in words
    assert "81.0%" in words, "17 of 21: the precision of the first class"
    assert "Where the time went" in words
    assert "The texts are from your data" in words
    answers = {**reports.ANSWERS, "mistakes": []}
    assert "from your data" not in page.render([reports.changed(reports.classifier(), answers=answers)])


def test_the_same_report_makes_the_same_page(case):
    assert page.render(case[0]) == case[1]


def test_an_older_or_barer_report_is_still_a_page():
    report = reports.classifier().as_json()
    for name in ("curves", "seeds", "comparisons", "not_measured", "samples", "soft_targets", "merging_cost"):
        report.pop(name, None)
    for model in report["models"]:
        for name in ("calibration", "decode", "load_s", "gpu_memory_bytes", "tokens_per_s"):
            model.pop(name, None)
    report["comparisons"] = []
    report["seeds"] = None
    text = page.render([Report.model_validate(report)])
    assert "<h2>Models" in text
    assert "<h2>Seeds" not in text
