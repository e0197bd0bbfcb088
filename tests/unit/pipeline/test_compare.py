"""What the comparison keeps of rows for the report."""

from __future__ import annotations

import pytest

from distilpeft.pipeline.stages.compare import LONGEST, shortened


@pytest.mark.parametrize("text", ["漢" * 5000, "a word " * 900], ids=["without spaces", "with spaces"])
def test_a_long_text_keeps_its_beginning_with_or_without_spaces(text):
    kept = shortened(text)
    assert len(kept) == LONGEST
    assert text.startswith(kept.removesuffix("…"))
    assert kept.endswith("…")


def test_a_short_text_is_kept_on_one_line():
    assert shortened("two\n  lines\tand a tab ") == "two lines and a tab"
