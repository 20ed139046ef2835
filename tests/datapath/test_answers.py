"""What the programs remember of the ipcache for a moment: never longer than a tick, never against the agent's word.

Here ``raw`` is the map as Cilium's agent writes it, behind our agent's back; ``bench.ipcache`` is our agent.
"""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

import pytest

from lazymesh.core.model import Direction, Entry
from lazymesh.datapath import abi
from tests.support import packets
from tests.support.packets import POD_B1, Flow, Host, pod_of_b
from tests.support.prog_run import TC_ACT_SHOT, TC_ACT_UNSPEC

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazymesh.core.model import Address
    from lazymesh.datapath.libbpf import Map
    from tests.datapath.conftest import Bench

IDENTITY, OTHER_IDENTITY = 131_073, 131_074
TICK_S = 0.01
"""The longest that a kernel has (HZ=100)."""
OFTEN = 20
VERSIONS = [pytest.param(version, id=f"IPv{version}") for version in (4, 6)]


@pytest.fixture
def mesh(bench: Bench) -> Bench:
    """Return the bench with cluster b in the mesh, every miss signalled, and pods of IDENTITY alone let in and out."""
    for cidr in packets.PODS_OF_B.values():
        bench.mesh({cidr: 2})
    bench.configure(enforced=frozenset(Direction), rearm_s=0)
    bench.datapath.policy.apply([(direction, IDENTITY) for direction in Direction], [])
    return bench


@pytest.fixture
def raw(mesh: Bench) -> Map:
    """Return the ipcache as others write it."""
    return mesh.maps["lm_ipcache"]


def outcome(bench: Bench, peer: Host = POD_B1, version: int = 4) -> str:
    """Send a packet to a peer; return what it was to the program, and check its verdict."""
    bench.forget_counts()
    verdict = bench.send(Direction.EGRESS, Flow(peer, version=version).echo_reply())
    counts = bench.counts(Direction.EGRESS)
    found = "missed" if "missed" in counts else "allowed" if "policy_allow" in counts else "denied"
    assert verdict == (TC_ACT_UNSPEC if found == "allowed" else TC_ACT_SHOT)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_entry_that_others_remove_is_good_until_the_next_tick_at_most(
    mesh: Bench, raw: Map, version: int
) -> None:
    """Remembered at all: in one of the rounds the packet behind the removal is still a hit."""
    key, entry = abi.pack_address_key(POD_B1.address(version)), abi.pack_entry(Entry(IDENTITY))
    frame, late = Flow(version=version).echo_reply(), 0
    for _ in range(50 * OFTEN):
        raw.update(key, entry)
        mesh.forget_counts()
        mesh.send(Direction.EGRESS, frame)
        raw.delete(key)
        mesh.send(Direction.EGRESS, frame)
        late = mesh.counts(Direction.EGRESS)["hit"] - 1
        if late:
            break
    assert late
    time.sleep(2 * TICK_S)
    assert outcome(mesh, version=version) == "missed"


@pytest.mark.parametrize("version", VERSIONS)
def test_agents_own_changes_count_from_the_next_packet_on(mesh: Bench, version: int) -> None:
    """On whichever CPU it is handled."""
    address = POD_B1.address(version)
    for _ in range(OFTEN):
        mesh.ipcache.replace(address, Entry(IDENTITY))
        assert [outcome(mesh, version=version) for _ in each_cpu()] == ["allowed"] * len(CPUS)
        mesh.ipcache.replace(address, Entry(OTHER_IDENTITY))
        assert [outcome(mesh, version=version) for _ in each_cpu()] == ["denied"] * len(CPUS)
        mesh.ipcache.delete(address)
        assert outcome(mesh, version=version) == "missed"


CPUS = sorted(os.sched_getaffinity(0))


def each_cpu() -> Iterator[int]:
    """Run on one CPU after the other."""
    try:
        for cpu in CPUS:
            os.sched_setaffinity(0, {cpu})
            yield cpu
    finally:
        os.sched_setaffinity(0, CPUS)


def test_miss_is_not_remembered(mesh: Bench, raw: Map) -> None:
    """An entry counts as soon as it is written, by whatever writer."""
    key = abi.pack_address_key(POD_B1.address(4))
    for _ in range(OFTEN):
        assert outcome(mesh) == "missed"
        raw.update(key, abi.pack_entry(Entry(IDENTITY)))
        assert outcome(mesh) == "allowed"
        mesh.ipcache.delete(POD_B1.address(4))


