"""The shell blocks of docs/ that people are to type, by what they are marked with, and a shell that stops at errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]


def marks() -> set[str]:
    """Return what blocks are marked with, the unmarked left out."""
    texts = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    return {mark for text in texts for mark in re.findall(r"^```sh (.+)$", text, re.MULTILINE)}


def blocks(mark: str) -> list[tuple[str, str]]:
    """Return file and text of each block with this mark."""
    return [
        (path.name, text)
        for path in sorted((ROOT / "docs").glob("*.md"))
        for found, text in re.findall(r"^```sh ?(.*)\n((?:.*\n)*?)```$", path.read_text(), re.MULTILINE)
        if found == mark
    ]


def shell(text: str, prefix: list[str], env: Mapping[str, str]) -> str:
    """Run a block and return what it says; that is in the error, too."""
    path = f"{Path(sys.executable).parent}:{env.get('PATH', os.environ['PATH'])}"
    done = subprocess.run(
        [*prefix, "bash", "-euo", "pipefail", "-c", text],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **env, "PATH": path},
        timeout=100,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
