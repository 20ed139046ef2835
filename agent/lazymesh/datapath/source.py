"""Our C as one text for BCC, and what else decides what the compiler makes of it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from importlib import resources
from pathlib import Path

from lazymesh.datapath.pins import expected_layouts


def one_text(source: Path) -> str:
    """Return a C file with our own headers put in where they are included, each once.

    BCC rewrites map accesses in its main file only, and we want them where they belong. ``#line`` keeps messages right.
    """
    seen: set[Path] = set()

    def inline(path: Path) -> str:
        seen.add(path)
        lines = [f'#line 1 "{path.name}"']
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            quoted = re.fullmatch(r'#include "(.+)"', line)
            if quoted is None:
                lines.append(line)
                continue
            header = (path.parent / quoted[1]).resolve()
            if header not in seen:
                lines.append(inline(header))
            lines.append(f'#line {number + 1} "{path.name}"')
        return "\n".join(lines)

    return inline(source.resolve()) + "\n"


def origin() -> str:
    """Return a digest of all that decides what is compiled and whether it fits.

    Our C; BCC's version; the kernel, which BCC asks as well; and the sizes that Python writes, which the loader checks.
    """
    with resources.as_file(resources.files("lazymesh") / "bpf") as source:
        text = one_text(source / "lazymesh.c")
    running = os.uname()
    sizes = str(expected_layouts(0))
    parts = (text, sizes, _bcc_version(), running.release, running.version, running.machine)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _bcc_version() -> str:
    """Read it from its file: the import alone costs 70 MB."""
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.origin is None:
        return ""
    version = Path(spec.origin).with_name("version.py")
    return version.read_text(encoding="utf-8") if version.is_file() else ""