def place_of(address: Address) -> int:
    """Return the place of an address among what is remembered, as hash_of has it."""
    a = struct.unpack("=4I", address.ljust(16, b"\0"))
    return ((a[0] ^ a[2]) << 32 | (a[1] ^ a[3])) * 0x9E3779B97F4A7C15 % (1 << 64) >> 54


def test_peers_that_share_a_place_keep_their_identities(mesh: Bench) -> None:
    """One allowed, one denied, two packets of each in turns: looked up, remembered, and given up for the other."""
    first = pod_of_b(1)
    second = next(
        pod
        for pod in map(pod_of_b, range(2, 20_000))
        if place_of(pod.address(4)) == place_of(first.address(4))
    )
    mesh.entries({first.prefix(4): Entry(IDENTITY), second.prefix(4): Entry(OTHER_IDENTITY)})
    for _ in range(OFTEN):
        found = [outcome(mesh, peer) for peer in (first, first, second, second)]
        assert found == ["allowed", "allowed", "denied", "denied"]


def test_ipv6_address_with_the_bytes_of_an_ipv4_one_is_another_peer(mesh: Bench) -> None:
    """10.2.0.5 and a02:5:: lie in the same place and compare equal but for the family."""
    twin = Host("twin", POD_B1.v4, "a02:5::")
    assert place_of(twin.address(4)) == place_of(twin.address(6))
    mesh.mesh({"a02:5::/64": 2})
    mesh.entries({twin.prefix(4): Entry(IDENTITY), twin.prefix(6): Entry(OTHER_IDENTITY)})
    for _ in range(OFTEN):
        assert (outcome(mesh, twin, 4), outcome(mesh, twin, 6)) == ("allowed", "denied")


@pytest.mark.parametrize("double", ["fd00:3::1:0:5", "fd00:2:0:1::4"])
def test_ipv6_addresses_of_one_hash_are_two_peers(mesh: Bench, double: str) -> None:
    """An attacker who chooses addresses can make any number of these."""
    first, second = POD_B1, Host("its double", POD_B1.v4, double)
    assert place_of(first.address(6)) == place_of(second.address(6))
    mesh.mesh({"fd00:3::/48": 2})
    mesh.entries({first.prefix(6): Entry(IDENTITY), second.prefix(6): Entry(OTHER_IDENTITY)})
    for _ in range(OFTEN):
        assert (outcome(mesh, first, 6), outcome(mesh, second, 6)) == ("allowed", "denied")


def test_nothing_is_remembered_where_that_is_switched_off(mesh: Bench, raw: Map) -> None:
    """Also not what was remembered before."""
    key = abi.pack_address_key(POD_B1.address(4))
    for _ in range(OFTEN):
        mesh.datapath.config.remember(on=True)
        raw.update(key, abi.pack_entry(Entry(IDENTITY)))
        assert outcome(mesh) == "allowed"
        mesh.datapath.config.remember(on=False)
        raw.delete(key)
        assert outcome(mesh) == "missed"
        raw.update(key, abi.pack_entry(Entry(IDENTITY)))
        assert outcome(mesh) == "allowed"
        raw.delete(key)
        assert outcome(mesh) == "missed", "it was a hit while nothing was to be remembered"


def test_settings_void_what_is_remembered(mesh: Bench, raw: Map) -> None:
    """An agent that starts trusts nothing that was remembered for the one before it; after 2^32 generations, too."""
    key = abi.pack_address_key(POD_B1.address(4))
    config = mesh.datapath.config
    config.change(generation=0xFFFFFFFE)
    for _ in range(3):
        raw.update(key, abi.pack_entry(Entry(IDENTITY)))
        assert outcome(mesh) == "allowed"
        raw.delete(key)
        before = config.read().generation
        mesh.configure(enforced=frozenset(Direction), rearm_s=0)
        assert config.read().generation not in (0, before)
        assert outcome(mesh) == "missed"


def test_another_map_in_force_voids_what_the_first_one_said(mesh: Bench) -> None:
    """As when Cilium begins a new map."""
    mesh.entries({POD_B1.prefix(4): Entry(IDENTITY)})
    for _ in range(OFTEN):
        assert outcome(mesh) == "allowed"
        mesh.datapath.visible.show([])
        assert outcome(mesh) == "missed"
        mesh.datapath.visible.show([mesh.ipcache])
