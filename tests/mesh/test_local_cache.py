"""A kvstoremesh's local copy of a cluster in place of its own store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address
from tests.support.neighbour import Neighbour
from tests.support.node import (
    Misses,
    cluster,
    connect,
    identity_of,
    launched,
    metric,
    missed_until,
    options,
    status,
    wait_identity,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab; each story starts its own agent."""
    with Lab(pods=1) as built:
        yield built


@pytest.fixture
def cached(lab: Lab) -> Iterator[Neighbour]:
    """A kvstoremesh's copy of cluster b in a local etcd, and a directory that leads to it."""
    lab.leave_mesh()
    with Neighbour(lab, "b", 2, cached=True) as cache:
        cache.fill(cidrs=["10.2.0.0/16"], identities=[SERVER_IDENTITY, OTHER_IDENTITY])
        yield cache


def test_cache_of_a_kvstoremesh_answers_misses(lab: Lab, cached: Neighbour) -> None:
    """Description, nodes, identities and addresses come from cilium/cache; changes are followed there."""
    cached.join()
    with launched(lab, *options(lab)) as agent:
        agent.wait_ready()
        mirrored, only_at_home = remote_address(10), remote_address(11)
        cached.publish(mirrored, SERVER_IDENTITY)
        lab.publish(only_at_home)
        missed_until(lab, mirrored, SERVER_IDENTITY)
        with Misses(lab.socket) as misses:
            assert misses.provoke(lab.pods[0].namespace, only_at_home)["reason"] == "not-found"
        cached.publish(mirrored, OTHER_IDENTITY)
        assert wait_identity(lab, mirrored, OTHER_IDENTITY) < 1
        cached.etcd.delete(cached.ip_key(mirrored))
        assert wait_identity(lab, mirrored, None) < 1


def test_owner_is_asked_for_what_the_cache_does_not_have(lab: Lab, cached: Neighbour) -> None:
    """With --remote-config a pull-only record is found in the owner's store, and watched there."""
    direct = lab.directory / "direct"
    direct.mkdir(exist_ok=True)
    (direct / "b").write_text(f"endpoints:\n- {lab.etcd.url}\n")
    cached.join()
    with launched(lab, *options(lab), "--remote-config", str(direct)) as agent:
        agent.wait_ready()
        mirrored, pull_only = remote_address(12), remote_address(13)
        cached.publish(mirrored, SERVER_IDENTITY)
        lab.publish(pull_only, space="ondemand")
        missed_until(lab, mirrored, SERVER_IDENTITY)
        missed_until(lab, pull_only, SERVER_IDENTITY)
        lab.publish(pull_only, OTHER_IDENTITY, space="ondemand")
        assert wait_identity(lab, pull_only, OTHER_IDENTITY) < 1
        # The owner's store goes: what came from it stands, what the cache holds resolves as ever.
        lab.etcd.kill()
        wait_until(lambda: cluster(lab, "b")["ownerProblem"], 5, "the owner's store missed")
        assert cluster(lab, "b")["state"] == "ready"
        assert metric(agent, "lazymesh_owner_ready", target_cluster="b") == 0
        assert connect(lab.pods[0].namespace, mirrored) is not None
        cached.publish(remote_address(14), SERVER_IDENTITY)
        missed_until(lab, remote_address(14), SERVER_IDENTITY)
        assert identity_of(lab, pull_only) == OTHER_IDENTITY
        lab.etcd.start()
        lab.withdraw(pull_only)
        wait_identity(lab, pull_only, None, 40)
        assert status(lab)["wrong"] == []
        assert metric(agent, "lazymesh_owner_ready", target_cluster="b") == 1


NOWHERE = "endpoints: ['https://127.0.0.1:1']\ntrusted-ca-file: /nowhere/ca.crt\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("endpoints: ['http://b.mesh.invalid:2379']\n", "b.mesh.invalid"),
        ("endpoints: ['http://127.0.0.1:1']\n", "127.0.0.1:1"),
        (NOWHERE, "/nowhere/ca.crt"),
        ("endpoints: [", "not YAML"),
    ],
    ids=["unresolvable", "nobody there", "no such certificate", "no file of any use"],
)
def test_owners_store_that_cannot_be_reached_is_told(
    lab: Lab, cached: Neighbour, text: str, problem: str
) -> None:
    """The cache alone looks as well as ever, and what only the owner has is not resolved."""
    direct = lab.directory / "direct"
    direct.mkdir(exist_ok=True)
    (direct / "b").write_text(text)
    cached.join()
    with launched(lab, *options(lab), "--remote-config", str(direct)) as agent:
        agent.wait_ready()
        wait_until(lambda: problem in (cluster(lab, "b")["ownerProblem"] or ""), 5, "the reason")
        with Misses(lab.socket) as misses:
            event = misses.provoke(lab.pods[0].namespace, remote_address(15))
        assert (event["outcome"], event["reason"]) == ("failed", "read-failed")
        (wrong,) = status(lab)["wrong"]
        assert wrong.startswith("cluster b: its own store is not followed: ")
        assert problem in wrong
        assert metric(agent, "lazymesh_owner_ready", target_cluster="b") == 0
        assert metric(agent, "lazymesh_cluster_ready", target_cluster="b") == 1
        assert agent.log.count("not watching the cluster's own etcd") == 1
        assert lab.cli("status", check=False).returncode == 1


def test_what_came_from_the_owner_outlives_a_file_that_is_spoiled(lab: Lab, cached: Neighbour) -> None:
    """An agent that starts anew cannot ask the owner, and the cache's silence about a pod is no farewell."""
    direct = lab.directory / "direct"
    direct.mkdir(exist_ok=True)
    (direct / "b").write_text(f"endpoints:\n- {lab.etcd.url}\n")
    cached.join()
    pull_only, mirrored = remote_address(16), remote_address(17)
    lab.publish(pull_only, space="ondemand")
    words = [*options(lab), "--remote-config", str(direct)]
    with launched(lab, *words) as agent:
        agent.wait_ready()
        missed_until(lab, pull_only, SERVER_IDENTITY)
    (direct / "b").write_text("endpoints: [")
    with launched(lab, *words) as agent:
        agent.wait_ready()
        cached.publish(mirrored, SERVER_IDENTITY)
        missed_until(lab, mirrored, SERVER_IDENTITY)
        wait_until(lambda: cluster(lab, "b")["staleEntries"] == 1, 5, "the owner's entry in doubt")
        assert identity_of(lab, pull_only) == SERVER_IDENTITY
        (direct / "b").write_text(f"endpoints:\n- {lab.etcd.url}\n")
        wait_until(lambda: not cluster(lab, "b")["staleEntries"], 15, "the owner's entry confirmed")
        assert status(lab)["wrong"] == []


def test_incomplete_cache_is_waited_for(lab: Lab, cached: Neighbour) -> None:
    """A kvstoremesh that has just started: nothing is believed before its canaries are there."""
    cached.etcd.delete("cilium/synced/b/cilium/cache/identities/v1")
    cached.join()
    with launched(lab, *options(lab)) as agent:
        agent.wait_ready()
        wait_until(lambda: cluster(lab, "b").get("state") == "incomplete", 5, "the cache incomplete")
        assert "cilium/synced/b/cilium/cache/identities/v1" in cluster(lab, "b")["problem"]
        cached.complete()
        wait_until(lambda: cluster(lab, "b").get("state") == "ready", 5, "the cache complete")
