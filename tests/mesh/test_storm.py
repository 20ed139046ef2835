"""A pod sends as fast as the kernel can, to one mesh address after the other: the agent stands, friends lose nothing.

What it costs others is measured by ``scripts/bench --only flood``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import SERVER_IDENTITY, Lab, remote_address
from tests.support.node import launched, metric, options, packets, send_udp, status, wait_identity
from tests.support.pulse import Pulse, Sender
from tests.support.storm import Storm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess

SECONDS = {"hold": 20, "pass": 5}
PREFIX = "10.64.0.0/12"
KNOWN = [remote_address(number) for number in range(4)]
CAUSES = ("signalled", "suppressed_dedup", "suppressed_rate", "muted", "lost")
RSS_MIB = 100
"""What an agent may have at all."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab with a pod that storms and one that has friends."""
    with Lab(pods=2) as built:
        built.publish_many([*KNOWN, remote_address(9)])
        yield built


@pytest.fixture
def agent(lab: Lab, on_miss: str) -> Iterator[AgentProcess]:
    """Return an agent that takes a million addresses for the mesh's, and knows the friends."""
    words = options(lab, policy=None, mesh_cidr=f"b={PREFIX}")
    with launched(lab, *words, "--cleanup", "--on-miss", on_miss) as running:
        running.wait_ready()
        for ip in KNOWN:
            send_udp(lab.pods[1].namespace, ip, 1)
            wait_identity(lab, ip, SERVER_IDENTITY)
        yield running


def rss_mib(pid: int) -> float:
    """Return a process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * 4096 / 2**20


@pytest.mark.parametrize("on_miss", SECONDS)
def test_storm_is_counted_to_the_last_packet_and_costs_known_peers_none(
    lab: Lab, agent: AgentProcess, on_miss: str
) -> None:
    """Queue and memory stay within their bounds, and when it is over the next miss is resolved as ever."""
    before = {cause: packets(agent, cause) for cause in ("missed", *CAUSES)}
    quiet, waiting, peak = rss_mib(agent.pid), 0, 0.0
    with Sender(lab.pods[1].namespace, Pulse(KNOWN, [], flow_every_s=0.01)) as friends:
        with Storm(lab, lab.pods[0], PREFIX) as storm:
            until = time.monotonic() + SECONDS[on_miss]
            while time.monotonic() < until:
                time.sleep(0.2)
                waiting = max(waiting, status(lab)["queue"]["waiting"])
                peak = max(peak, rss_mib(agent.pid))
            sent = storm.stop()
        fates = friends.stop()
    print(f"{sent} packets, {sent / storm.seconds:.0f} a second; RSS {quiet:.0f}, at most {peak:.0f} MiB")
    counted = {cause: packets(agent, cause) - n for cause, n in before.items()}
    assert counted["missed"] == sent
    assert sum(counted[cause] for cause in CAUSES) == sent
    assert fates.lost == 0
    assert len(fates.flows) > 100
    assert waiting <= 4_096
    assert peak < RSS_MIB
    assert metric(agent, "lazymesh_unexpected_errors_total") == 0

    def resolved() -> bool:
        send_udp(lab.pods[1].namespace, remote_address(9), 1)
        return metric(agent, "lazymesh_resolutions_total", outcome="installed") > len(KNOWN)

    wait_until(resolved, 10, "the next miss resolved")
