"""Nothing of lazymesh is left on a node, and nothing of Cilium's is missing."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath import libbpf
from lazymesh.datapath.libbpf import MAP_TYPE_LPM_TRIE, Map, MapLayout
from tests.datapath.conftest import mounted_bpffs
from tests.support.etcd import wait_until
from tests.support.lab import Lab, remote_address
from tests.support.node import connect, dump, filters, launched, options, pins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.cilium import Cilium

pytestmark = pytest.mark.needs("clang")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab."""
    with Lab(pods=2) as built:
        yield built


def test_uninstall_leaves_no_trace(cilium: Cilium, lab: Lab) -> None:
    """Of an agent that was killed: programs, pins and exactly our entries go; it may be run twice."""
    peers = [remote_address(number) for number in range(5)]
    lab.publish_many(peers)
    cilium.upsert("10.2.7.7")
    before, pinned, attached = dump(cilium.pin), pins(lab), filters(lab.node_a)
    with launched(lab, *options(lab, datapath="cilium", policy=None)) as agent:
        agent.wait_ready()
        for peer in peers:
            assert connect(lab.pods[0].namespace, peer) is not None
        busy = lab.cli("uninstall", check=False)
        assert (busy.returncode, busy.stdout) == (3, "")
        assert "stop it first" in busy.stderr
        with mounted_bpffs() as elsewhere:
            astray = lab.cli("uninstall", "--bpffs", str(elsewhere), check=False)
        assert (astray.returncode, astray.stdout) == (3, ""), (
            "its programs are on these interfaces all the same"
        )
        assert f"(process {agent.pid}) runs in this network namespace: stop it first" in astray.stderr
        agent.kill()
    assert len(dump(cilium.pin)) == len(before) + len(peers)
    removed = json.loads(lab.cli("uninstall", "-o", "json").stdout)
    assert removed == {"entries": len(peers), "interfaces": ["eth0", "lxc0", "lxc1"], "pins": True}
    assert dump(cilium.pin) == before
    assert pins(lab) == pinned
    assert filters(lab.node_a) == attached
    again = json.loads(lab.cli("uninstall", "-o", "json").stdout)
    assert again == {"entries": 0, "interfaces": [], "pins": False}


def test_uninstall_in_the_middle_of_a_restart(agent: Cilium, lab: Lab) -> None:
    """Programs read a map that has lost its pin: ours go from it, too. A pin that nobody knows is no obstacle."""
    peer = remote_address(10)
    lab.publish(peer)
    with launched(lab, *options(lab, datapath="cilium", policy=None)) as ours:
        ours.wait_ready()
        assert connect(lab.pods[0].namespace, peer) is not None
        with contextlib.closing(Map.pinned(agent.pin)) as old:
            agent.begin().pin()
            wait_until(lambda: peer in agent.entries(), what="the entry to be carried over")
            ours.kill()
            unknown = Map.create("x", MapLayout(MAP_TYPE_LPM_TRIE, 24, 28, 100, 1))
            with contextlib.closing(unknown):
                libbpf.pin(unknown.fd, agent.stale_pin)
            assert json.loads(lab.cli("uninstall", "-o", "json").stdout)["entries"] == 2
            assert b"lm" not in {value[-4:-2] for _, value in old.items()}
    assert peer not in agent.entries()


def test_agent_that_is_stopped_while_it_starts_takes_out_what_its_last_life_has_left(
    agent: Cilium, lab: Lab
) -> None:
    """It has not looked at these entries yet, and without pins nobody would look after them."""
    peer = remote_address(30)
    lab.publish(peer)
    before, pinned, attached = dump(agent.pin), pins(lab), filters(lab.node_a)
    words = options(lab, datapath="cilium", policy=None, program_cache="off")
    with launched(lab, *words) as first:
        first.wait_ready()
        assert connect(lab.pods[0].namespace, peer) is not None
        first.kill()
    assert dump(agent.pin) != before
    with launched(lab, *words, "--cleanup") as second:
        wait_until(lambda: "starting " in second.log, 30, "it to begin to compile")
        assert second.stop() == 0
        assert "attached " not in second.log, "it was stopped before it had come far"
    assert (dump(agent.pin), pins(lab), filters(lab.node_a)) == (before, pinned, attached)


def test_standalone_agent_takes_out_what_its_life_beside_cilium_has_left(agent: Cilium, lab: Lab) -> None:
    """Nobody would look after these entries any more."""
    peer = remote_address(20)
    lab.publish(peer)
    before = dump(agent.pin)
    with launched(lab, *options(lab, datapath="cilium", policy=None)) as beside:
        beside.wait_ready()
        assert connect(lab.pods[0].namespace, peer) is not None
        beside.kill()
    assert dump(agent.pin) != before
    with launched(lab, *options(lab, policy=None), "--cleanup") as alone:
        alone.wait_ready()
        assert dump(agent.pin) == before
        assert connect(lab.pods[0].namespace, peer, 0.2) is None, "Cilium decides by its own map"
