"""Cilium's clustermesh directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazymesh.errors import SettingsError
from lazymesh.roles.configdir import check_directories, read_directory

GOOD = "endpoints:\n- https://b.mesh.cilium.io:2379\n"


def test_only_files_that_name_endpoints_are_clusters(tmp_path: Path) -> None:
    """Certificates, directories and dangling links lie there too."""
    (tmp_path / "b").write_text(GOOD)
    (tmp_path / "b-ca.crt").write_text("-----BEGIN\n")
    (tmp_path / "..data").mkdir()
    (tmp_path / "gone").symlink_to("nowhere")
    found = read_directory(tmp_path)
    assert found.keys() == {"b"}
    assert found["b"].config is not None
    assert found["b"].error is None


def test_equal_content_has_an_equal_digest(tmp_path: Path) -> None:
    """A symlink swap alone is not a change; a comment is."""
    for name, text in (("one", GOOD), ("two", GOOD), ("three", GOOD + "# x\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b").write_text(text)
    link = tmp_path / "live"
    seen = []
    for name in ("one", "two", "three"):
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        seen.append(read_directory(link)["b"].digest)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("content", [b"endpoints: [", b"endpoints: 1\n", b"\xff endpoints: x"])
def test_file_that_cannot_be_used_says_why(tmp_path: Path, content: bytes) -> None:
    """It is one cluster's error; only where there is no other it ends the agent at its start."""
    (tmp_path / "b").write_bytes(content)
    (tmp_path / "c").write_text(GOOD)
    found = read_directory(tmp_path)
    assert found["b"].config is None
    assert found["b"].error
    assert found["c"].config is not None
    check_directories(tmp_path, None)
    (tmp_path / "c").unlink()
    with pytest.raises(SettingsError, match="cluster b: "):
        check_directories(tmp_path, None)


def test_owners_files_that_cannot_be_used_end_no_agent(tmp_path: Path) -> None:
    """Not even all of them: the caches, which are described elsewhere, do without."""
    for name, text in (("caches", GOOD), ("direct", "endpoints: [")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b").write_text(text)
    check_directories(tmp_path / "caches", tmp_path / "direct")


def test_name_that_is_no_text_costs_the_others_nothing(tmp_path: Path) -> None:
    """It could neither be a key nor be shown."""
    (tmp_path / "c").write_text(GOOD)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff")).write_text(GOOD)
    found = read_directory(tmp_path)
    assert found.keys() == {"b\ufffd", "c"}
    assert found["b\ufffd"].error == "its file name is not UTF-8: rename the file"


def test_missing_directory_names_the_option(tmp_path: Path) -> None:
    """The one that gave it; once the agent runs, there is none to give."""
    with pytest.raises(SettingsError, match=r"another with --clustermesh-config$"):
        check_directories(tmp_path / "none", tmp_path)
    with pytest.raises(SettingsError, match=r"another with --remote-config$"):
        check_directories(tmp_path, tmp_path / "none")
    with pytest.raises(SettingsError, match=r"none: No such file or directory$"):
        read_directory(tmp_path / "none")
