"""What BCC is given to compile, and what tells one such text from another."""

from __future__ import annotations

import os
import re
from importlib import resources
from typing import TYPE_CHECKING

from lazymesh.datapath import source

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


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
    """Nothing of ours is left to be included."""
    with resources.as_file(resources.files("lazymesh") / "bpf") as folder:
        text = source.one_text(folder / "lazymesh.c")
        guards = [
            re.findall(r"#ifndef (LAZYMESH_\w+)", path.read_text()) for path in folder.glob("include/*.h")
        ]
    assert len(guards) > 5
    assert [text.count(f"#define {guard}\n") for (guard,) in guards] == [1] * len(guards)
    assert '#include "' not in text


def test_origin_is_that_of_text_compiler_and_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them changes what is compiled, or whether it fits."""
    known = {source.origin()}

    def changed() -> bool:
        found = source.origin()
        known.add(found)
        return True

    with monkeypatch.context() as patch:
        patch.setattr(source, "one_text", lambda _path: "int nothing;")
        changed()
    with monkeypatch.context() as patch:
        patch.setattr(source, "_bcc_version", lambda: "__version__ = '0.1'")
        changed()
    with monkeypatch.context() as patch:
        patch.setattr(source, "expected_layouts", lambda _size: {})
        changed()
    for number in (2, 3, 4):
        with monkeypatch.context() as patch:
            uname = list(os.uname())
            uname[number] += "x"
            patch.setattr(os, "uname", lambda uname=uname: os.uname_result(uname))
            changed()
    assert len(known) == 7
    assert source.origin() in known
