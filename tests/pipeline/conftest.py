"""What the tests of whole runs share."""

from __future__ import annotations

import pytest
from support import chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = chromium.start(tmp_path_factory.mktemp("profile"))
    yield started
    started.quit()
