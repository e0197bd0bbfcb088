"""The documentation site: it builds strictly, its links lead somewhere, and it opens without a request elsewhere."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support import chromium

pytest.importorskip("mkdocs", reason="the extra `site` is not installed")
ROOT = Path(__file__).parents[2]


class Links(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = {name: value for name, value in attributes if value}
        self.anchors |= {named[name] for name in ("id", "name") if name in named}
        if tag == "a" and "href" in named:
            self.links.add(named["href"])
        elif tag == "link" and named.get("rel") != "canonical":
            self.loads.add(named.get("href", ""))
        elif "src" in named:
            self.loads.add(named["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=ROOT, check=False,
        capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> list[Path]:
    return sorted(page for page in site.rglob("*.html") if page.parent.name != "examples")


def target(site: Path, page: Path, link: str) -> Path:
    path = unquote(urlsplit(link).path)
    file = (site / path.lstrip("/") if path.startswith("/") else page.parent / path) if path else page
    return file / "index.html" if file.is_dir() else file


@pytest.mark.thorough
def test_every_link_and_anchor_leads_somewhere(site):
    found = {page: Links(page) for page in pages(site)}
    assert len(found) >= 30
    for page, links in found.items():
        for link in links.links | links.loads:
            if urlsplit(link).scheme in ("http", "https", "mailto"):
                continue
            file = target(site, page, link)
            assert file.is_file(), f"{page.relative_to(site)}: {link}"
            anchor = unquote(urlsplit(link).fragment)
            if anchor and not anchor.startswith("__") and file.suffix == ".html":
                assert anchor in found[file.resolve()].anchors, f"{page.relative_to(site)}: {link}"


@pytest.mark.thorough
def test_no_page_loads_anything_from_another_server(site):
    for page in pages(site):
        elsewhere = {link for link in Links(page).loads if urlsplit(link).netloc}
        assert not elsewhere, page.relative_to(site)
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:", style.read_text(encoding="utf-8")), style.name


@pytest.mark.thorough
def test_the_reference_has_every_command_and_every_public_name(site):
    import distilpeft
    from distilpeft import losses

    commands = (site / "reference/command-line/index.html").read_text(encoding="utf-8")
    for name in ("init", "check", "run", "sweep", "export", "predict", "benchmark", "selftest"):
        assert f"distilpeft {name}" in commands
    shown = Links(site / "reference/api/index.html").anchors
    for module in (distilpeft, losses):
        for name in set(module.__all__) - {"IGNORED", "__version__"}:
            assert f"{module.__name__}.{name}" in shown


@chromium.needed
@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
@pytest.mark.thorough
def test_pages_open_in_a_browser_without_a_complaint(site, browser, width, height):
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.set_window_size(width, height)
        browser.get_log("browser")
        for page in ("", "tutorials/few-labels/", "losses/", "concepts/contract/", "recipes/", "reference/api/"):
            browser.get(f"http://127.0.0.1:{server.server_port}/{page}")
            wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, page
            assert browser.get_log("browser") == [], page
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_: object) -> None:
        """Print nothing."""
