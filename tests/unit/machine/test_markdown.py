"""Texts of users in Markdown: read as they are, whatever is in them."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilpeft.machine import markdown

NASTY = "<img src=x onerror=alert(1)> | **bold**\n# head\r\n[link](http://a.b) `code` &lt; a_b _c_ \\| ~~x~~"


def read(text: str) -> str:
    """What a reader of Markdown sees: escapes and entities resolved."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text).replace("&lt;", "<").replace("&", "&amp;"))


@given(st.text(st.sampled_from("ab<>|*_`[]&;#\\~ \n\r\t\u2028ä"), max_size=30))
def test_a_text_is_read_as_it_is_on_one_line_and_ends_no_cell(text):
    shown = markdown.plain(text)
    assert len(shown.splitlines()) <= 1
    assert "<" not in shown
    assert not re.search(r"(?<!\\)(\\\\)*\|", shown), "every bar has an odd number of backslashes before it"
    if "&" not in text:
        assert read(shown) == " ".join(text.split())


def test_nothing_in_a_text_is_markup():
    shown = markdown.plain(NASTY)
    assert shown == (
        r"&lt;img src=x onerror=alert(1)> \| \*\*bold\*\* # head \[link\](http://a.b) \`code\` \&lt; a_b \_c\_ "
        r"\\\| \~\~x\~\~"
    )


def test_a_table_keeps_its_columns_whatever_is_in_its_cells():
    lines = markdown.table([("group", "rows"), (NASTY, "3"), ("", "4"), ("student_ce_only", "5")])
    assert len(lines) == 5
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines] == [3] * 5
    assert lines[3:] == ["|  | 4 |", "| student_ce_only | 5 |"]


@pytest.mark.parametrize("text", ["a`b", "a\nb", "``` a"])
def test_code_stays_one_span_on_one_line(text):
    shown = markdown.code(text)
    assert shown.count("`") == 2
    assert "\n" not in shown
