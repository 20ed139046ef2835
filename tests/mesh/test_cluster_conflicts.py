"""Clusters that contradict each other or us: nobody is believed by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import SERVER_IDENTITY, Lab, remote_address
from tests.support.neighbour import Neighbour
from tests.support.node import (
    Misses,
    cluster,
    identity_of,
    metric,
    missed_until,
    send_udp,
    status,
    wait_identity,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

SERVER_OF_C = 3 * 65_536 + 1
SHARED, OURS_ALONE = "10.2.200.1", remote_address(0)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab with cluster b."""
    with Lab(pods=1) as built:
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab) -> Iterator[AgentProcess]:
    """One agent of cluster a, whose id is 1."""
    running = lab.start_agent()
    yield running
    assert running.stop() == 0


@pytest.fixture
def other(lab: Lab, agent: AgentProcess) -> Iterator[Neighbour]:
    """A third cluster that has not joined yet; gone for the agent too at the end."""
    with Neighbour(lab, "c", 3) as neighbour:
        yield neighbour
        neighbour.leave()
        wait_until(lambda: not cluster(lab, "c"), 5, "cluster c gone")


def test_address_that_two_clusters_claim_is_ambiguous(
    lab: Lab, agent: AgentProcess, other: Neighbour
) -> None:
    """The entry that stood is evicted, a miss is refused without a read; one claim withdrawn, and it resolves."""
    for ip in (SHARED, OURS_ALONE):
        lab.publish(ip)
        send_udp(lab.pods[0].namespace, ip, 1)
        wait_identity(lab, ip, SERVER_IDENTITY)
    other.publish(SHARED, SERVER_OF_C)
    other.fill(cidrs=["10.2.128.0/17"], identities=[SERVER_OF_C])
    other.join()
    wait_identity(lab, SHARED, None)
    with Misses(lab.socket) as misses:
        event = misses.provoke(lab.pods[0].namespace, SHARED)
    assert (event["outcome"], event["reason"], event["cluster"]) == ("absent", "ambiguous", None)
    assert identity_of(lab, OURS_ALONE) == SERVER_IDENTITY, "outside of the overlap nothing changes"
    assert f"address={SHARED} " in agent.log
    other.etcd.delete(other.node_key())
    missed_until(lab, SHARED, SERVER_IDENTITY, 10)


def test_cluster_that_gets_another_id_is_followed_under_it(
    lab: Lab, agent: AgentProcess, other: Neighbour
) -> None:
    """Its description is written in place, by a kvstoremesh for one; nothing says so but the key itself."""
    other.fill(cidrs=["10.3.0.0/16"], identities=[SERVER_OF_C])
    other.publish("10.3.0.1", SERVER_OF_C)
    other.join()
    missed_until(lab, "10.3.0.1", SERVER_OF_C)
    moved = (5 << 16) + (SERVER_OF_C & 0xFFFF)
    other.cluster_id = 5
    other.fill(cidrs=["10.3.0.0/16"], identities=[moved])
    other.publish("10.3.0.1", moved)
    wait_until(lambda: cluster(lab, "c").get("id") == 5, 5, "the new id")
    missed_until(lab, "10.3.0.1", moved)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        pytest.param({"id": 1}, "cluster id 1 is already used by this cluster", id="our own id"),
        pytest.param({"id": 2}, "cluster id 2 is already used by b", id="the id of another cluster"),
        pytest.param({"id": 0}, "cluster id is not in 1..255", id="no id"),
        pytest.param({"id": 256}, "cluster id is not in 1..255", id="an id beyond the mesh's size"),
        pytest.param({"maxConnectedClusters": 511}, "ours is 255", id="a mesh of another size"),
    ],
)
def test_cluster_that_contradicts_us_is_refused(
    lab: Lab, agent: AgentProcess, other: Neighbour, words: dict[str, Any], problem: str
) -> None:
    """Its CIDRs are no mesh traffic, status says why, and the others go on; put right, it joins."""
    other.fill(cidrs=["10.3.0.0/16"], identities=[SERVER_OF_C])
    other.describe(**words)
    other.publish("10.3.0.1", SERVER_OF_C)
    other.join()
    wait_until(lambda: cluster(lab, "c").get("state") == "refused", 5, "cluster c refused")
    assert problem in cluster(lab, "c")["problem"]
    assert any(line.startswith("cluster c is refused") for line in status(lab)["wrong"])
    assert metric(agent, "lazymesh_cluster_ready", target_cluster="c") == 0
    assert metric(agent, "lazymesh_cluster_ready", target_cluster="b") == 1
    assert metric(agent, "lazymesh_records_refused_total", target_cluster="c", kind="cluster-config") == 1
    done = lab.cli("status", check=False)
    assert done.returncode == 1
    assert "WRONG: cluster c is refused" in done.stdout
    other.describe()
    wait_until(lambda: cluster(lab, "c").get("state") == "ready", 5, "cluster c ready")
    missed_until(lab, "10.3.0.1", SERVER_OF_C)


def test_identity_of_another_cluster_is_not_taken_from_this_one(
    lab: Lab, agent: AgentProcess, other: Neighbour
) -> None:
    """Cluster c dresses its pod up as a server of b: forged, though the identity is well known here."""
    other.publish("10.3.0.2", SERVER_IDENTITY)
    other.fill(cidrs=["10.3.0.0/16"], identities=[SERVER_OF_C])
    other.join()
    wait_until(lambda: cluster(lab, "c").get("state") == "ready", 5, "cluster c ready")
    with Misses(lab.socket) as misses:
        event = misses.provoke(lab.pods[0].namespace, "10.3.0.2")
    assert (event["outcome"], event["reason"]) == ("absent", "forged")


def test_leaving_cluster_takes_only_its_own_entries(lab: Lab, agent: AgentProcess, other: Neighbour) -> None:
    """The file of c goes: its entries go within a second, b's stay."""
    other.fill(cidrs=["10.3.0.0/16"], identities=[SERVER_OF_C])
    other.publish("10.3.0.3", SERVER_OF_C)
    other.join()
    wait_until(lambda: cluster(lab, "c").get("state") == "ready", 5, "cluster c ready")
    lab.publish(OURS_ALONE)
    for ip, identity in (("10.3.0.3", SERVER_OF_C), (OURS_ALONE, SERVER_IDENTITY)):
        missed_until(lab, ip, identity)
    other.leave()
    assert wait_identity(lab, "10.3.0.3", None) < 1.5
    assert identity_of(lab, OURS_ALONE) == SERVER_IDENTITY
    assert metric(agent, "lazymesh_entries_evicted_total", reason="cluster-gone") >= 1
