"""Records that are broken, or lie: refused, counted, logged once; the agent goes on."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import SERVER_IDENTITY, Lab, remote_address
from tests.support.node import (
    Misses,
    assert_unharmed,
    connect,
    entries,
    identity_of,
    metric,
    send_udp,
    wait_identity,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

_NUMBERS = itertools.count(1)

FORGED = {
    "unknown, 0": (0, "forged"),
    "host": (1, "forged"),
    "world": (2, "forged"),
    "world of a family": (9, "forged"),
    "user-reserved": (200, "forged"),
    "of our own cluster": (65_536 + 300, "forged"),
    "of a third cluster": (3 * 65_536 + 1, "forged"),
    "just below its range": (131_071, "forged"),
    "just above its range": (196_608, "forged"),
    "node-local": (1 << 24 | 131_073, "forged"),
    "of a remote node": (2 << 24 | 131_073, "forged"),
    "beyond 32 bits": (1 << 32 | 131_073, "malformed"),
    "negative": (-1, "malformed"),
    "in range, but without labels": (131_999, "unknown-identity"),
}


def pair(ip: str, **changes: object) -> dict[str, object]:
    """Return a good record of the address with some changes; None takes a field away."""
    record = {"IP": ip, "Mask": None, "HostIP": "192.168.100.2", "ID": SERVER_IDENTITY, "Key": 0}
    return {key: value for key, value in (record | changes).items() if value is not ...}


MALFORMED = {
    "no JSON": lambda ip: "no json {",
    "empty": lambda ip: "",
    "a number": lambda ip: "17",
    "a list": lambda ip: "[]",
    "null": lambda ip: "null",
    "nested without end": lambda ip: "[" * 50_000,
    "of another address": lambda ip: json.dumps(pair("10.2.200.200")),
    "of the address backwards": lambda ip: json.dumps(pair(".".join(reversed(ip.split("."))))),
    "of a prefix": lambda ip: json.dumps(pair(ip, Mask="////AA==")),
    "without a host": lambda ip: json.dumps(pair(ip, HostIP=...)),
    "with an empty host": lambda ip: json.dumps(pair(ip, HostIP="")),
    "with a host that is a name": lambda ip: json.dumps(pair(ip, HostIP="node-1")),
    "with an unspecified host": lambda ip: json.dumps(pair(ip, HostIP="0.0.0.0")),
    "with a text for an identity": lambda ip: json.dumps(pair(ip, ID="131073")),
    "with a key beyond 8 bits": lambda ip: json.dumps(pair(ip, Key=256)),
    "of one megabyte": lambda ip: json.dumps(pair(ip, Metadata="x" * 1_000_000)),
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab; addresses are used once."""
    with Lab(pods=1) as built:
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab) -> Iterator[AgentProcess]:
    """One agent that hears all of it, and must be the same process at the end."""
    running = lab.start_agent()
    yield running
    assert_unharmed(running)
    assert running.stop() == 0


def refused(lab: Lab, agent: AgentProcess, ip: str, value: str, reason: str) -> None:
    """Publish a value under the address's key and see it refused, counted and, if it matters, logged once."""
    before = metric(agent, "cilium_ipcache_miss_resolution_errors_total", reason=reason)
    lab.store.put_many({f"cilium/state/ip/v1/default/{ip}": value})
    with Misses(lab.socket) as misses:
        send_udp(lab.pods[0].namespace, ip, 3)
        event = misses.next(ip)
    assert (event["outcome"], event["reason"]) == ("absent", reason)
    assert identity_of(lab, ip) is None
    assert metric(agent, "cilium_ipcache_miss_resolution_errors_total", reason=reason) > before
    logged = [line for line in agent.log.splitlines() if f"address={ip} " in line]
    assert len(logged) == (reason in ("forged", "malformed"))


@pytest.mark.parametrize("what", FORGED)
def test_identity_that_must_not_be_installed_is_refused(lab: Lab, agent: AgentProcess, what: str) -> None:
    """A peer may only speak of identities of its own."""
    identity, reason = FORGED[what]
    ip = remote_address(next(_NUMBERS))
    refused(lab, agent, ip, json.dumps(pair(ip, ID=identity)), reason)


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_record_is_refused(lab: Lab, agent: AgentProcess, what: str) -> None:
    """Whatever the bytes are, they make no entry and no crash."""
    ip = remote_address(next(_NUMBERS))
    refused(lab, agent, ip, MALFORMED[what](ip), "malformed")


def test_refused_record_that_is_put_right_resolves_at_once(lab: Lab, agent: AgentProcess) -> None:
    """The refusal is a negative answer like others: the next write cancels it."""
    ip = remote_address(next(_NUMBERS))
    refused(lab, agent, ip, "{", "malformed")
    lab.publish(ip)
    assert wait_identity(lab, ip, SERVER_IDENTITY) < 1


