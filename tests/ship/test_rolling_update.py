"""The agent is replaced, as kubelet replaces it, by itself and by other versions: known peers notice nothing."""

from __future__ import annotations

import subprocess
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.lab import SERVER_IDENTITY, Lab, remote_address
from tests.support.node import entries, raw_entries, send_udp, wait_identity
from tests.support.pulse import Pulse, Sender

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.needs("earlier versions")

PREVIOUS = "6ea4f65"
"""A version before this one: pins and journal of both go into each other, and both tell a policy by what it says. Where
one tells it by its text, rights are taken until all are listed."""
OLDER = "cc98f12"
"""Its lm_config has another layout."""
PEERS = 8
TIMES = 12


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab whose pod has talked to its peers."""
    with Lab(pods=1) as built:
        yield built


def version(commit: str, into: Path) -> dict[str, str]:
    """Unpack the agent of a commit; returns the environment in which it runs."""
    into.mkdir()
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", commit, "agent", "bpf"], check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", into], input=archive, check=True)
    return {"PYTHONPATH": str(into / "agent")}


def known_peers(lab: Lab) -> list[str]:
    """Publish peers of both families and have them resolved."""
    peers = [remote_address(number, 6 if number % 2 else 4) for number in range(PEERS)]
    lab.publish_many(peers)
    for peer in peers:
        send_udp(lab.pods[0].namespace, peer, 1)
        wait_identity(lab, peer, SERVER_IDENTITY)
    return peers


@pytest.mark.patience(900)
def test_no_packet_of_a_known_peer_is_lost(lab: Lab, tmp_path: Path) -> None:
    """Twelve times, every second time by the previous version: flows and new connections, under policy."""
    previous = version(PREVIOUS, tmp_path / "previous")
    agent = lab.start_agent(env=previous)
    peers = known_peers(lab)
    with Sender(lab.pods[0].namespace, Pulse(peers, peers)) as sender:
        for env in islice(cycle([{}, {}, previous, previous]), TIMES):
            assert agent.stop() == 0
            agent = lab.start_agent(env=env)
        fates = sender.stop()
    assert len(fates.flows) > 10 * TIMES
    assert len(fates.fresh) > 100 * TIMES
    assert fates.lost == 0
    assert set(entries(lab)) == set(peers)
    assert len(raw_entries(lab, "lm_owned")) == PEERS, "the journal went from hand to hand"


def test_version_with_other_maps_is_followed_without_its_pins(lab: Lab, tmp_path: Path) -> None:
    """Entries and journal stay; what else it had laid out differently is made anew, and said."""
    agent = lab.start_agent(env=version(OLDER, tmp_path / "older"))
    peers = known_peers(lab)
    assert agent.stop() == 0
    agent = lab.start_agent()
    assert "map of another version, replaced" in agent.log
    assert set(entries(lab)) == set(peers)
    assert len(raw_entries(lab, "lm_owned")) == PEERS
    lab.withdraw(peers[0])
    wait_identity(lab, peers[0], None)
