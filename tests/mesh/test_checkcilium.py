"""What ``check`` says of a Cilium on the node, and what the agent refuses to start with: a line each."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath import libbpf
from lazymesh.datapath.libbpf import MAP_TYPE_LPM_TRIE, Map, MapLayout
from tests.support.bystander import Bystander
from tests.support.cilium import Cilium
from tests.support.etcd import wait_until
from tests.support.lab import Lab
from tests.support.node import beside_cilium, launched, options, status

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs("clang")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab."""
    with Lab(pods=2) as built:
        yield built


def findings(lab: Lab, *more: str) -> dict[str, tuple[str, str]]:
    """Return verdict and text by name."""
    report = lab.cli("check", "--clustermesh-config", str(lab.config), "-o", "json", *more, check=False)
    return {one["name"]: (one["verdict"], one["text"]) for one in json.loads(report.stdout)["findings"]}


def test_node_without_cilium(lab: Lab) -> None:
    """It is no failure."""
    verdict, text = findings(lab)["cilium"]
    assert verdict == "ok"
    assert "lazymesh uses its own" in text


def test_node_without_the_cilium_that_the_agent_insists_on(lab: Lab) -> None:
    """Said by whoever knows the agent's options; what is told of a Cilium that is there does not depend on it."""
    verdict, text = findings(lab, "--datapath", "cilium")["cilium"]
    assert verdict == "fail"
    assert text.startswith(f"no Cilium ipcache in {lab.bpffs}/tc/globals, which the agent waits for")
    assert findings(lab, "--datapath", "standalone") == findings(lab)
    with Cilium(lab):
        assert findings(lab, "--datapath", "cilium") == findings(lab)


def test_healthy_node(agent: Cilium, lab: Lab) -> None:
    """Which map, and whose program is first."""
    with beside_cilium(lab):
        found = findings(lab)
    assert found["cilium ipcache_v2"] == ("ok", f"map {agent.map_id}: v2-readonly, 512000 entries")
    assert found["attachment"] == ("ok", "our program is the first on lxc0, lxc1")


def test_two_pins(lab: Lab) -> None:
    """The one of another version is told from the one that counts."""
    with Cilium(lab, layout="v1", upgraded=True) as cilium:
        found = findings(lab)
        assert found["cilium ipcache"][0] == "ok"
        verdict, text = found["cilium ipcache_v2"]
        assert verdict == "warn"
        assert f"the running agent's is map {cilium.map_id}" in text
        old = cilium.map_id
        cilium.become("v2")
        cilium.begin().pin()
        verdict, text = findings(lab)["cilium ipcache_v2"]
        assert verdict == "warn"
        assert f"programs still read map {old} instead" in text, (
            "an upgrade under way: nothing may be removed"
        )


def test_pin_that_is_not_in_use(agent: Cilium, lab: Lab) -> None:
    """For a while that is how an agent starts."""
    old = agent.map_id
    agent.orphan_pin()
    verdict, text = findings(lab)["cilium ipcache_v2"]
    assert verdict == "warn"
    assert f"programs still read map {old} instead" in text
    assert "restart that agent" in text


def test_another_program_ahead_of_ours(agent: Cilium, lab: Lab) -> None:
    """Named, with the interface."""
    with beside_cilium(lab) as ours, Bystander(lab.node_a, lab.directory) as other:
        ours.kill()  # or it would be first again in half a second
        other.attach("lxc0")
        verdict, text = findings(lab)["attachment"]
    assert verdict == "warn"
    assert "lxc0: bystander is ahead of our program on lxc0" in text
    lab.cli("uninstall")


def test_clsact_where_tcx_is_in_use(lab: Lab) -> None:
    """Refused at the start; if Cilium goes over to tcx later, check and status say so."""
    words = options(lab, datapath="cilium", policy=None, attach="clsact")
    with Cilium(lab, attach="tcx"), launched(lab, *words) as refused:
        assert refused.process.wait(30) == 3
        assert "leave out --attach clsact" in refused.log
    with contextlib.ExitStack() as stack:
        with Cilium(lab, attach="clsact"):
            stack.enter_context(beside_cilium(lab, attach="clsact"))
            assert findings(lab)["attachment"][0] == "ok"
        with Cilium(lab, attach="tcx"):
            wait_until(lambda: "leave out --attach clsact" in " ".join(status(lab)["wrong"]), what="status")
            wait_until(lambda: findings(lab)["attachment"][0] == "fail", what="the filter to come back")
            assert "restart the agent without --attach clsact" in findings(lab)["attachment"][1]


def test_policy_of_our_own_is_for_nodes_without_cilium(agent: Cilium, lab: Lab) -> None:
    """Wrong usage, by auto as well."""
    for datapath in ("cilium", "auto"):
        with launched(lab, *options(lab, datapath=datapath)) as refused:
            assert refused.process.wait(30) == 2
            assert "--policy is for nodes without Cilium" in refused.log


@pytest.mark.parametrize(
    ("value", "flags", "readable"), [(28, 1, False), (24, 257, True)], ids=["value", "flags"]
)
def test_layout_that_nobody_knows(lab: Lab, value: int, flags: int, readable: bool) -> None:
    """Refused with what was found; what can be read can be read all the same."""
    pin = lab.bpffs / "tc/globals/cilium_ipcache_v2"
    pin.parent.mkdir(parents=True)
    try:
        with contextlib.closing(Map.create("x", MapLayout(MAP_TYPE_LPM_TRIE, 24, value, 100, flags))) as made:
            libbpf.pin(made.fd, pin)
        with launched(lab, *options(lab, datapath="auto", policy=None)) as refused:
            assert refused.process.wait(30) == 3
            assert f"value {value}B" in refused.log
        assert findings(lab)["cilium ipcache_v2"][0] == "fail"
        listed = lab.cli("ipcache", "list", "-o", "json", check=False)
        assert (listed.returncode, listed.stdout.strip()) == ((0, "{}") if readable else (3, ""))
    finally:
        pin.unlink()
        pin.parent.rmdir()
        pin.parent.parent.rmdir()
