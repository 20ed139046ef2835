"""From words to settings; running is left to the role."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from lazymesh.cli.agent import agent
from lazymesh.errors import SettingsError

if TYPE_CHECKING:
    from click.testing import Result

    from lazymesh.settings import AgentSettings


MEMBER = ("--cluster-name", "a", "--cluster-id", "1")


class Caught:
    """Runs the command with a role that only takes the settings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings: list[AgentSettings] = []
        self.found: list[Path | None] = []
        """Where compiled programs were looked for, before the role was started with what was found there."""
        monkeypatch.setattr(
            "lazymesh.cli.agent.find_programs", lambda cache: self.found.append(cache) or cache
        )
        monkeypatch.setattr("lazymesh.roles.agent.run_agent", self._take)
        monkeypatch.setattr("lazymesh.cli.agent.configure_logging", lambda *_: None)

    def _take(self, settings: AgentSettings, programs: object) -> None:
        assert programs is self.found[-1]
        self.settings.append(settings)

    def run(self, *argv: str, env: dict[str, str] | None = None) -> Result:
        """Run it as a member of a mesh."""
        return CliRunner().invoke(agent, [*MEMBER, *argv], env=env)


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Caught:
    """The command without its role."""
    return Caught(monkeypatch)


def test_defaults_are_those_of_a_node_with_cilium(caught: Caught, tmp_path: Path) -> None:
    """Cilium's directories, metrics on loopback, nothing dropped."""
    assert caught.run("--interface", "lxc+", "--bpffs", str(tmp_path)).exception is None
    (settings,) = caught.settings
    assert settings.mesh.clustermesh_config == Path("/var/lib/cilium/clustermesh")
    assert settings.metrics_address == ("127.0.0.1", 9968)
    assert settings.datapath.interfaces == ("lxc+",)
    assert settings.datapath.on_miss == "hold"
    assert not (settings.shadow)
    assert not (settings.cleanup)


def test_every_word_arrives_where_it_belongs(caught: Caught, tmp_path: Path) -> None:
    """One of each."""
    result = caught.run(
        *("--datapath", "standalone", "--interface", "a", "--interface", "b+", "--uplink", "eth0"),
        *("--cluster-name", "c", "--cluster-id", "300", "--max-connected-clusters", "511"),
        *("--mesh-cidr", "d=10.2.0.0/16", "--cluster-region", "eu", "--on-miss", "drop", "--shadow"),
        *("--metrics-address", "off", "--signal-rate", "0", "--bpffs", str(tmp_path)),
        *("--hold-timeout", "100ms", "--stale-limit", "1h30m"),
    )
    assert result.exception is None, result.output
    (settings,) = caught.settings
    assert settings.datapath.interfaces == ("a", "b+")
    assert (settings.datapath.on_miss, settings.datapath.hold_limit_s) == ("drop", 0.1)
    assert settings.stale_limit_s == 5400
    assert (settings.mesh.cluster_id, settings.mesh.max_connected_clusters) == (300, 511)
    assert settings.mesh.mesh_cidrs == (("d", ipaddress.ip_network("10.2.0.0/16")),)
    assert (settings.mesh.region, settings.metrics_address, settings.shadow) == ("eu", None, True)


def test_several_values_from_the_environment(caught: Caught, tmp_path: Path) -> None:
    """Separated by blanks."""
    caught.run("--bpffs", str(tmp_path), env={"LAZYMESH_INTERFACE": "lxc+ veth0", "LAZYMESH_CLEANUP": "1"})
    assert caught.settings[0].datapath.interfaces == ("lxc+", "veth0")
    assert caught.settings[0].cleanup


def test_interfaces_need_not_be_named_beside_cilium(caught: Caught, tmp_path: Path) -> None:
    """What auto means is found out by the role, as root; without Cilium there must be something to attach to."""
    for mode in ("auto", "cilium"):
        assert caught.run("--bpffs", str(tmp_path), "--datapath", mode).exception is None
    assert [(one.datapath.mode, one.datapath.interfaces) for one in caught.settings] == [
        ("auto", ()),
        ("cilium", ()),
    ]
    refused = caught.run("--bpffs", str(tmp_path), "--datapath", "standalone")
    assert isinstance(refused.exception, SettingsError)
