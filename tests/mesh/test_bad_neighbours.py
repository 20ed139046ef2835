"""A second cluster that is dead, slow or a liar costs the first one's pods nothing."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import free_port
from tests.support.lab import SERVER_IDENTITY, Lab, remote_address
from tests.support.neighbour import Neighbour
from tests.support.node import entries, launched, metric, missed_until, options
from tests.support.proxy import Proxy
from tests.support.pulse import Pulse, Sender
from tests.support.traffic import Probe, probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

CIDR, THEIRS = "10.3.0.0/16", 196_609
CONNECTIONS = 150
_numbers = itertools.count(1_000, CONNECTIONS)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab: a pod of which we measure first packets, and one that asks for the bad cluster's."""
    with Lab(pods=2) as built:
        yield built


@pytest.fixture(scope="module")
def other(lab: Lab) -> Iterator[Neighbour]:
    """The second cluster, still good."""
    with Neighbour(lab, "c", 3) as built:
        built.fill(cidrs=[CIDR], identities=[THEIRS])
        built.connect(CIDR)
        yield built


@pytest.fixture(scope="module")
def proxy(lab: Lab, other: Neighbour) -> Iterator[Proxy]:
    """What makes it slow."""
    port = free_port()
    with Proxy(lab.node_a, port, other.etcd.port) as between:
        other.join(f"http://127.0.0.1:{port}")
        yield between


@pytest.fixture(scope="module")
def agent(lab: Lab, proxy: Proxy) -> Iterator[AgentProcess]:
    """One agent for all."""
    with launched(lab, *options(lab), "--cleanup") as running:
        running.wait_ready()
        lab.publish(remote_address(0))
        missed_until(lab, remote_address(0), SERVER_IDENTITY)
        yield running


def first_packets(lab: Lab) -> float:
    """Return the 99th percentile of first connections to pods of the good cluster, in ms, while others are missed."""
    start = next(_numbers)
    peers = [remote_address(number) for number in range(start, start + CONNECTIONS)]
    lab.publish_many(peers)
    asked_for = [f"10.3.{number // 250}.{number % 250}" for number in range(1_000)]
    with Sender(lab.pods[1].namespace, Pulse(asked_for, [], flow_every_s=10)):
        exchanges = probe(lab.pods[0].namespace, Probe(tcp=tuple(peers), echoes=0, stagger=0.01))
    times = sorted(one.first_ms for one in exchanges if one.first_ms is not None)
    assert len(times) == CONNECTIONS, "every first connection succeeds"
    return times[CONNECTIONS * 99 // 100]


def test_bad_second_cluster_does_not_move_the_first_ones_p99(
    lab: Lab, other: Neighbour, proxy: Proxy, agent: AgentProcess
) -> None:
    """In one run: good, slow by a second for each read, silent, dead, a liar; a hundred misses a second are for it."""
    p99 = {"good": first_packets(lab)}
    proxy.delay(1.0)
    p99["slow"] = first_packets(lab)
    proxy.delay(0.0)
    proxy.blackhole(True)
    p99["silent"] = first_packets(lab)
    proxy.heal()
    proxy.refuse(True)
    p99["dead"] = first_packets(lab)
    proxy.heal()
    other.etcd.put(other.node_key("n2"), json.dumps({"Name": "n2", "Cluster": "b", "ClusterID": 2}))
    for number in range(100):
        other.publish(f"10.3.0.{number}", SERVER_IDENTITY)  # an identity of the first cluster's
    p99["lying"] = first_packets(lab)
    ratios = {name: value / p99["good"] for name, value in p99.items()}
    print(
        "first packets of cluster b, p99 in ms: "
        + ", ".join(f"{n} {p99[n]:.2f} ({ratios[n]:.1f}x)" for n in p99)
    )
    assert max(ratios.values()) < 10 or max(p99.values()) < 100
    assert not [address for address in entries(lab) if address.startswith("10.3.")], "no lie was believed"
    assert metric(agent, "lazymesh_unexpected_errors_total") == 0
