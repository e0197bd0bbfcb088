"""The page in a real headless Chromium: it opens without a complaint, sorts, shows its points, and fits a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import chromium, reports

from distilpeft.report.page import page
from distilpeft.report.schema import Report

pytestmark = [chromium.needed, pytest.mark.thorough]


def opened(browser, folder: Path, found: list[Report]):
    file = folder / "report.html"
    file.write_text(page.render(found), encoding="utf-8")
    browser.get_log("browser")
    browser.get(file.as_uri())
    return browser


@pytest.fixture
def classifier(browser, tmp_path):
    return opened(browser, tmp_path, [reports.classifier()])


@pytest.mark.parametrize("case", [[reports.classifier], [reports.language_model], reports.two_runs])
def test_the_page_opens_without_a_complaint(browser, tmp_path, case):
    found = case() if callable(case) else [one() for one in case]
    opened(browser, tmp_path, found)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.querySelectorAll('section').length") >= 9


def test_every_timed_model_is_a_visible_point_on_the_pareto_plot(classifier):
    timed = [model for model in reports.classifier().models if model.latency_ms]
    points = classifier.execute_script("""
        const svg = document.querySelector('[data-chart="latency"] .on-wide svg'), frame = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('.point')].map((point) => {
            const box = point.querySelector('.solid, .hollow').getBoundingClientRect();
            const inside = box.left >= frame.left && box.right <= frame.right && box.top >= frame.top
                && box.bottom <= frame.bottom;
            return [Number(point.dataset.x), Number(point.dataset.y), inside && box.width > 5,
                getComputedStyle(point.querySelector('.solid, .hollow')).fill];
        });""")
    expected = {(model.latency_ms.p50, model.scores["accuracy"].value) for model in timed}
    assert {(x, y) for x, y, _, _ in points} == expected
    assert len(points) == len(timed) >= 6
    assert all(visible for _, _, visible, _ in points)
    assert len({colour for *_, colour in points}) >= 5


def column(browser, title: str) -> list[float | None]:
    return browser.execute_script(
        """
        const table = document.querySelector('table.models');
        const head = [...table.tHead.rows[0].cells].find((cell) => cell.textContent.startsWith(arguments[0]));
        return [...table.tBodies[0].rows].map((row) => 'value' in row.cells[head.cellIndex].dataset
            ? Number(row.cells[head.cellIndex].dataset.value) : null);""",
        title,
    )


def choose(browser, title: str, *, key: str | None = None) -> str:
    """Click a column's head, or press a key on it; its aria-sort afterwards."""
    button = browser.execute_script(
        "return [...document.querySelectorAll('table.models th button')]"
        ".find((one) => one.textContent.startsWith(arguments[0]))",
        title,
    )
    if key:
        button.send_keys(key)
    else:
        browser.execute_script("arguments[0].click()", button)
    return browser.execute_script("return arguments[0].closest('th').getAttribute('aria-sort')", button)


def test_a_columns_head_sorts_both_ways_and_what_is_missing_stays_last(classifier):
    from selenium.webdriver.common.keys import Keys

    before = column(classifier, "p50")
    figures = sorted(value for value in before if value is not None)
    lacking = [None] * before.count(None)
    assert lacking
    assert choose(classifier, "p50") == "ascending"
    assert column(classifier, "p50") == figures + lacking != before
    assert choose(classifier, "p50", key=Keys.ENTER) == "descending"
    assert column(classifier, "p50") == figures[::-1] + lacking


def test_pointing_at_a_point_or_focusing_it_shows_its_figures(classifier):
    shown = classifier.execute_script("""
        const svg = document.querySelector('[data-chart="latency"] .on-wide svg');
        const point = [...svg.querySelectorAll('.point')].find((one) => one.dataset.tip.startsWith('teacher\\n'));
        const tip = document.getElementById('tip');
        const states = [tip.hidden];
        point.dispatchEvent(new PointerEvent('pointerenter'));
        states.push(tip.hidden, tip.textContent);
        point.dispatchEvent(new PointerEvent('pointerleave'));
        states.push(tip.hidden);
        return states;""")
    hidden, over, text, left = shown
    assert (hidden, over, left) == (True, False, True)
    assert "0.8289" in text
    assert "18.24" in text


def test_the_keyboard_reaches_every_point(classifier):
    from selenium.webdriver.common.keys import Keys

    first = classifier.find_element("css selector", '[data-chart="latency"] .on-wide .point[tabindex="0"]')
    first.send_keys(Keys.ARROW_RIGHT)
    second = classifier.switch_to.active_element
    tip = classifier.find_element("id", "tip")
    assert second.get_attribute("data-tip").startswith("openvino")
    assert tip.is_displayed()
    assert tip.text.startswith("openvino")
    second.send_keys(Keys.ARROW_LEFT)
    assert classifier.find_element("id", "tip").text.startswith("onnx-int8")
    first.send_keys(Keys.ESCAPE)
    assert not classifier.find_element("id", "tip").is_displayed()


def test_the_theme_can_be_changed(classifier):
    colour = "return getComputedStyle(document.body).backgroundColor"
    before = classifier.execute_script(colour)
    classifier.execute_script("document.getElementById('theme').click()")
    after = classifier.execute_script(colour)
    assert before != after
    classifier.execute_script("document.getElementById('theme').click()")
    assert classifier.execute_script(colour) == before


def screen(browser, **settings) -> None:
    if settings:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"deviceScaleFactor": 1, **settings})
    else:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("case", [[reports.classifier], [reports.language_model], reports.two_runs])
def test_a_phone_shows_all_without_scrolling_sideways(browser, tmp_path, case):
    screen(browser, width=375, height=800, mobile=True)
    try:
        opened(browser, tmp_path, case() if callable(case) else [one() for one in case])
        assert browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [375, 375]
        small = browser.execute_script("""
            const shown = [...document.querySelectorAll('svg.chart text')].filter((one) => one.getClientRects().length);
            return Math.min(...shown.map((one) => one.getBoundingClientRect().height));""")
        assert small >= 9, "letters of plots stay legible"
    finally:
        screen(browser)


def test_a_desktop_shows_tables_in_full_over_its_width(browser, tmp_path):
    screen(browser, width=1400, height=900, mobile=False)
    try:
        opened(browser, tmp_path, [reports.classifier()])
        browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
        tables, cut = browser.execute_script("""
            const boxes = [...document.querySelectorAll('section > .scroll, section > details > .scroll')];
            return [boxes.length, boxes.filter((box) => box.scrollWidth > box.clientWidth)
                .map((box) => box.getAttribute('aria-label'))];""")
        assert tables >= 9
        assert cut == []
        assert browser.execute_script("return document.querySelector('.models').getBoundingClientRect().width") > 1300
    finally:
        screen(browser)


def test_paper_shows_what_is_folded_away_and_no_buttons(classifier):
    classifier.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        classifier.execute_script("dispatchEvent(new Event('beforeprint'))")
        assert classifier.execute_script("return document.querySelectorAll('details:not([open])').length") == 0
        assert classifier.execute_script("return document.getElementById('theme').getClientRects().length") == 0
        classifier.execute_script("dispatchEvent(new Event('afterprint'))")
        assert classifier.execute_script("return document.querySelectorAll('details:not([open])').length") > 5
    finally:
        classifier.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_without_script_the_page_still_tells_everything(browser, tmp_path):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(browser, tmp_path, [reports.classifier()])
        text = browser.find_element("css selector", "main").text
        assert "0.8289" in text
        assert not browser.find_element("id", "theme").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
