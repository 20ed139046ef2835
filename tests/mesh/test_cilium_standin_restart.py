"""The stand-in for cilium-agent restarts as real ones were seen to: the scene that lazymesh is there to win."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.bpfobject import map_exists
from tests.support.cilium_boot import FILLED, PINNED, SWITCHED, Timeline
from tests.support.etcd import wait_until
from tests.support.lab import (
    OTHER_IDENTITY,
    REMOTE_CIDRS,
    SERVER_IDENTITY,
    Lab,
    remote_address,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.cilium import Cilium


pytestmark = pytest.mark.needs("clang")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab; each test brings an agent of its own."""
    with Lab(pods=2) as built:
        yield built


def test_restart_takes_the_pin_away_for_a_moment_and_puts_a_new_map_there(
    cilium: Cilium, lab: Lab, flow
) -> None:
    """The old map stays under the pin at first, then nothing is there, then a new map without foreign entries."""
    peer, foreign = remote_address(0), remote_address(1)
    cilium.upsert(peer)
    cilium.write_from_outside(foreign, SERVER_IDENTITY)
    before = cilium.map_id
    seen: list[int | None] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            now = cilium.map_id
            if not seen or seen[-1] != now:
                seen.append(now)

    watcher = threading.Thread(target=watch)
    watcher.start()
    boot = cilium.restart(repin_after=0.2, pin_missing=0.05, switch_after=0.6)
    pinned = boot.wait(PINNED)
    both = [flow(lab.pods[0], peer), flow(lab.pods[0], foreign)]
    boot.wait(FILLED)
    assert all(one.passes() for one in both), "old programs read the old map"
    assert {one.ipcache_ids for one in cilium.programs().values()} == {frozenset({before})}
    boot.wait(SWITCHED)
    over.set()
    watcher.join()
    assert seen == [before, None, cilium.map_id]
    assert pinned >= 0.25
    assert both[0].passes()
    assert both[1].is_lost(), "foreign entries are not carried over"
    assert {one.ipcache_ids for one in cilium.programs().values()} == {frozenset({cilium.map_id})}
    wait_until(lambda: not map_exists(before), what="the old map to go with its last user")


def test_programs_that_switch_in_mid_fill_drop_what_is_not_filled_yet(cilium: Cilium, lab: Lab, flow) -> None:
    """Each pod by its own switch; the listing goes by the text of the addresses."""
    peers = [remote_address(number) for number in range(40)]
    cilium.upsert_many(peers)
    first, last = min(peers), max(peers)
    flows = {(pod.number, peer): flow(pod, peer) for pod in lab.pods for peer in (first, last)}
    assert all(one.passes() for one in flows.values())
    boot = cilium.begin()
    boot.pin()
    left = boot.fill(1)
    boot.switch("lxc0")
    assert left == len(peers) - 1
    assert flows.pop((0, last)).is_lost()
    assert all(one.passes() for one in flows.values())
    assert boot.fill() == 0
    boot.switch()
    assert flow(lab.pods[0], last).passes()
    assert cilium.packets(outcome="denied") == 1


def test_slow_fill_costs_a_flow_the_time_from_switch_to_its_entry(agent: Cilium, lab: Lab, flow) -> None:
    """The blackout of a big mesh in small: by the clock, in threads, one entry after the other."""
    peers = [remote_address(number) for number in range(1000)]
    agent.upsert_many(peers)
    late = flow(lab.pods[0], max(peers))
    began = time.monotonic()
    boot = agent.start(Timeline(repin_after=0.1, fill_rate=500, switch_after={"lxc0": 0.5, "eth0": 0.5}))
    losses = []
    while not boot.is_done(FILLED):
        # Dropped for certain only if the stand-in says so: an answer can be late on a busy machine.
        before = agent.packets(outcome="denied")
        if late.is_lost(0.02) and agent.packets(outcome="denied") > before:
            losses.append(time.monotonic() - began)
    assert late.passes()
    assert boot.times[FILLED] - boot.times[PINNED] > 1.9
    assert losses[0] > 0.5, "nothing is lost before the switch"
    assert losses[-1] - losses[0] > 0.5
    assert agent.packets(outcome="denied") == len(losses)
    assert not boot.is_done(SWITCHED), "lxc1 was left out of the timeline"
    boot.switch()


def test_changes_while_it_starts_wait_behind_the_listing(agent: Cilium) -> None:
    """What a watch brings comes after what the listing brings, a delete of it too."""
    agent.upsert_many(["10.2.1.1", "10.2.1.2"])
    boot = agent.begin()
    boot.pin()
    agent.upsert("10.2.1.3")
    agent.delete("10.2.1.1")
    boot.fill(2)
    assert {"10.2.1.1", "10.2.1.2"} <= set(agent.entries())
    assert "10.2.1.3" not in agent.entries()
    boot.fill()
    assert {p for p in agent.entries() if p.startswith("10.2.1.")} == {"10.2.1.2", "10.2.1.3"}
    assert agent.upsert("10.2.1.4")


def test_changes_while_it_is_away_are_found_at_its_start(agent: Cilium, lab: Lab, flow) -> None:
    """A dead agent writes nothing, and traffic goes on by the last map; the next one lists what is there now."""
    peer = remote_address(0)
    agent.upsert_many([peer, "10.2.1.2"])
    agent.stop()
    assert not agent.upsert("10.2.1.3")
    assert not agent.delete("10.2.1.2")
    assert "10.2.1.2" in agent.entries()
    assert flow(lab.pods[0], peer).passes()
    agent.start()
    assert {p for p in agent.entries() if p.startswith("10.2.")} == {REMOTE_CIDRS[0], peer, "10.2.1.3"}


def test_agent_that_dies_in_mid_fill_leaves_half_a_map(agent: Cilium, lab: Lab, flow) -> None:
    """Programs that were not switched go on with the old map; the next start lists everything again."""
    peers = [remote_address(number) for number in range(20)]
    agent.upsert_many(peers)
    boot = agent.begin()
    boot.pin()
    boot.fill(3)
    agent.stop()
    assert len(set(peers) & set(agent.entries())) == 3
    assert flow(lab.pods[0], max(peers)).passes()
    agent.start()
    assert set(peers) <= set(agent.entries())


def test_listing_takes_over_what_others_wrote_into_the_new_map(cilium: Cilium) -> None:
    """A prefix that somebody was quicker with is written over when its turn comes, in silence."""
    cilium.upsert_many(["10.2.1.1", "10.2.1.2"])
    boot = cilium.begin()
    boot.pin()
    for peer in ("10.2.1.2", "10.2.1.3"):
        cilium.write_from_outside(peer, OTHER_IDENTITY)
    boot.fill()
    found = {p: entry.identity for p, entry in cilium.entries().items() if p.startswith("10.2.1.")}
    assert found == {"10.2.1.1": SERVER_IDENTITY, "10.2.1.2": SERVER_IDENTITY, "10.2.1.3": OTHER_IDENTITY}
    assert cilium.log == []
    boot.switch()
