"""Etcd goes away, comes back, is replaced: known peers talk on, and nothing untrue is believed for long."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address
from tests.support.node import (
    Misses,
    Talk,
    cluster,
    connect,
    entries,
    identity_of,
    metric,
    missed_until,
    send_udp,
    wait_identity,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

BACK_S = 40
"""The client's back-off after a failed connection, with room for a busy machine."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab for each story: their etcd is broken."""
    with Lab(pods=1) as built:
        yield built


@pytest.fixture
def agent(lab: Lab) -> AgentProcess:
    """One agent with the default policy."""
    return lab.start_agent()


def installed(lab: Lab, *numbers: int) -> list[str]:
    """Publish remote pods and have them resolved."""
    ips = [remote_address(number) for number in numbers]
    lab.publish_many(ips)
    for ip in ips:
        send_udp(lab.pods[0].namespace, ip, 1)
        wait_identity(lab, ip, SERVER_IDENTITY)
    return ips


def state(lab: Lab) -> str:
    """Return what the agent calls cluster b's state."""
    return str(cluster(lab, "b").get("state"))


def refill(lab: Lab, *ips: str) -> None:
    """Write cluster b into an empty etcd, with these pods."""
    lab.publish_cluster()
    lab.publish_many(ips)


def test_known_peers_talk_on_while_etcd_is_away_and_changes_are_made_good(
    lab: Lab, agent: AgentProcess
) -> None:
    """A minute without etcd costs known peers nothing; what changed meanwhile is corrected afterwards."""
    kept, deleted, reused = installed(lab, 0, 1, 2)
    with Talk(lab.pods[0].namespace, kept) as talk:
        lab.etcd.kill()
        wait_until(lambda: state(lab) == "silent", 10, "the cluster silent")
        assert all(talk.say() for _ in range(20))
        assert connect(lab.pods[0].namespace, deleted) is not None
        with Misses(lab.socket) as misses:
            event = misses.provoke(lab.pods[0].namespace, remote_address(9))
        assert (event["outcome"], event["reason"]) == ("absent", "cluster-down")
        assert lab.cli("status", check=False).returncode == 1
        assert agent.get("/readyz"), "an agent is not less ready for a cluster that is down"
        lab.etcd.start()
        lab.withdraw(deleted)
        lab.publish(reused, OTHER_IDENTITY)
        lab.publish(remote_address(9))
        wait_identity(lab, deleted, None, BACK_S)
        wait_identity(lab, reused, OTHER_IDENTITY, BACK_S)
        assert talk.say()
    wait_until(lambda: state(lab) == "ready", BACK_S, "the cluster ready")
    assert connect(lab.pods[0].namespace, remote_address(9), 5) is not None
    assert identity_of(lab, kept) == SERVER_IDENTITY
    assert metric(agent, "lazymesh_store_reconnects_total", target_cluster="b") >= 1
    assert metric(agent, "lazymesh_unexpected_errors_total") == 0


def test_store_that_compacts_what_one_prefix_has_not_heard_of_is_listed_again(
    lab: Lab, agent: AgentProcess
) -> None:
    """Identities change, nodes do not: after a restart the watch on the one goes on, the other has to begin anew."""
    (known,) = installed(lab, 0)
    for number in range(3):
        lab.publish_identity(OTHER_IDENTITY, {"version": str(number)})
    wait_until(lambda: cluster(lab, "b")["identities"] > 0, 5)
    lab.etcd.compact(lab.etcd.revision() - 1)
    lab.etcd.restart()
    wait_until(lambda: metric(agent, "lazymesh_store_reconnects_total", target_cluster="b") >= 1, BACK_S)
    wait_until(lambda: state(lab) == "ready", BACK_S, "the cluster ready")
    run_on = time.monotonic() + 3
    wait_until(lambda: time.monotonic() > run_on, 4)
    assert state(lab) == "ready"
    lab.publish(remote_address(1))
    assert connect(lab.pods[0].namespace, remote_address(1), 5) is not None
    assert identity_of(lab, known) == SERVER_IDENTITY


def test_frozen_etcd_costs_known_peers_nothing_and_fails_misses_in_time(
    lab: Lab, agent: AgentProcess
) -> None:
    """A server that hangs is worse than one that is gone: reads end after five seconds."""
    (known,) = installed(lab, 0)
    lab.etcd.freeze()
    try:
        with Misses(lab.socket) as misses:
            event = misses.provoke(lab.pods[0].namespace, remote_address(1))
        assert event["outcome"] in ("failed", "absent")
        assert event["reason"] in ("read-failed", "cluster-down")
        assert event["latency_ms"] < 7000
        assert connect(lab.pods[0].namespace, known) is not None
    finally:
        lab.etcd.thaw()
    lab.publish(remote_address(1))
    wait_until(
        lambda: connect(lab.pods[0].namespace, remote_address(1), 0.4) is not None,
        BACK_S,
        "resolved after all",
    )


