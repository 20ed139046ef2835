"""What is decided and checked before the node is touched; test_bad_usage.py has it from the command line."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.policyfile import parse_policy
from lazymesh.datapath.interfaces import InterfaceSelection
from lazymesh.errors import DatapathError, SettingsError
from lazymesh.roles import preflight as module
from tests.support.agentsettings import settings
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


@pytest.mark.parametrize(("pinned", "mode"), [(True, "cilium"), (False, "standalone")])
def test_auto_is_decided_by_what_is_pinned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pinned: bool, mode: str
) -> None:
    """A mode that was named stays."""
    monkeypatch.setattr(module, "is_pinned_here", lambda _bpffs: pinned)
    given = settings(tmp_path)
    auto = replace(given, datapath=replace(given.datapath, mode="auto"))
    assert module.resolve_mode(auto).datapath.mode == mode
    assert module.resolve_mode(given) == given


def test_interfaces_default_to_ciliums_beside_cilium(tmp_path: Path) -> None:
    """Unless an interface or an uplink is named."""
    beside = settings(tmp_path).datapath
    for interfaces, uplinks, resolved in (((), (), ("lxc+",)), (("a",), (), ("a",)), ((), ("eth0",), ())):
        wanted = replace(beside, mode="cilium", interfaces=interfaces, uplinks=uplinks)
        found = module.resolve_mode(replace(settings(tmp_path), datapath=wanted))
        assert found.datapath.interfaces == resolved


def test_policy_is_refused_beside_cilium(tmp_path: Path) -> None:
    """Whose own policies decide."""
    given = settings(tmp_path, policy=tmp_path / "policy.yaml")
    with pytest.raises(SettingsError, match="--policy is for nodes without Cilium"):
        module.resolve_mode(replace(given, datapath=replace(given.datapath, mode="cilium")))


def test_policy_is_read_if_there_is_one(tmp_path: Path) -> None:
    """From its file."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    assert module.read_policy(settings(tmp_path, policy=path, uplinks=("eth0",))) == parse_policy(
        POLICY, "policy.yaml"
    )
    assert module.read_policy(settings(tmp_path)) is None


def test_policy_that_enforces_nothing_needs_no_uplink(tmp_path: Path) -> None:
    """Nor does one in the shadow; test_bad_usage.py has those that do."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    assert module.read_policy(settings(tmp_path, policy=path, shadow=True)) == parse_policy(POLICY, "p")
    path.write_text(ALL)
    assert module.read_policy(settings(tmp_path, policy=path)) == parse_policy(ALL, "p")


def test_interface_named_exactly_must_exist(tmp_path: Path) -> None:
    """Wildcards need not match anything yet."""
    module.check_interfaces(InterfaceSelection(("lxc+", "lo")))
    with pytest.raises(DatapathError, match="no interface nosuch0"):
        module.check_interfaces(InterfaceSelection(("nosuch0",)))
