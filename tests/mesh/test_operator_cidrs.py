"""What the operator gave to a cluster is that cluster's: no record of another one makes it ambiguous."""

from __future__ import annotations

from tests.support.etcd import wait_until
from tests.support.lab import SERVER_IDENTITY, Lab, remote_address
from tests.support.neighbour import Neighbour
from tests.support.node import Misses, cluster, connect, identity_of, missed_until

OF_C = 3 * 65_536 + 1


def test_pods_of_a_given_cidr_resolve_whoever_claims_them() -> None:
    """Cluster c claims b's CIDR, in part and as part of a wider one, and has a record of one of its pods."""
    stolen, other = remote_address(1), remote_address(2)
    with Lab(pods=1) as lab, Neighbour(lab, "c", 3) as thief:
        lab.publish_many([stolen, other])
        for address in (stolen, "10.9.0.1"):
            thief.publish(address, OF_C)
        thief.fill(cidrs=["10.2.0.0/24"], identities=[OF_C])
        thief.publish_node("10.0.0.0/8", name="n2")
        thief.join()
        agent = lab.start_agent("--mesh-cidr", "b=10.2.0.0/16")
        for address in (stolen, other):
            missed_until(lab, address, SERVER_IDENTITY)
        missed_until(lab, "10.9.0.1", OF_C)
        assert agent.stop() == 0
        agent = lab.start_agent()
        with Misses(lab.socket) as misses:
            event = misses.provoke(lab.pods[0].namespace, other)
        assert event["reason"] == "ambiguous", "without the operator's word nobody is believed"
        assert agent.stop() == 0


def test_given_cidr_is_nobody_elses_while_its_cluster_is_away() -> None:
    """Its store is down when the agent starts, and the thief is listed: refused, and denied by the policy as world."""
    stolen = remote_address(1)
    with Lab(pods=1) as lab, Neighbour(lab, "c", 3) as thief:
        lab.publish(stolen)
        lab.etcd.stop()
        thief.publish(stolen, OF_C)
        thief.fill(cidrs=["10.2.0.0/24"], identities=[OF_C])
        thief.publish_node("10.9.0.0/24", name="n2")
        thief.publish("10.9.0.1", OF_C)
        thief.join()
        lab.start_agent("--mesh-cidr", "b=10.2.0.0/16")
        missed_until(lab, "10.9.0.1", OF_C)
        with Misses(lab.socket) as misses:
            assert misses.provoke(lab.pods[0].namespace, stolen)["reason"] == "no-cluster"
        assert connect(lab.pods[0].namespace, stolen, 0.4) is None
        assert identity_of(lab, stolen) is None
        lab.etcd.start()
        wait_until(lambda: cluster(lab, "b").get("state") == "ready", 30, "cluster b ready")
        missed_until(lab, stolen, SERVER_IDENTITY)
