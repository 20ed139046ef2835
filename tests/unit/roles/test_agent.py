"""What the agent refuses before it touches the node; its life is told by the mesh tier."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import DatapathError, SettingsError
from lazymesh.roles import agent as module
from lazymesh.settings import AgentSettings, DatapathSettings, MeshSettings
from tests.support.lab import POLICY

if TYPE_CHECKING:
    from pathlib import Path

ALL = """\
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata:
  name: all
spec:
  endpointSelector: {}
  egress:
    - toEntities: [all]
"""


def settings(
    tmp_path: Path,
    *,
    policy: Path | None = None,
    interface: str = "lxc+",
    uplinks: tuple[str, ...] = (),
    shadow: bool = False,
) -> AgentSettings:
    """Return the settings of an agent on an empty directory."""
    mesh = MeshSettings("a", 1, clustermesh_config=tmp_path)
    return AgentSettings(
        mesh, DatapathSettings(tmp_path, (interface,), uplinks), policy=policy, shadow=shadow
    )


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


def test_policy_and_its_text_are_read(tmp_path: Path) -> None:
    """The text tells a restart whether the policy is the same."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    policy, text = module._read_policy(settings(tmp_path, policy=path, uplinks=("eth0",)))
    assert policy is not None
    assert text == POLICY
    assert module._read_policy(settings(tmp_path)) == (None, "")


def test_policy_that_enforces_nothing_needs_no_uplink(tmp_path: Path) -> None:
    """Nor does one in the shadow; test_bad_usage.py has those that do."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    assert module._read_policy(settings(tmp_path, policy=path, shadow=True))[1] == POLICY
    path.write_text(ALL)
    assert module._read_policy(settings(tmp_path, policy=path))[1] == ALL


def test_interface_named_exactly_must_exist(tmp_path: Path) -> None:
    """Wildcards need not match anything yet."""
    module.Agent(settings(tmp_path), None, 0)._check_interfaces()
    module.Agent(settings(tmp_path, interface="lo"), None, 0)._check_interfaces()
    with pytest.raises(DatapathError, match="no interface nosuch0"):
        module.Agent(settings(tmp_path, interface="nosuch0"), None, 0)._check_interfaces()


async def test_plain_directory_is_no_bpffs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is made in it."""
    with pytest.raises(DatapathError, match="mount -t bpf"):
        await module.Agent(settings(tmp_path), None, 0).run()
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240 - an empty directory blocks nobody
