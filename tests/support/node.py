"""JavaScript programs that answer jobs with packages of npm."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def asked(folder: Path, script: Path, packages: list[str]) -> Callable[[Any], Any]:
    """Function: jobs for a script → its answers; skips where its packages cannot be installed into the folder."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), *packages]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install {packages[0]}: {' '.join(done.stderr.split())[:200]}")

    def ask(jobs: Any) -> Any:
        (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        command = ["node", str(script), str(folder), str(folder / "jobs.json"), str(folder / "answers.json")]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return json.loads((folder / "answers.json").read_text(encoding="utf-8"))

    return ask