def test_wiped_store_is_believed_only_when_it_is_complete_again(lab: Lab, agent: AgentProcess) -> None:
    """An etcd comes back empty under a new cluster id: entries stand until its canaries say that it is whole."""
    kept, gone = installed(lab, 0, 1)
    with Talk(lab.pods[0].namespace, kept) as talk:
        lab.etcd.wipe(token="another")
        wait_until(lambda: state(lab) == "incomplete", BACK_S, "the empty store noticed")
        assert set(entries(lab)) == {kept, gone}
        assert talk.say()
        # It fills: the description first, then identities and nodes, the pods later, the canaries at the end.
        canaries = [f"cilium/synced/b/cilium/state/{name}/v1" for name in ("nodes", "identities", "ip")]
        refill(lab)
        lab.store.delete_many(canaries[2:])
        wait_until(
            lambda: (
                "no cilium/synced/b/cilium/state/ip/v1" in str(cluster(lab, "b")["problem"])
                or state(lab) == "ready"
            ),
            BACK_S,
            "the missing canary named",
        )
        if state(lab) != "ready":  # else all canaries were there for a moment, and the sweep was right
            assert set(entries(lab)) == {kept, gone}
            assert connect(lab.pods[0].namespace, gone) is not None
        lab.publish(kept)
        lab.store.put_many({canaries[2]: "2026-01-01T00:00:00Z"})
        wait_identity(lab, gone, None, BACK_S)
        wait_until(
            lambda: identity_of(lab, kept) == SERVER_IDENTITY and state(lab) == "ready", BACK_S, "ready"
        )
        assert talk.say()
        lab.publish(kept, OTHER_IDENTITY)
        wait_identity(lab, kept, OTHER_IDENTITY)


def test_store_that_went_back_in_time_is_read_anew(lab: Lab, agent: AgentProcess) -> None:
    """Restored from a backup: the same cluster id, lower revisions, other records."""
    kept, gone = installed(lab, 0, 1)
    for _ in range(
        10
    ):  # the agent has to see how far the store had come: below that it knows that it went back
        lab.publish(kept, OTHER_IDENTITY)
        lab.publish(kept)
    wait_until(lambda: cluster(lab, "b")["revision"] > 20, 5, "the revision seen")
    lab.etcd.wipe()
    refill(lab, kept)
    wait_identity(lab, gone, None, BACK_S)
    wait_until(lambda: state(lab) == "ready", BACK_S, "the cluster ready")
    assert identity_of(lab, kept) == SERVER_IDENTITY
    lab.withdraw(kept)
    wait_identity(lab, kept, None)


def test_identities_and_nodes_that_vanished_meanwhile_are_forgotten(lab: Lab, agent: AgentProcess) -> None:
    """What a listing does not tell again is no more: its entries go, its CIDR is no mesh traffic."""
    lab.publish_node("b-9", ("10.9.0.0/24", None))
    lab.publish("10.9.0.1")
    missed_until(lab, "10.9.0.1", SERVER_IDENTITY)
    (other,) = installed(lab, 0)
    lab.publish(other, OTHER_IDENTITY)
    wait_identity(lab, other, OTHER_IDENTITY)
    lab.etcd.wipe(token="another")
    refill(lab, other, "10.9.0.1")
    lab.publish(other, OTHER_IDENTITY)
    lab.withdraw_identity(OTHER_IDENTITY)
    wait_identity(lab, "10.9.0.1", None, BACK_S)
    wait_identity(lab, other, None, BACK_S)
    assert cluster(lab, "b")["nodes"] == 1


def test_compaction_is_survived(lab: Lab, agent: AgentProcess) -> None:
    """The revision to resume at is gone after an outage: listed anew, with what was deleted meanwhile."""
    kept, deleted = installed(lab, 0, 1)
    lab.etcd.freeze()
    lab.etcd.thaw()
    lab.withdraw(deleted)
    wait_identity(lab, deleted, None)
    lab.etcd.kill()
    wait_until(lambda: state(lab) == "silent", 10, "the cluster silent")
    lab.etcd.start()
    lab.withdraw_identity(OTHER_IDENTITY)
    lab.publish(kept, OTHER_IDENTITY)
    lab.publish_identity(OTHER_IDENTITY, {"app": "server"})
    lab.etcd.compact(lab.etcd.revision())
    wait_identity(lab, kept, OTHER_IDENTITY, BACK_S)
    assert connect(lab.pods[0].namespace, kept, 5) is not None
