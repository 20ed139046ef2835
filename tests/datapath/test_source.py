"""What BCC compiles, and what distinguishes one such text from another."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath import source

if TYPE_CHECKING:
    from collections.abc import Callable


def test_headers_of_ours_are_put_in_once_and_others_left_alone(tmp_path: Path) -> None:
    """A compiler's message names file and line as they are on disk."""
    (tmp_path / "include").mkdir()
    (tmp_path / "main.c").write_text(
        '#include <linux/types.h>\n#include "include/a.h"\n#include "include/b.h"\nlast\n'
    )
    (tmp_path / "include/a.h").write_text('#include "b.h"\nin a\n')
    (tmp_path / "include/b.h").write_text("in b\n")
    assert source.one_text(tmp_path / "main.c").splitlines() == [
        '#line 1 "main.c"',
        "#include <linux/types.h>",
        '#line 1 "a.h"',
        '#line 1 "b.h"',
        "in b",
        '#line 2 "a.h"',
        "in a",
        '#line 3 "main.c"',
        '#line 4 "main.c"',
        "last",
    ]


def test_our_c_is_whole() -> None:
    """No include of our own is left."""
    with resources.as_file(resources.files("lazymesh") / "bpf") as folder:
        text = source.one_text(folder / "lazymesh.c")
        guards = [
            re.findall(r"#ifndef (LAZYMESH_\w+)", path.read_text()) for path in folder.glob("include/*.h")
        ]
    assert len(guards) > 5
    assert [text.count(f"#define {guard}\n") for (guard,) in guards] == [1] * len(guards)
    assert '#include "' not in text


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "our C": lambda patch: patch.setattr(source, "one_text", lambda _path: "int nothing;"),
    "sizes of maps": lambda patch: patch.setattr(source, "expected_layouts", lambda _size: {}),
    "sizes of structs": lambda patch: patch.setattr(source, "STRUCTS", {}),
    "number of processors": lambda patch: patch.setattr(source, "possible_cpus", lambda: 4_096),
    "release": lambda patch: _exchange_kernel(patch, 2),
    "build": lambda patch: _exchange_kernel(patch, 3),
    "machine": lambda patch: _exchange_kernel(patch, 4),
}


def _exchange_kernel(patch: pytest.MonkeyPatch, number: int) -> None:
    words = list(os.uname())
    words[number] += "x"
    patch.setattr(os, "uname", lambda: os.uname_result(words))


@pytest.mark.parametrize("what", CHANGES)
def test_origin_changes_with(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them changes what is compiled, or whether it fits."""
    before = source.origin()
    assert source.origin() == before
    CHANGES[what](monkeypatch)
    assert source.origin() != before


@pytest.mark.parametrize("name", ["compiler.py", "programcache.py"])
def test_origin_changes_with_the_code_that_keeps(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A version that mends it does not go on with what it kept before."""
    here = Path(source.__file__).parent
    for each in ("compiler.py", "programcache.py"):
        (tmp_path / each).write_bytes((here / each).read_bytes())
    before = source.origin()
    monkeypatch.setattr(source, "__file__", str(tmp_path / "source.py"))
    assert source.origin() == before
    with (tmp_path / name).open("a") as file:
        file.write("# more\n")
    assert source.origin() != before
