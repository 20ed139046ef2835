"""Connections that are cut, swallowed or garbled, compactions, replaced stores, certificates and tokens that end.

Each story under a witness of the map and numbered traffic: right in the end, no wrong identity in between, and known
peers lose nothing.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.churn import Churn, settle
from tests.support.etcd import free_port, wait_until
from tests.support.lab import ETCD_PORT, OTHER_IDENTITY, SERVER_IDENTITY, Lab, remote_address
from tests.support.node import Misses, cluster, connect, launched, metric, missed_until, options
from tests.support.proxy import Proxy
from tests.support.pulse import Pulse, Sender
from tests.support.soak import THIRD_CHANGING, THIRD_IDENTITY, THIRD_KNOWN, Third
from tests.support.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

KNOWN = [remote_address(number, 6 if number % 2 else 4) for number in range(4)]
CHANGING = [remote_address(number, 6 if number % 2 else 4) for number in range(100, 116)]
BACK_S = 60
"""A store that hangs is given up after 25 s; the rest is for a busy machine."""
IDLE_S = 5.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab: a pod that talks to known peers, and one that asks for the others."""
    with Lab(pods=2) as built:
        built.publish_many(KNOWN)
        yield built


@pytest.fixture(scope="module")
def proxy(lab: Lab) -> Iterator[Proxy]:
    """What is between the agent and the etcd of cluster b."""
    port = free_port()
    with Proxy(lab.node_a, port, ETCD_PORT) as between:
        (lab.config / "b").write_text(f"endpoints: ['http://127.0.0.1:{port}']\n")
        yield between


@pytest.fixture(scope="module")
def third(lab: Lab) -> Iterator[Third]:
    """A cluster with certificates and tokens."""
    with Third(lab) as built:
        for address in THIRD_KNOWN:
            built.publish(address, THIRD_IDENTITY)
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab, proxy: Proxy, third: Third) -> Iterator[AgentProcess]:
    """One agent for all stories, which knows the known peers."""
    with launched(lab, *options(lab), "--cleanup") as running:
        running.wait_ready()
        for address in KNOWN:
            missed_until(lab, address, SERVER_IDENTITY)
        for address in THIRD_KNOWN:
            missed_until(lab, address, THIRD_IDENTITY)
        yield running
        assert metric(running, "lazymesh_unexpected_errors_total") == 0
        assert metric(running, "lazymesh_cluster_link_crashes_total") == 0


@pytest.fixture(scope="module")
def witness(lab: Lab, agent: AgentProcess) -> Iterator[Witness]:
    """Somebody who looks at the map all the time."""
    with Witness(lab.bpffs / "lazymesh/lm_ipcache") as looking:
        for address in (*KNOWN, *THIRD_KNOWN):
            looking.may_be(address, SERVER_IDENTITY if address in KNOWN else THIRD_IDENTITY)
        yield looking


@pytest.fixture(scope="module")
def churns(lab: Lab, third: Third, witness: Witness, fault_seed: int) -> Iterator[tuple[Churn, Churn]]:
    """Records of both clusters that change, and traffic to their addresses."""
    dice = random.Random(fault_seed)
    mine = Churn(lab, witness, CHANGING, (SERVER_IDENTITY, OTHER_IDENTITY), dice)
    thirds = Churn(third, witness, THIRD_CHANGING, (THIRD_IDENTITY, THIRD_IDENTITY + 1), dice)
    mine.change(len(CHANGING))
    thirds.change(len(THIRD_CHANGING))
    with Sender(lab.pods[1].namespace, Pulse([*CHANGING, *THIRD_CHANGING], [])):
        yield mine, thirds


@pytest.fixture(autouse=True)
def oracle(lab: Lab, witness: Witness, churns: tuple[Churn, Churn]) -> Iterator[None]:
    """Hold every story against what must be."""
    settle(churns, BACK_S)
    before = witness.looks
    with Sender(lab.pods[0].namespace, Pulse([*KNOWN, *THIRD_KNOWN], [], flow_every_s=0.05)) as known:
        yield
        for churn in churns:
            churn.change(3)
        took = settle(churns, BACK_S)
        fates = known.stop()
    wrong, looks = len(witness.wrong), witness.looks - before
    print(
        f"right after {took:.2f} s; {len(fates.flows)} packets, {fates.lost} lost; {looks} looks, {wrong} wrong"
    )
    assert fates.losses() == {}
    assert witness.wrong == []


@pytest.fixture
def churn(churns: tuple[Churn, Churn]) -> Churn:
    """Those of cluster b."""
    return churns[0]


@pytest.fixture
def third_churn(churns: tuple[Churn, Churn]) -> Churn:
    """Those of cluster c."""
    return churns[1]


# --- the connection ---------------------------------------------------------------------------------------------------


def test_cut_connections_are_made_anew_and_watches_go_on(proxy: Proxy, churn: Churn) -> None:
    """What changed between two connections is told by the next one."""
    for _ in range(5):
        proxy.cut()
        churn.change(2)


