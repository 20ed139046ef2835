"""How little is asked: one read per address, nothing at all for the internet and for peers that are known."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from lazymesh.datapath import abi
from lazymesh.datapath.libbpf import Map
from lazymesh.datapath.pins import READER, Pins
from tests.support.etcd import wait_until
from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address
from tests.support.node import (
    Misses,
    entries,
    etcd_calls,
    have_wait,
    metric,
    packets,
    send_udp,
    status,
    wait_identity,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

INTERNET = ("198.51.100.7", "2001:db8::7")
READS = ("Range", "Txn")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab whose internet is node b's far side: packets leave the pod and end there."""
    with Lab(pods=1) as built:
        built.node_a.ip(
            ["route add 198.51.100.0/24 via 192.168.100.2", "route add 2001:db8::/32 via fd00:99::2"]
        )
        built.node_b.ip(["route add blackhole 198.51.100.0/24", "route add blackhole 2001:db8::/32"])
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab) -> Iterator[AgentProcess]:
    """One agent with the default rate limits."""
    running = lab.start_agent()
    yield running
    running.stop()


def reads(lab: Lab) -> int:
    """Return how many reads etcd has answered."""
    return sum(etcd_calls(lab, method) for method in READS)


@pytest.mark.parametrize("space", ["default", None])
def test_a_thousand_misses_for_one_address_are_one_read(
    lab: Lab, agent: AgentProcess, space: str | None
) -> None:
    """Found or not: one transaction with the address's two keys, and nothing for the 999 others."""
    ip = remote_address(10 if space else 11)
    if space:
        lab.publish(ip, space=space)
    before, signals = reads(lab), metric(agent, "cilium_ipcache_miss_signal_total")
    with Misses(lab.socket) as misses:
        send_udp(lab.pods[0].namespace, ip, 1000)
        assert misses.next(ip)["outcome"] == ("installed" if space else "absent")
    send_udp(lab.pods[0].namespace, ip, 10)
    assert reads(lab) - before == 1
    assert metric(agent, "cilium_ipcache_miss_signal_total") - signals <= 2


def test_pods_of_one_node_are_read_together(lab: Lab, agent: AgentProcess) -> None:
    """What has come together while etcd was busy is one range, and each address gets its own answer from it."""
    pods = [f"10.2.77.{number}" for number in range(200)]
    pushed, pull_only = pods[:60], pods[60:120]
    lab.publish_many([*pushed, "10.2.77.255"])
    lab.publish_many(pull_only, OTHER_IDENTITY, space="ondemand")
    before = reads(lab)
    lab.etcd.freeze()
    try:
        have_wait(lab, [f"10.2.{number}.1" for number in range(78, 86)], pods)
    finally:
        lab.etcd.thaw()
    wait_until(lambda: not status(lab)["queue"]["inFlight"], 5, "all answers")
    of_pods = {ip: entry.identity for ip, entry in entries(lab).items() if ip.startswith("10.2.77.")}
    assert of_pods == dict.fromkeys(pushed, SERVER_IDENTITY) | dict.fromkeys(pull_only, OTHER_IDENTITY)
    assert reads(lab) - before == 8 + 1


def test_later_misses_are_answered_from_the_negative_cache(lab: Lab, agent: AgentProcess) -> None:
    """After the re-arm interval the address is signalled again, and no read follows."""
    ip = remote_address(12)
    with Misses(lab.socket) as misses:
        send_udp(lab.pods[0].namespace, ip, 1)
        first = misses.next(ip)
        before = reads(lab)
        sent = []

        def signalled_again() -> bool:
            send_udp(lab.pods[0].namespace, ip, 1)
            sent.append(ip)
            return metric(agent, "lazymesh_resolutions_total", outcome="absent", cached="true") >= 1

        wait_until(signalled_again, 5, "a second signal")
        second = misses.next(ip)
    assert (first["outcome"], first["reason"], first["cached"]) == ("absent", "not-found", False)
    assert (second["outcome"], second["reason"], second["cached"]) == ("absent", "not-found", True)
    assert reads(lab) == before


def test_internet_and_known_peers_cost_no_signal(lab: Lab, agent: AgentProcess) -> None:
    """200,000 packets to the internet and to synced peers, IPv4 and IPv6: not one signal, not one read."""
    peers = [remote_address(13, family) for family in (4, 6)]
    lab.publish_many(peers)
    for peer in peers:
        send_udp(lab.pods[0].namespace, peer, 1)
        wait_identity(lab, peer, 131_073)
    names = ("missed", "signalled", "suppressed_dedup", "suppressed_rate", "muted", "lost")
    before = {name: packets(agent, name) for name in names}
    hits, others, read = packets(agent, "hit"), packets(agent, "not_mesh"), reads(lab)
    signals = metric(agent, "cilium_ipcache_miss_signal_total")
    for ip in (*peers, *INTERNET):
        send_udp(lab.pods[0].namespace, ip, 50_000)
    assert packets(agent, "hit") - hits >= 100_000
    assert packets(agent, "not_mesh") - others >= 100_000
    assert {name: packets(agent, name) for name in names} == before
    assert metric(agent, "cilium_ipcache_miss_signal_total") == signals
    assert reads(lab) == read


def test_miss_that_wakes_nobody_is_resolved_all_the_same(lab: Lab, agent: AgentProcess) -> None:
    """Where memory is less orderly than on x86, a signal may not see that the agent wants to be woken."""
    ip = remote_address(41)
    lab.publish(ip)
    with contextlib.closing(Map.pinned(Pins.under(lab.bpffs).path(READER))) as reader:
        reader.update(bytes(4), bytes(abi.Reader(wake=0)))
        send_udp(lab.pods[0].namespace, ip, 1)
    wait_identity(lab, ip, SERVER_IDENTITY)


def test_every_missed_packet_is_accounted_for(lab: Lab, agent: AgentProcess) -> None:
    """Signalled, suppressed by dedup or rate, muted and lost add up to missed, exactly."""
    for number in range(14, 40):
        send_udp(lab.pods[0].namespace, remote_address(number), 20)
    ends = ("signalled", "suppressed_dedup", "suppressed_rate", "muted", "lost")
    assert sum(packets(agent, end) for end in ends) == packets(agent, "missed")
    assert metric(agent, "cilium_ipcache_miss_signal_total") == packets(agent, "signalled")
