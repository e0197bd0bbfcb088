"""The documentation site: what it takes from outside `docs/`, and the pages that are written from the code.

`mkdocs build` loads this file. Links out of `docs/`, such as `../recipes/quickstart.yaml`, lead to copies under
`repository/`, so that the site is complete without a server for the sources.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

import typer.cli
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from distilpeft import cli

ROOT = Path(__file__).parents[1]
TAKEN = ("recipes/*", "benchmarks/LOG.md", "benchmarks/*.py", "benchmarks/results/*", "*.md", "LICENSE", "Dockerfile")
"""What documents link to outside `docs/`."""
LINK = re.compile(r"(?<!!)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
API = """# Python API

What is in `distilpeft` and `distilpeft.losses`. Examples are on the page [From Python](../python.md).

::: distilpeft
    options:
      members: [load_recipe, check, Check, run, Run, runs, clean, init, Bundle, InputError, GateError]

::: distilpeft.losses
    options:
      members:
        [distil_loss, fused_distil_loss, Head, Divergence, SoftTargetDataset, Sparse, DistilMixin, DistilTrainer]
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page, copies of what lies outside `docs/`, and the generated reference."""
    for path in sorted({path for pattern in TAKEN for path in ROOT.glob(pattern) if path.is_file()}):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place(name), abs_src_path=str(path)))
    files.append(File.generated(config, "reference/command-line.md", content=command_line()))
    files.append(File.generated(config, "reference/api.md", content=API))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links between documents lead to where the site has them."""
    del config, files
    source = repository_path(page.file.src_uri)
    if source is None:
        return markdown
    folder = posixpath.dirname(source)

    def moved(link: re.Match[str]) -> str:
        target = place(posixpath.normpath(posixpath.join(folder, link[1])))
        near = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"]({near}{link[2] or ''})"

    return LINK.sub(moved, markdown)


def place(name: str) -> str:
    """Where the site has a file of the repository."""
    if name == "README.md":
        return "index.md"
    return name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"


def repository_path(uri: str) -> str | None:
    """The file of the repository behind a page; None for generated pages."""
    if uri == "index.md":
        return "README.md"
    if uri.startswith("repository/"):
        return uri.removeprefix("repository/")
    return None if uri.startswith("reference/") else f"docs/{uri}"


def command_line() -> str:
    """All commands with their options, from their help."""
    command = typer.main.get_command(cli.app)
    text = typer.cli.get_docs_for_click(obj=command, ctx=typer.Context(command), name="distilpeft")
    return html.unescape(text).replace("# `distilpeft`", "# Command line", 1)
