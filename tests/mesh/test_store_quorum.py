"""A cluster whose etcd has three members: leaders change, members die, sleep and lag; nothing goes back in time."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.support.churn import Churn, settle
from tests.support.etcd import EtcdCluster, EtcdServer, EtcdSettings, wait_until
from tests.support.lab import Lab
from tests.support.neighbour import Neighbour
from tests.support.node import cluster, launched, metric, missed_until, options
from tests.support.pulse import Pulse, Sender
from tests.support.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

CIDR, SERVER, OTHER = "10.3.0.0/24", 196_609, 196_610
KNOWN = ["10.3.0.5", "10.3.0.6"]
CHANGING = [f"10.3.0.{number}" for number in range(20, 36)]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab: a pod that talks to known peers, and one that asks for the others."""
    with Lab(pods=2) as built:
        yield built


@pytest.fixture(scope="module")
def third(lab: Lab) -> Iterator[Neighbour]:
    """The cluster."""
    etcd = EtcdCluster(EtcdSettings(command_prefix=tuple(lab.node_a.command())))
    with Neighbour(lab, "c", 3, etcd=etcd) as built:
        built.fill(cidrs=[CIDR], identities=[SERVER, OTHER])
        for address in KNOWN:
            built.publish(address, SERVER)
        built.connect(CIDR)
        built.join()
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab, third: Neighbour) -> Iterator[AgentProcess]:
    """One agent for all stories, which knows the known peers."""
    with launched(lab, *options(lab), "--cleanup") as running:
        running.wait_ready()
        for address in KNOWN:
            missed_until(lab, address, SERVER)
        yield running
        assert metric(running, "lazymesh_unexpected_errors_total") == 0


@pytest.fixture(scope="module")
def witness(lab: Lab, agent: AgentProcess) -> Iterator[Witness]:
    """Somebody who looks at the map all the time."""
    with Witness(lab.bpffs / "lazymesh/lm_ipcache") as looking:
        for address in KNOWN:
            looking.may_be(address, SERVER)
        yield looking


@pytest.fixture(scope="module")
def changing(lab: Lab, third: Neighbour, witness: Witness, fault_seed: int) -> Iterator[Churn]:
    """Records that change, and traffic to their addresses."""
    built = Churn(third, witness, CHANGING, (SERVER, OTHER), random.Random(fault_seed))
    built.change(len(CHANGING))
    with Sender(lab.pods[1].namespace, Pulse(CHANGING, [])):
        yield built


@pytest.fixture
def churn(lab: Lab, changing: Churn, witness: Witness) -> Iterator[Churn]:
    """The same; no wrong identity was seen meanwhile, and no packet of known peers lost, when it is over."""
    settle([changing])
    before = witness.looks
    with Sender(lab.pods[0].namespace, Pulse(KNOWN, [], flow_every_s=0.02)) as known:
        yield changing
        took = settle([changing])
        fates = known.stop()
    wrong, looks = len(witness.wrong), witness.looks - before
    print(
        f"right after {took:.2f} s; {len(fates.flows)} packets, {fates.lost} lost; {looks} looks, {wrong} wrong"
    )
    assert fates.losses() == {}
    assert witness.wrong == []


def test_leader_changes_are_not_noticed(third: Neighbour, churn: Churn) -> None:
    """Another member leads, again and again, while records change."""
    for _ in range(5):
        third.etcd.move_leader()
        churn.change(3)


def test_killed_leader_is_survived(third: Neighbour, churn: Churn) -> None:
    """Whichever member the agent talks to; the others elect one of themselves and go on."""
    for _ in range(3):
        leader = third.etcd.wait_leader()
        leader.kill()
        churn.change(3)
        settle([churn])
        leader.start()


def test_frozen_member_is_left_for_another(lab: Lab, third: Neighbour, churn: Churn) -> None:
    """It answers nothing and keeps its connections; the agent goes to the next one of its configuration."""
    used = endpoint(lab)
    member = next(one for one in third.etcd.members if one.url == used)
    member.freeze()
    try:
        churn.change(3)
        settle([churn], 60)
        assert endpoint(lab) != used
    finally:
        member.thaw()


def test_member_that_slept_does_not_take_the_agent_back_in_time(
    lab: Lab, third: Neighbour, agent: AgentProcess, churn: Churn
) -> None:
    """It wakes up with an old state while the others are gone: records of then are not believed again."""
    first, sleeper, last = third.etcd.members
    for _ in range(3):
        third.join(first.url, sleeper.url, last.url)
        wait_until(lambda: endpoint(lab) == first.url, 20, "the first member in use")  # noqa: B023
        sleeper.freeze()
        for _turn in range(3):
            churn.change(5)
        settle([churn], 60)
        for member in (first, last):
            member.kill()
        sleeper.thaw()
        # It is the next one to be asked, and takes a moment to find out that it has nobody to lead it.
        wait_until(lambda: endpoint(lab) != first.url, 20, "the connection lost")  # noqa: B023
        wait_until(lambda: endpoint(lab) is not None or _has_no_leader(sleeper), 20, "an answer")  # noqa: B023
        for member in (first, last):
            member.start(wait=False)
        for member in (first, last):
            member.wait_ready()
        churn.change(3)
        settle([churn], 60)
        first, sleeper, last = sleeper, last, first


def _has_no_leader(member: EtcdServer) -> bool:
    return "leader" not in member.status()


def endpoint(lab: Lab) -> str | None:
    """Return which member the agent talks to."""
    found: str | None = cluster(lab, "c").get("endpoint")
    return found
