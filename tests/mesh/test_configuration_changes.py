"""The clustermesh directory changes under a running agent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address
from tests.support.neighbour import Neighbour
from tests.support.node import (
    Talk,
    cluster,
    entries,
    identity_of,
    launched,
    metric,
    missed_until,
    options,
    send_udp,
    status,
    wait_identity,
    wait_well,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab; each story puts the configuration back."""
    with Lab(pods=1) as built:
        yield built


@pytest.fixture(scope="module")
def shared_agent(lab: Lab) -> Iterator[AgentProcess]:
    """One agent that sees all the changes and must survive them."""
    running = lab.start_agent()
    yield running
    assert metric(running, "lazymesh_unexpected_errors_total") == 0
    assert metric(running, "lazymesh_cluster_link_crashes_total") == 0
    assert running.stop() == 0


@pytest.fixture
def agent(lab: Lab, shared_agent: AgentProcess) -> Iterator[AgentProcess]:
    """That agent, with cluster b joined and ready."""
    lab.join_mesh()
    wait_until(lambda: cluster(lab, "b").get("state") == "ready", 10, "cluster b ready")
    yield shared_agent
    lab.join_mesh()


def test_removed_file_takes_the_entries_and_a_new_one_brings_them_back(lab: Lab, agent: AgentProcess) -> None:
    """Leaving the mesh is immediate; joining needs no restart."""
    ip = remote_address(1)
    lab.publish(ip)
    missed_until(lab, ip, SERVER_IDENTITY)
    lab.leave_mesh()
    wait_until(lambda: entries(lab) == {}, 2, "the entries gone")
    assert status(lab)["clusters"] == []
    assert status(lab)["ready"] is True
    send_udp(lab.pods[0].namespace, ip, 1)
    lab.join_mesh()
    missed_until(lab, ip, SERVER_IDENTITY, 10)


def test_file_that_cannot_be_read_keeps_the_cluster_that_runs(lab: Lab, agent: AgentProcess) -> None:
    """Half a file costs nobody anything; status says what is wrong with it, until it is whole again."""
    ip = remote_address(3)
    lab.publish(ip)
    missed_until(lab, ip, SERVER_IDENTITY)
    configured = agent.log.count("cluster configured")
    (lab.config / "b").write_text("endpoints: [")
    wait_until(lambda: "not YAML" in " ".join(status(lab)["wrong"]), 5, "the complaint")
    assert identity_of(lab, ip) == SERVER_IDENTITY
    lab.publish(ip, OTHER_IDENTITY)
    assert wait_identity(lab, ip, OTHER_IDENTITY) < 1
    lab.join_mesh()
    wait_well(lab, 5)
    assert agent.log.count("cluster configured") == configured, "not worth a reconnect"


def test_cluster_whose_file_was_never_good_is_counted_as_not_ready(lab: Lab, agent: AgentProcess) -> None:
    """Without a sample there would be nothing to alert on."""
    (lab.config / "c").write_text("endpoints: [")
    wait_until(lambda: cluster(lab, "c").get("state") == "refused", 5, "cluster c refused")
    page = agent.get("/metrics")
    assert 'lazymesh_cluster_ready{target_cluster="b"} 1.0' in page
    assert 'lazymesh_cluster_ready{target_cluster="c"} 0.0' in page
    (lab.config / "c").unlink()
    wait_until(lambda: not cluster(lab, "c"), 5, "cluster c gone")
    assert 'target_cluster="c"' not in agent.get("/metrics")


def test_new_endpoint_with_other_records_replaces_the_old_ones(lab: Lab, agent: AgentProcess) -> None:
    """The file leads to another etcd of the same cluster: what only the old one told is forgotten."""
    old, both = remote_address(4), remote_address(5)
    lab.publish_node("b-old", ("10.8.0.0/24", None))
    lab.publish("10.8.0.1")
    lab.publish(old, OTHER_IDENTITY)
    lab.publish(both)
    for ip, identity in (("10.8.0.1", SERVER_IDENTITY), (old, OTHER_IDENTITY), (both, SERVER_IDENTITY)):
        missed_until(lab, ip, identity)
    with Neighbour(lab, "b", 2) as moved:
        moved.publish(both, SERVER_IDENTITY)
        moved.publish(old, OTHER_IDENTITY)  # its identity is not known there
        moved.fill(cidrs=["10.2.0.0/16"], identities=[SERVER_IDENTITY])
        moved.join()
        wait_identity(lab, "10.8.0.1", None, 10)
        wait_identity(lab, old, None, 10)
        wait_until(lambda: cluster(lab, "b")["state"] == "ready", 10, "the new store ready")
        assert (cluster(lab, "b")["nodes"], cluster(lab, "b")["identities"]) == (1, 1)
        assert identity_of(lab, both) == SERVER_IDENTITY
        lab.join_mesh()
        wait_until(lambda: cluster(lab, "b").get("endpoint") == lab.etcd.url, 10, "back at the old store")


def test_cluster_that_joins_and_leaves_again_and_again_leaks_nothing(lab: Lab, agent: AgentProcess) -> None:
    """Threads are what they were; descriptors of old connections go, some of them with the garbage."""
    proc = Path(f"/proc/{agent.pid}")
    before = len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))
    for _ in range(5):
        lab.leave_mesh()
        wait_until(lambda: not cluster(lab, "b"), 5, "cluster b gone")
        lab.join_mesh()
        wait_until(lambda: cluster(lab, "b").get("state") == "ready", 10, "cluster b ready")
    assert len(list((proc / "task").iterdir())) <= before[1]
    assert len(list((proc / "fd").iterdir())) <= before[0] + 20
    ip = remote_address(6)
    lab.publish(ip)
    missed_until(lab, ip, SERVER_IDENTITY)


def test_directory_swapped_by_symbolic_links_is_followed() -> None:
    """A kubelet swaps ..data; what changes in it is noticed, what does not costs no reconnect."""
    with Lab(pods=1) as lab:
        volume = lab.directory / "volume"
        volume.mkdir()
        good = (lab.config / "b").read_text()

        def swap(name: str, files: dict[str, str]) -> None:
            version = volume / name
            version.mkdir()
            for file, text in files.items():
                (version / file).write_text(text)
            fresh = volume / "..data_tmp"
            fresh.symlink_to(name)
            fresh.rename(volume / "..data")

        swap("..1", {"b": good, "notes.txt": "no cluster at all\n"})
        for file in ("b", "notes.txt"):
            (volume / file).symlink_to(f"..data/{file}")
        argv = options(lab, clustermesh_config=str(volume))
        with launched(lab, *argv) as agent:
            agent.wait_ready()
            ip = remote_address(2)
            lab.publish(ip)
            missed_until(lab, ip, SERVER_IDENTITY)
            assert [one["name"] for one in status(lab)["clusters"]] == ["b"]
            swap("..2", {"b": good, "notes.txt": "changed\n"})
            with Talk(lab.pods[0].namespace, ip) as talk:
                # The same words: nothing happens. A comment more: reconnected, entries stand.
                swap("..3", {"b": good + "# rotated\n"})
                wait_until(lambda: agent.log.count("cluster configured") == 2, 5, "the new file taken")
                wait_until(lambda: cluster(lab, "b").get("state") == "ready", 5, "cluster b ready")
                assert talk.say()
            assert identity_of(lab, ip) == SERVER_IDENTITY
            lab.publish(ip, OTHER_IDENTITY)
            wait_identity(lab, ip, OTHER_IDENTITY)