@pytest.mark.parametrize("how", ["refuse", "blackhole", "garble"])
def test_store_that_cannot_be_talked_to_is_found_again(proxy: Proxy, churn: Churn, how: str) -> None:
    """It is reset, silent, or talks nonsense for some seconds, while records change."""
    getattr(proxy, how)(True)
    try:
        for _ in range(10):
            churn.change()
            run_for(0.2)
    finally:
        proxy.heal()


def test_narrow_line_delays_and_loses_nothing(proxy: Proxy, churn: Churn) -> None:
    """Ten kilobytes a second, each answer half a second late."""
    proxy.throttle(10_000)
    proxy.delay(0.5)
    try:
        for _ in range(10):
            churn.change(2)
            run_for(0.2)
        settle([churn], BACK_S)
    finally:
        proxy.heal()


# --- the store --------------------------------------------------------------------------------------------------------


def test_compaction_while_watching_and_while_away(lab: Lab, proxy: Proxy, churn: Churn) -> None:
    """Under a live watch it is nothing; the revision to resume at may be gone, and then all is read anew."""
    churn.change(5)
    lab.etcd.compact(lab.etcd.revision())
    churn.change(5)
    settle([churn], BACK_S)
    proxy.refuse(True)
    churn.change(5)
    lab.etcd.compact(lab.etcd.revision())
    proxy.heal()


@pytest.mark.parametrize("token", ["another", None], ids=["another cluster id", "an older state of the same"])
def test_another_store_behind_the_same_address_is_believed_when_it_is_complete(
    lab: Lab, churn: Churn, token: str | None
) -> None:
    """Until then all entries stand; its records are other ones."""
    lab.etcd.wipe(token)
    run_for(1)
    lab.publish_many(KNOWN)
    churn.change(8)
    churn.write_all()
    lab.publish_cluster()


def test_stopped_store_costs_little_and_is_found_within_moments(
    lab: Lab, agent: AgentProcess, churn: Churn
) -> None:
    """The processor is left alone, misses end by a reason that says why; started again, misses resolve at once."""
    lab.etcd.kill()
    wait_until(lambda: cluster(lab, "b")["state"] == "silent", 10, "the cluster silent")
    busy, began = cpu_s(agent.pid), time.monotonic()
    with Misses(lab.socket) as misses:
        run_for(IDLE_S)
        share = (cpu_s(agent.pid) - busy) / (time.monotonic() - began)
        event = misses.provoke(lab.pods[0].namespace, remote_address(300))
    assert (event["outcome"], event["reason"]) == ("absent", "cluster-down")
    lab.etcd.start()
    began = time.monotonic()
    lab.publish(remote_address(301))
    wait_until(lambda: connect(lab.pods[0].namespace, remote_address(301), 0.2) is not None, 20, "resolved")
    took = time.monotonic() - began
    print(f"etcd stopped: {share:.1%} of a processor under traffic; started: resolving after {took:.2f} s")
    assert share < 0.25
    assert took < 10


# --- who we are -------------------------------------------------------------------------------------------------------


def test_certificate_rotated_on_disk_is_used_by_the_next_connection(
    lab: Lab, third: Third, third_churn: Churn
) -> None:
    """One that has expired keeps us out, in words that say so; the next good one lets us in, without a restart."""
    third.install_certificate()
    reconnect(lab, third)
    third_churn.change(2)
    settle([third_churn], BACK_S)
    third.install_certificate(expired=True)
    for member in third.etcd.members:
        member.kill()
    for member in third.etcd.members:
        member.start(wait=False)
    for member in third.etcd.members:
        member.wait_ready()
    try:
        wait_until(lambda: "expired" in str(cluster(lab, "c")["problem"]), 30, "the complaint")
        third_churn.change(3)
    finally:
        third.install_certificate()
    wait_until(lambda: cluster(lab, "c")["state"] == "ready", 30, "let in again")


def test_expired_and_revoked_tokens_are_renewed(third: Third, third_churn: Churn) -> None:
    """Etcd forgets a token that is not used for three seconds here, and all of a user's when the password is set."""
    for member in third.etcd.members:
        wait_until(lambda member=member: "deleted a simple token" in member.log, 20, "an expired token")  # type: ignore[misc]
    third_churn.change(2)
    settle([third_churn], BACK_S)
    for _ in range(3):
        third.revoke_tokens()
        third_churn.change(2)
        settle([third_churn], BACK_S)


def reconnect(lab: Lab, third: Third) -> None:
    """Let the agent connect anew, by a restart of the member that it talks to."""
    used = cluster(lab, "c")["endpoint"]
    member = next(one for one in third.etcd.members if one.url == used)
    before = cluster(lab, "c")["reconnects"]
    member.restart()
    wait_until(lambda: cluster(lab, "c")["reconnects"] > before, 30, "another connection")


def run_for(seconds: float) -> None:
    """Let traffic flow."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, seconds + 1)


def cpu_s(pid: int) -> float:
    """Return how many seconds of processor a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
