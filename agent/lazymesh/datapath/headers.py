"""Finds kernel headers for BCC, even on a kernel that ships none.

Our program uses only uapi types and helpers, so any distribution's headers will do. Debian splits them into two trees
(generated files in ``build``, the rest in ``source``); BCC knows that split only for the running kernel, so for any
other release the two are merged into one tree of symbolic links, in a directory that the caller provides.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lazymesh.datapath.kernelfeatures import version_of
from lazymesh.errors import DatapathError

_ARCHES = {"x86_64": "x86", "aarch64": "arm64", "riscv64": "riscv", "ppc64le": "powerpc", "s390x": "s390"}


@dataclass(frozen=True, slots=True)
class KernelHeaders:
    """A usable set of headers: one tree, or Debian's two halves."""

    release: str
    build: Path
    source: Path
    running: bool
    """They belong to the running kernel: BCC finds those by itself."""


IMAGE_MODULES = Path("/usr/lib/lazymesh/modules")
"""The image brings its own headers, laid out the same way, because a node may have none."""


def find_headers(
    modules: Path = Path("/lib/modules"), release: str | None = None, own: Path = IMAGE_MODULES
) -> KernelHeaders:
    """Return the running kernel's headers, else the newest installed, else the image's; DatapathError if none."""
    release = release or os.uname().release
    candidates = [modules / release]
    for place in (modules, own):
        if place.is_dir():
            candidates += sorted(place.iterdir(), key=lambda path: version_of(path.name), reverse=True)
    for tree in candidates:
        build, source = tree / "build", tree / "source"
        if (build / "include/generated/autoconf.h").is_file():
            source = source if (source / "include").is_dir() else build
            return KernelHeaders(tree.name, build.resolve(), source.resolve(), tree.name == release)
    raise DatapathError(
        "no kernel headers found, which BCC needs to compile: install linux-headers-amd64 (or your architecture's);"
        f" those of another kernel than {release} will do"
    )


def merge_headers(headers: KernelHeaders, into: Path) -> Path:
    """Merge both halves into one tree of symbolic links, for BCC_KERNEL_SOURCE; return it."""
    arch = Path("arch") / _ARCHES.get(os.uname().machine, os.uname().machine) / "include"
    for folder in (Path("include"), arch):
        (into / folder).mkdir(parents=True)
        for half in (headers.build, headers.source):
            for item in sorted((half / folder).iterdir()) if (half / folder).is_dir() else ():
                link = into / folder / item.name
                if not link.is_symlink():
                    link.symlink_to(item)
    return into
