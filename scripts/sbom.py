"""List the contents of an unpacked image, from its package databases, as CycloneDX JSON (for ``scripts/image``)."""

from __future__ import annotations

import json
import sys
from email.parser import HeaderParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = "lazymesh"


def main(root: Path) -> None:
    """Print the bill of materials of a root directory."""
    release = _release(root)
    parts = [*_debian(root, release), *_python(root)]
    program = next(part for part in parts if part["name"] == PROGRAM)
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": program | {"type": "container", "bom-ref": "image"}},
        "components": parts,
    }
    json.dump(document, sys.stdout, indent=1)
    print()


def _debian(root: Path, release: str) -> Iterator[dict[str, Any]]:
    """Yield the Debian packages; each has a file, since the image has no package manager."""
    for path in sorted((root / "var/lib/dpkg/status.d").iterdir()):
        fields = HeaderParser().parsestr(path.read_text(encoding="utf-8"))
        name, version, arch = fields["Package"], fields["Version"], fields["Architecture"]
        where = f"pkg:deb/debian/{name}@{_quoted(version)}?arch={arch}&distro=debian-{release}"
        yield _component(name, version, where)


def _python(root: Path) -> Iterator[dict[str, Any]]:
    """Yield the distributions of lazymesh's environment."""
    for path in sorted((root / "opt/lazymesh/lib").glob("python3.*/site-packages/*.dist-info/METADATA")):
        fields = HeaderParser().parsestr(path.read_text(encoding="utf-8"))
        name, version = fields["Name"], fields["Version"]
        component = _component(name, version, f"pkg:pypi/{name.lower().replace('_', '-')}@{version}")
        licence = fields["License-Expression"]
        yield component | ({"licenses": [{"expression": licence}]} if licence else {})


def _component(name: str, version: str, where: str) -> dict[str, Any]:
    return {"type": "library", "bom-ref": where, "name": name, "version": version, "purl": where}


def _release(root: Path) -> str:
    lines = (root / "usr/lib/os-release").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    return fields["VERSION_ID"].strip('"')


def _quoted(version: str) -> str:
    return version.replace("+", "%2B").replace(":", "%3A")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