@pytest.mark.parametrize("bad", ["{", json.dumps(pair("10.2.0.1", ID=2))])
def test_good_entry_goes_when_its_record_becomes_bad(lab: Lab, agent: AgentProcess, bad: str) -> None:
    """What cannot be believed any more is not enforced any more."""
    ip = remote_address(next(_NUMBERS))
    lab.publish(ip)
    send_udp(lab.pods[0].namespace, ip, 1)
    wait_identity(lab, ip, SERVER_IDENTITY)
    lab.store.put_many({f"cilium/state/ip/v1/default/{ip}": bad.replace("10.2.0.1", ip)})
    assert wait_identity(lab, ip, None) < 1


def node(*, mask: str = "//8AAA==", **changes: object) -> str:
    """Return a node record of cluster b that claims 10.7.0.0, with some changes."""
    record = {"Name": "n", "Cluster": "b", "ClusterID": 2, "IPv4AllocCIDR": {"IP": "10.7.0.0", "Mask": mask}}
    return json.dumps(record | changes)


NODES = {
    "no JSON": "{",
    "of another cluster": node(Cluster="c"),
    "with another cluster's id": node(ClusterID=7),
    "under another's name": node(Name="m"),
    "with holes in its mask": node(mask="/wD/AA=="),
    "of one megabyte": node(BootID="x" * 1_000_000),
}


@pytest.mark.parametrize("what", NODES)
def test_bad_node_claims_nothing(lab: Lab, agent: AgentProcess, what: str) -> None:
    """Its pod CIDR is not taken for mesh traffic."""
    before = metric(agent, "lazymesh_records_refused_total", target_cluster="b", kind="node")
    lab.store.put_many({"cilium/state/nodes/v1/b/n": NODES[what]})
    wait_until(
        lambda: (
            metric(agent, "lazymesh_records_refused_total", target_cluster="b", kind="node") == before + 1
        ),
        5,
        "the node refused",
    )
    with Misses(lab.socket) as misses:
        known = remote_address(next(_NUMBERS))
        send_udp(lab.pods[0].namespace, "10.7.0.1", 1)
        send_udp(lab.pods[0].namespace, known, 1)
        assert misses.line()["address"] == known, "10.7.0.1 never missed"


IDENTITIES = {
    "no labels": "",
    "not labels": "{}",
    "labels of another cluster": "k8s:app=server;k8s:io.cilium.k8s.policy.cluster=a;",
    "labels of no cluster": "k8s:app=server;",
    "one label twice": "k8s:app=server;k8s:app=client;k8s:io.cilium.k8s.policy.cluster=b;",
    "a megabyte of labels": "k8s:io.cilium.k8s.policy.cluster=b;k8s:x=" + "y" * 1_000_000 + ";",
}


@pytest.mark.parametrize("what", IDENTITIES)
def test_bad_identity_is_not_known(lab: Lab, agent: AgentProcess, what: str) -> None:
    """Addresses that name it stay without an entry."""
    number = 132_000 + list(IDENTITIES).index(what)
    ip = remote_address(next(_NUMBERS))
    before = metric(agent, "lazymesh_records_refused_total", target_cluster="b", kind="identity")
    lab.store.put_many({f"cilium/state/identities/v1/id/{number}": IDENTITIES[what]})
    wait_until(
        lambda: (
            metric(agent, "lazymesh_records_refused_total", target_cluster="b", kind="identity") == before + 1
        ),
        5,
        "the identity refused",
    )
    refused(lab, agent, ip, json.dumps(pair(ip, ID=number)), "unknown-identity")
    assert sum(f"name={number} " in line for line in agent.log.splitlines()) == 1


@pytest.mark.parametrize("number", [0, 1, 255, 65_537, 196_608, 1 << 24 | 131_073])
def test_identity_outside_of_its_clusters_range_is_refused(
    lab: Lab, agent: AgentProcess, number: int
) -> None:
    """Labels of a number that is not the cluster's are not taken in; 0 is no number that a key may have."""
    before = metric(agent, "lazymesh_records_refused_total", target_cluster="b", kind="identity")
    lab.publish_identity(number, {"app": "server"})
    if number:
        wait_until(
            lambda: (
                metric(agent, "lazymesh_records_refused_total", target_cluster="b", kind="identity") > before
            ),
            5,
            "the identity refused",
        )
    ip = remote_address(next(_NUMBERS))
    refused(lab, agent, ip, json.dumps(pair(ip, ID=number)), "forged")


def test_all_of_it_costs_the_good_ones_nothing(lab: Lab, agent: AgentProcess) -> None:
    """After everything above a good peer resolves as ever."""
    ip = remote_address(next(_NUMBERS))
    lab.publish(ip)
    assert connect(lab.pods[0].namespace, ip, 5) is not None
    assert entries(lab)[ip].endpoint == "192.168.100.2"
