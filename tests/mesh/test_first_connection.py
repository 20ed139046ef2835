"""The first connection to a pod nobody has told us of: late with lazymesh, never without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.lab import BOTH_WAYS, Lab, remote_address
from tests.support.node import connect, identity_of, metric, packets
from tests.support.traffic import EchoServer, Probe, probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

BY_HAND = ("--mesh-cidr", "b=10.2.0.0/16", "--mesh-cidr", "b=fd00:10:2::/64")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab with a policy in both directions, and an echo server in the local pod."""
    with Lab(pods=1) as built, EchoServer(built.pods[0].namespace):
        built.set_policy(BOTH_WAYS)
        # Remote pods' addresses are local in node b by route only; IPv6 binds to such when told.
        built.node_b.sysctl({"ipv6/ip_nonlocal_bind": 1})
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab) -> Iterator[AgentProcess]:
    """One agent for the stories with the resolver on; what holding spares a client is told in test_hold*.py."""
    running = lab.start_agent("--on-miss", "pass")
    yield running
    running.stop()


@pytest.mark.parametrize("family", [4, 6])
def test_first_connection_to_an_unsynced_pod_succeeds_and_all_later_packets_pass(
    lab: Lab, agent: AgentProcess, family: int
) -> None:
    """One lost SYN, then a connection; from then on nothing of it is lost."""
    ip = remote_address(1, family)
    lab.publish(ip)
    (exchange,) = probe(lab.pods[0].namespace, Probe(tcp=(ip,), timeout=5, echoes=100))
    assert exchange.error is None
    assert exchange.first_ms is not None
    assert exchange.first_ms < 1500
    assert (len(exchange.steady_ms), exchange.lost) == (100, 0)
    denied = packets(agent, "policy_deny")
    later = connect(lab.pods[0].namespace, ip)
    assert later is not None
    assert later < 0.9, "no SYN was lost any more"
    assert packets(agent, "policy_deny") == denied


@pytest.mark.parametrize("family", [4, 6])
def test_first_datagram_is_asked_again_and_answered(lab: Lab, agent: AgentProcess, family: int) -> None:
    """A UDP client that asks again, as a resolver does, loses one question."""
    ip = remote_address(2, family)
    lab.publish(ip)
    (exchange,) = probe(lab.pods[0].namespace, Probe(udp=(ip,), timeout=5, echoes=20))
    assert exchange.error is None
    assert (exchange.lost, len(exchange.steady_ms)) == (1, 20)
    assert exchange.first_ms is not None
    assert exchange.first_ms < 1500


@pytest.mark.parametrize("family", [4, 6])
def test_unsynced_remote_pod_reaches_a_local_pod(lab: Lab, agent: AgentProcess, family: int) -> None:
    """Native routing: the source of a packet from the network misses, is resolved, and is let in."""
    source, pod = remote_address(3, family), lab.pods[0]
    lab.publish(source)
    target = pod.ipv4 if family == 4 else pod.ipv6
    (exchange,) = probe(lab.node_b, Probe(tcp=(target,), timeout=5, echoes=50, source=source))
    assert exchange.error is None
    assert exchange.first_ms is not None
    assert exchange.first_ms < 1500
    assert len(exchange.steady_ms) == 50
    assert identity_of(lab, source) == 131_073
    assert metric(agent, "cilium_ipcache_miss_signal_total", direction="ingress") >= 1


def test_many_first_connections_at_once_all_succeed(lab: Lab, agent: AgentProcess) -> None:
    """A rollout makes 200 peers new at the same moment."""
    ips = [remote_address(number, family) for family in (4, 6) for number in range(100, 200)]
    lab.publish_many(ips)
    exchanges = probe(lab.pods[0].namespace, Probe(tcp=tuple(ips), timeout=8, echoes=1))
    assert {exchange.error for exchange in exchanges} == {None}
    slow = [exchange for exchange in exchanges if (exchange.first_ms or 1e9) > 1900]
    assert slow == []


def test_without_the_resolver_the_same_connection_never_succeeds(lab: Lab) -> None:
    """The gap that lazymesh closes: the peer is mesh traffic, unknown, and denied in both directions."""
    with Lab(pods=1) as gap, EchoServer(gap.pods[0].namespace):
        gap.set_policy(BOTH_WAYS)
        agent = gap.start_agent(*BY_HAND, config=gap.no_config)
        outward = tuple(remote_address(1, family) for family in (4, 6))
        gap.publish_many(outward)
        pod = gap.pods[0]
        tries = probe(pod.namespace, Probe(tcp=outward, timeout=3.3, echoes=0))
        inward = connect(gap.node_b, pod.ipv4, 1.3, source=outward[0])
        assert [exchange.ok for exchange in tries] == [False, False]
        assert inward is None
        assert metric(agent, "cilium_ipcache_miss_resolution_errors_total", reason="no-cluster") >= 3
        assert packets(agent, "policy_deny", "ingress") >= 1
