"""The audit of the open window: what went through as world, and what policy says of it once the peer is known."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.burst import Sink, send
from tests.support.etcd import wait_until
from tests.support.lab import OTHER_IDENTITY, SERVER_IDENTITY, AgentProcess, Lab, remote_address
from tests.support.node import identity_of, metric

if TYPE_CHECKING:
    from collections.abc import Iterator

OPEN_TO_WORLD = """\
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata:
  name: servers-and-the-world
spec:
  endpointSelector: {}
  egress:
    - toEndpoints:
        - matchLabels:
            k8s:app: server
    - toEntities: [world]
"""
"""What pass mode needs to be of use, and what makes it a hole: the peer is world until it is known."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab, whose policy lets the world in."""
    with Lab(pods=1) as built:
        built.set_policy(OPEN_TO_WORLD)
        yield built


@pytest.fixture(scope="module")
def agent(lab: Lab) -> AgentProcess:
    """Return an agent that passes missed packets on."""
    return lab.start_agent("--on-miss", "pass")


def windows(lab: Lab, since: str = "1h") -> dict[str, dict[str, Any]]:
    """Return the audit by address."""
    answer = json.loads(lab.cli("audit", "--since", since, "-o", "json").stdout)
    return {window["address"]: window for window in answer["windows"]}


def let_through(lab: Lab, address: str, count: int = 3) -> None:
    """Send packets to an address that is not known yet; all of them arrive."""
    with Sink(lab.node_b) as sink:
        send(lab.pods[0].namespace, [address], count, 100)
        assert len(sink.wait(count)) == count


@pytest.mark.parametrize(
    ("number", "identity", "verdict"), [(1, SERVER_IDENTITY, "allowed"), (2, OTHER_IDENTITY, "denied")]
)
def test_a_window_is_judged_once_its_peer_is_known(
    lab: Lab, agent: AgentProcess, number: int, identity: int, verdict: str
) -> None:
    """The second of them is what the audit is for: let through as world, denied by what it is."""
    address = remote_address(number)
    lab.publish(address, identity)
    before = metric(agent, "lazymesh_open_windows_total"), metric(agent, "lazymesh_open_window_packets_total")
    let_through(lab, address, 1)
    wait_until(lambda: identity_of(lab, address) == identity, 3)
    wait_until(lambda: address in windows(lab) and not windows(lab)[address]["open"], 3, "a closed window")
    window = windows(lab)[address]
    assert (window["identity"], window["cluster"], window["verdict"]) == (identity, "b", verdict)
    assert (window["direction"], window["packets"], window["bytes"]) == ("egress", 1, 142)
    assert metric(agent, "lazymesh_open_windows_total") == before[0] + 1
    assert metric(agent, "lazymesh_open_window_packets_total") == before[1] + 1


def test_a_window_of_nobody_stays_open(lab: Lab, agent: AgentProcess) -> None:
    """No record, no identity, no verdict; the period asked for leaves older ones out."""
    address = remote_address(3)
    let_through(lab, address, 4)
    window = windows(lab)[address]
    assert (window["identity"], window["verdict"], window["open"]) == (None, "unknown", True)
    assert (window["packets"], window["bytes"]) == (4, 4 * 142)
    assert 0 <= window["seconds"] < 1
    wait_until(lambda: address not in windows(lab, "1s"), 3, "the window to be older than asked for")


def test_the_audit_is_a_table_for_people(lab: Lab, agent: AgentProcess) -> None:
    """One line for each window; an empty one says so in words."""
    address = remote_address(4)
    let_through(lab, address)
    lines = lab.cli("audit").stdout.splitlines()
    assert lines[0].split()[:4] == ["SINCE", "ADDRESS", "DIRECTION", "CLUSTER"]
    (line,) = [line for line in lines if f" {address} " in line]
    assert "unknown (open)" in line
    nothing = lab.cli("audit", "--since", "0s")
    assert (nothing.stdout, "Nothing" in nothing.stderr) == ("", True)


def test_seconds_count_from_the_first_packet_to_the_last(lab: Lab, agent: AgentProcess) -> None:
    """Both sums are in the metrics."""
    address = remote_address(5)
    let_through(lab, address)
    wait_until(lambda: (let_through(lab, address, 1), windows(lab)[address]["seconds"] > 0.3)[1], 5)
    before = metric(agent, "lazymesh_open_window_seconds_total")
    lab.publish(address)
    wait_until(lambda: (let_through(lab, address, 1), identity_of(lab, address))[1], 10, "the entry")
    wait_until(lambda: not windows(lab)[address]["open"], 3)
    assert metric(agent, "lazymesh_open_window_seconds_total") - before > 0.3


def test_a_restart_is_where_the_record_begins() -> None:
    """What the last agent had recorded is gone with it, and the answer does not pass that over."""
    with Lab(pods=1) as other:
        other.start_agent("--on-miss", "pass").stop()
        stopped = datetime.now(UTC)
        other.start_agent("--on-miss", "pass")
        assert stopped < recorded_since(other) < datetime.now(UTC)
        assert "Recorded since" in other.cli("audit").stderr


def recorded_since(lab: Lab) -> datetime:
    """Return from when on the agent knows."""
    return datetime.fromisoformat(json.loads(lab.cli("audit", "-o", "json").stdout)["recordedSince"])
