"""Each kind of Cilium: its first connections, its reloads, its restarts under traffic; with lazymesh nobody notices."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.support.cilium import Cilium
from tests.support.etcd import wait_until
from tests.support.lab import SERVER_IDENTITY, Lab, remote_address
from tests.support.node import beside_cilium, connect, metric, programs, status
from tests.support.restart import Scene, addresses, play

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

pytestmark = pytest.mark.needs("clang")

SCENE = Scene(endpoints=1_000, fill_rate=400, switch_after_s=1.0, lead_s=0.6)
FULL_SCENE = Scene(
    endpoints=3_000, fill_rate=1_500, switch_after_s=1.6, flows=20, fresh_every_s=0.05, lead_s=0.6
)
UNKNOWN = 5_000
"""Numbers of pods that Cilium does not know begin here."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab, with a store that knows everybody."""
    with Lab(pods=1) as built:
        built.publish_many(addresses(FULL_SCENE.endpoints))
        yield built


def test_without_lazymesh_packets_are_lost_until_the_map_is_filled(agent: Cilium, lab: Lab) -> None:
    """The scene is as bad as it is told to be."""
    agent.upsert_many(addresses(SCENE.endpoints))
    seen = play(agent, lab.pods[0], SCENE)
    assert seen.fates.lost > 100
    assert seen.lost_for_s > 1


def test_with_lazymesh_no_packet_is_ever_taken_for_the_worlds(cilium: Cilium, lab: Lab) -> None:
    """Not to pods that Cilium does not know, not after reloads, and not while it restarts."""
    cilium.upsert_many(addresses(SCENE.endpoints))
    with beside_cilium(lab) as agent:
        succeeds_at_once(cilium, lab)
        stays_first(cilium, lab)
        assert metric(agent, "lazymesh_entries_owned") == 4
        costs_nothing_to_restart(cilium, lab, agent)
        assert cilium.packets(outcome="denied") == 0
        # That a busy machine lets fewer misses in is not what this is about.
        assert [line for line in status(lab)["wrong"] if "--signal-rate" not in line] == []
    assert {remote_address(UNKNOWN, family) for family in (4, 6)}.isdisjoint(cilium.entries()), "--cleanup"


def succeeds_at_once(cilium: Cilium, lab: Lab) -> None:
    """A first connection to a pod that has not come to Cilium yet, of both families."""
    peers = [remote_address(UNKNOWN, family) for family in (4, 6)]
    lab.publish_many(peers)
    for peer in peers:
        took = connect(lab.pods[0].namespace, peer)
        assert took is not None
        assert took < 0.9, "a lost SYN is sent again after a second"
        assert cilium.entries()[peer].identity == SERVER_IDENTITY


def stays_first(cilium: Cilium, lab: Lab) -> None:
    """Cilium's loads put programs on the hook and delete filters of others: ours comes back to the front."""
    pod = lab.pods[0]
    for number in (1, 2):
        cilium.reload()
        wait_until(lambda: "lm_from_pod" in programs(lab.node_a, pod.interface), what="our program")
        peer = remote_address(UNKNOWN + number)
        lab.publish(peer)
        time.sleep(0.2)
        took = connect(pod.namespace, peer)
        assert took is not None
        assert took < 0.9


def costs_nothing_to_restart(cilium: Cilium, lab: Lab, agent: AgentProcess) -> None:
    """Established flows and new connections alike; and what Cilium writes is never written over."""
    seen = play(cilium, lab.pods[0], SCENE)
    counters = [line for line in agent.get("/metrics").splitlines() if "_packets_total" in line]
    assert seen.fates.lost == 0, counters
    assert seen.overwritten == 0
    shown = status(lab)["datapath"]["ipcache"]
    assert shown["recreated"] == 1
    wait_until(
        lambda: [one["id"] for one in status(lab)["datapath"]["ipcache"]["maps"]] == [cilium.map_id],
        what="the old map to be let go",
    )


def test_nearly_full_map_that_begins_anew_is_filled_all_the_same(lab: Lab) -> None:
    """97 %, as with 500,000 pods: what the old map had room for fits into the new one, and Cilium's own does, too."""
    with Cilium(lab, max_entries=3_100) as cilium:
        cilium.upsert_many(addresses(FULL_SCENE.endpoints))
        with beside_cilium(lab) as agent:
            wait_until(lambda: "nearly full" in " ".join(status(lab)["wrong"]), what="the alarm")
            seen = play(cilium, lab.pods[0], FULL_SCENE)
            assert metric(agent, "lazymesh_ipcache_lent_entries_total", outcome="refused") == 0
            assert metric(agent, "lazymesh_ipcache_lent_entries_total", outcome="warmed") > 0
            assert (seen.fates.lost, seen.overwritten, cilium.log) == (0, 0, [])
            wait_until(lambda: "nearly full" in " ".join(status(lab)["wrong"]), what="the alarm again")


def test_upgrade_is_a_restart_like_any_other(lab: Lab) -> None:
    """The new map is under another name, and the old pin stays: programs read that one for a while."""
    with Cilium(lab, layout="v1") as cilium:
        cilium.upsert_many(addresses(SCENE.endpoints))
        with beside_cilium(lab) as agent:
            cilium.become("v2")
            costs_nothing_to_restart(cilium, lab, agent)
