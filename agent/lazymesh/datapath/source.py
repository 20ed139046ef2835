"""Our C as one text for BCC, and a digest of everything that determines the compiled result."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from importlib import resources
from pathlib import Path

from lazymesh.datapath.abi import STRUCTS
from lazymesh.datapath.libbpf import possible_cpus
from lazymesh.datapath.pins import expected_layouts


def one_text(source: Path) -> str:
    """Return a C file with our headers inlined where they are included, each once.

    BCC rewrites map accesses in its main file only, and ours are in headers, too. ``#line`` keeps messages right.
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
    """Return a digest of what determines the compiled programs and whether they fit, except the compiler itself.

    Our C; the code that compiles and caches it; the sizes that Python writes, which the compiler checks; how many
    processors a signal may come from; and the kernel, which BCC queries as well.
    """
    with resources.as_file(resources.files("lazymesh") / "bpf") as source:
        parts = [one_text(source / "lazymesh.c")]
    parts += [
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("compiler.py", "programcache.py")
    ]
    parts += [str(expected_layouts(0)), str({name: ctypes.sizeof(each) for name, each in STRUCTS.items()})]
    parts.append(str(possible_cpus()))
    running = os.uname()
    parts += [running.release, running.version, running.machine]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
