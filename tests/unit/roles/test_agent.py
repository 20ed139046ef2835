"""What the agent refuses before it touches the node; its life is told by the mesh tier."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from lazymesh.core.model import Direction
from lazymesh.core.policy import PolicyEngine
from lazymesh.core.policyfile import parse_policy
from lazymesh.errors import DatapathError, SettingsError
from lazymesh.roles import agent as module
from lazymesh.settings import AgentSettings, DatapathSettings, MeshSettings
from tests.support.lab import BOTH_WAYS, POLICY

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


def test_policy_is_read_if_there_is_one(tmp_path: Path) -> None:
    """From its file."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    assert module._read_policy(settings(tmp_path, policy=path, uplinks=("eth0",))) == parse_policy(
        POLICY, "policy.yaml"
    )
    assert module._read_policy(settings(tmp_path)) is None


class FakeMaps:
    """The kernel's settings and policy map; ``order`` tells what was written, one after the other."""

    def __init__(self, tag: int, enforced: int) -> None:
        self.order: list[object] = []
        self.settings = SimpleNamespace(policy_tag=tag, enforced=enforced)
        self.config = self.policy = self

    def read(self) -> SimpleNamespace:
        """Return the settings."""
        return self.settings

    def change(self, **words: int) -> None:
        """Change settings."""
        self.order.append(words)

    def items(self) -> set[tuple[Direction, int]]:
        """Return what an earlier life has allowed."""
        return {(Direction.EGRESS, 7)}

    def apply(self, allow: object, revoke: object) -> None:
        """Write the policy map."""
        self.order.append((list(cast("Any", allow)), list(cast("Any", revoke))))


@pytest.mark.parametrize(
    ("policy", "shadow", "enforced"),
    [
        pytest.param(POLICY, False, 1, id="another policy"),
        pytest.param(BOTH_WAYS, False, 3, id="another one, both ways"),
        pytest.param(POLICY, True, 0, id="another policy, in shadow mode"),
        pytest.param(None, False, 0, id="no policy any more"),
    ],
)
def test_rights_of_another_policy_are_nobodys_before_they_change(
    tmp_path: Path, policy: str | None, shadow: bool, enforced: int
) -> None:
    """The agent may die half-way; and what is not enforced any more is not denied while the map is empty."""
    maps = FakeMaps(17, 3)
    parsed = parse_policy(policy, "p") if policy else None
    agent = module.Agent(replace(settings(tmp_path), shadow=shadow), parsed)
    agent._enforcement(cast("Any", maps), PolicyEngine(parsed) if parsed else None)
    assert maps.order == [{"policy_tag": 0, "enforced": enforced}, ([], [(Direction.EGRESS, 7)])]


def test_rights_of_the_same_policy_stay(tmp_path: Path) -> None:
    """A restart is none of its flows' business."""
    policy = parse_policy(POLICY, "p")
    maps = FakeMaps(policy.tag, 1)
    module.Agent(settings(tmp_path), policy)._enforcement(cast("Any", maps), PolicyEngine(policy))
    assert maps.order == []


def test_policy_that_enforces_nothing_needs_no_uplink(tmp_path: Path) -> None:
    """Nor does one in the shadow; test_bad_usage.py has those that do."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    assert module._read_policy(settings(tmp_path, policy=path, shadow=True)) == parse_policy(POLICY, "p")
    path.write_text(ALL)
    assert module._read_policy(settings(tmp_path, policy=path)) == parse_policy(ALL, "p")


def test_interface_named_exactly_must_exist(tmp_path: Path) -> None:
    """Wildcards need not match anything yet."""
    module.Agent(settings(tmp_path), None)._check_interfaces()
    module.Agent(settings(tmp_path, interface="lo"), None)._check_interfaces()
    with pytest.raises(DatapathError, match="no interface nosuch0"):
        module.Agent(settings(tmp_path, interface="nosuch0"), None)._check_interfaces()


async def test_plain_directory_is_no_bpffs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is made in it."""
    with pytest.raises(DatapathError, match="mount -t bpf"):
        await module.Agent(settings(tmp_path), None).run()
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240 - an empty directory blocks nobody
