"""What uninstall asks for first; that it leaves nothing is told by the mesh tier."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import DatapathError
from lazymesh.roles.uninstall import uninstall

if TYPE_CHECKING:
    from pathlib import Path


async def test_root_is_asked_for_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before it is found out that others cannot even look."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(DatapathError, match="needs root"):
        await uninstall(tmp_path)


async def test_plain_directory_is_no_bpffs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A slip in --bpffs removes nothing."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "lazymesh").mkdir()
    with pytest.raises(DatapathError, match="mount -t bpf"):
        await uninstall(tmp_path)
    assert (tmp_path / "lazymesh").is_dir()
