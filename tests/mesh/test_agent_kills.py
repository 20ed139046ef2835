"""The agent is killed at any moment of its life, again and again: known peers lose nothing, nothing untrue survives."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.churn import Churn, settle
from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, AgentProcess, Lab, remote_address
from tests.support.node import launched, metric, options, pack_key, raw_entries, wait_identity
from tests.support.pulse import Pulse, Sender
from tests.support.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Iterator

KILLS = 40
START_UP_S = 2.5
"""From its start to its being ready, an agent takes about so long."""
KNOWN = [remote_address(number, 6 if number % 2 else 4) for number in range(8)]
CHANGING = [remote_address(number, 6 if number % 2 else 4) for number in range(100, 120)]


@pytest.fixture
def lab() -> Iterator[Lab]:
    """One lab: two pods, of which one talks to known peers only."""
    with Lab(pods=2) as built:
        built.publish_many(KNOWN)
        yield built


@pytest.mark.patience(900)
def test_kills_at_random_moments_cost_known_peers_nothing(lab: Lab, fault_seed: int) -> None:
    """Half of them while it starts; records are deleted and addresses re-used while it is dead, and while it lives."""
    print(f"seed {fault_seed}: replay with --fault-seed {fault_seed}")
    dice = random.Random(fault_seed)
    with Witness(lab.bpffs / "lazymesh/lm_ipcache") as witness:
        for address in KNOWN:
            witness.may_be(address, SERVER_IDENTITY)
        churn = Churn(lab, witness, CHANGING, (SERVER_IDENTITY, OTHER_IDENTITY), dice)
        churn.change(len(CHANGING))
        with launched(lab, *options(lab)) as agent, Sender(lab.pods[1].namespace, Pulse(CHANGING, [])):
            agent.wait_ready()
            with Sender(lab.pods[0].namespace, Pulse(KNOWN, [])):
                for address in KNOWN:
                    wait_identity(lab, address, SERVER_IDENTITY)
            settle([churn])
            with Sender(lab.pods[0].namespace, Pulse(KNOWN, [], flow_every_s=0.05)) as sender:
                took = _kill_often(lab, churn, dice, agent)
                fates = sender.stop()
        journal, entries = set(raw_entries(lab, "lm_owned")), set(raw_entries(lab))
    print(
        f"{KILLS} kills: {len(fates.flows)} packets to known peers, {fates.lost} lost; {churn.changes} records changed,"
        f" {witness.looks} looks at the map, {len(witness.wrong)} wrong identities;"
        f" right again after at most {max(took):.2f} s of being ready"
    )
    assert fates.losses() == {}
    assert witness.wrong == []
    assert journal == entries
    assert {pack_key(address) for address in KNOWN} <= entries


def _kill_often(lab: Lab, churn: Churn, dice: random.Random, agent: AgentProcess) -> list[float]:
    """Kill and start agents; return how long each that was let become ready took to have everything right."""
    took = []
    agent.kill()
    for _ in range(KILLS - 1):
        if dice.random() < 0.7:
            churn.change(dice.randrange(1, 6))
        agent = AgentProcess(lab.node_a, options(lab), lab.directory / "agent.log")
        try:
            if dice.random() < 0.5:
                time.sleep(dice.uniform(0, START_UP_S))  # a moment is what is drawn, nothing is waited for
                continue
            agent.wait_ready()
            took.append(settle([churn]))
            time.sleep(dice.uniform(0, 0.3))
            churn.change()
        finally:
            agent.kill()
    with launched(lab, *options(lab)) as last:
        last.wait_ready()
        took.append(settle([churn]))
        assert metric(last, "lazymesh_unexpected_errors_total") == 0
        assert "Traceback" not in last.log
    return took
