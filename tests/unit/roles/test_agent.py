"""What the agent refuses before it touches the node; its life is told by the mesh tier."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import DatapathError, SettingsError
from lazymesh.roles import agent as module
from tests.support.agentsettings import settings

if TYPE_CHECKING:
    from pathlib import Path


def test_root_is_asked_for_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before files are read that only root may read."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(DatapathError, match="needs root"):
        module.run_agent(settings(tmp_path, policy=tmp_path / "none"))


@pytest.mark.parametrize("content", [None, b"\xff", b"kind: ["])
def test_policy_that_cannot_be_used_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    """Missing, no text, no YAML."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    path = tmp_path / "policy.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"policy\.yaml"):
        module.run_agent(settings(tmp_path, policy=path))


async def test_plain_directory_is_no_bpffs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is made in it."""
    with pytest.raises(DatapathError, match="mount -t bpf"):
        await module.Agent(settings(tmp_path), None).run()
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240 - an empty directory blocks nobody
