"""What becomes of missed packets, switched while traffic flows, and where holding is not possible."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.burst import Sink, send
from tests.support.etcd import wait_until
from tests.support.lab import AgentProcess, Lab, remote_address
from tests.support.namespaces import Namespace
from tests.support.node import metric, options, status

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab; nobody is published."""
    with Lab(pods=1) as built:
        yield built


class WithoutTun(Namespace):
    """A node whose container was not given /dev/net/tun."""

    def command(self, *argv: object) -> list[str]:  # type: ignore[override]
        """Run the command where an empty directory hides the device."""
        hide = 'mount -t tmpfs none /dev/net && exec "$@"'
        return super().command("unshare", "--mount", "sh", "-c", hide, "sh", *map(str, argv))


def held(agent: AgentProcess, outcome: str = "held") -> int:
    """Return a counter of the kernel's about holding."""
    return int(metric(agent, "lazymesh_held_packets_total", outcome=outcome))


def arrive(lab: Lab, number: int, patience_s: float = 2) -> int:
    """Send three datagrams to an address; return how many arrive."""
    with Sink(lab.node_b) as sink:
        send(lab.pods[0].namespace, [remote_address(number)], 3)
        return len(sink.wait(3, patience_s))


def test_missed_packets_fare_as_the_operator_says(lab: Lab) -> None:
    """Pass, then hold (which starts a holder), drop, and pass again, without a reload."""
    agent = AgentProcess(
        lab.node_a, [*options(lab, policy=None), "--on-miss", "pass"], lab.directory / "agent.log"
    )
    try:
        agent.wait_ready()
        assert status(lab)["datapath"]["holding"] == "off"
        program = lab.node_a.run("tc", "filter", "show", "dev", "lxc0", "ingress")
        assert arrive(lab, 1) == 3
        assert lab.cli("config", "on-miss", "hold").stdout == "on miss: hold\n"
        wait_until(lambda: status(lab)["datapath"]["holding"] == "on", 5)
        assert (arrive(lab, 2), held(agent) > 0) == (3, True)
        assert lab.cli("config", "on-miss", "drop").stdout == "on miss: drop\n"
        before = held(agent)
        assert arrive(lab, 3, 0.3) == 0
        lab.cli("config", "on-miss", "pass")
        assert status(lab)["datapath"]["onMiss"] == "pass"
        assert (arrive(lab, 4), held(agent)) == (3, before)
        assert lab.node_a.run("tc", "filter", "show", "dev", "lxc0", "ingress") == program
    finally:
        agent.stop()


def test_a_timeout_may_drop(lab: Lab) -> None:
    """No store answers, and the operator prefers loss to a window: nothing of what was held arrives."""
    words = [
        *options(lab, policy=None),
        "--on-miss",
        "hold",
        "--hold-timeout",
        "50",
        "--hold-timeout-action",
        "drop",
    ]
    agent = AgentProcess(lab.node_a, words, lab.directory / "agent.log")
    try:
        agent.wait_ready()
        lab.etcd.freeze()
        arrived, stale = 0, True
        for number in range(10, 15):
            # On a machine so busy that a heartbeat came too late, packets rightly pass: try again then.
            before = held(agent, "refused_stale")
            arrived = arrive(lab, number, 0.5)
            stale = held(agent, "refused_stale") != before
            if not stale:
                break
        assert (arrived, stale) == (0, False)
        wait_until(lambda: held(agent, "discarded") >= 3, 3)
        assert metric(agent, "lazymesh_released_packets_total", reason="timeout") >= 3
    finally:
        lab.etcd.thaw()
        agent.stop()


def test_where_holding_is_not_possible_packets_pass(lab: Lab) -> None:
    """The agent says so once and in its status, and runs as with pass; the check says what is missing."""
    node = WithoutTun(lab.node_a.name)
    agent = AgentProcess(node, [*options(lab, policy=None), "--on-miss", "hold"], lab.directory / "agent.log")
    try:
        agent.wait_ready()
        wait_until(lambda: status(lab)["wrong"], 5, "something wrong")
        (wrong,) = status(lab)["wrong"]
        assert "packets are not held" in wrong
        assert "/dev/net/tun" in wrong
        assert "WRONG: packets are not held" in lab.cli("status", check=False).stdout
        assert "Nothing is held" in lab.cli("config", "on-miss", "hold").stderr
        assert arrive(lab, 20) == 3
        assert held(agent, "refused_off") > 0
        assert agent.log.count("cannot hold packets") == 1
    finally:
        agent.stop()


@pytest.mark.parametrize("possible", [True, False])
def test_the_check_says_whether_holding_is_possible(lab: Lab, possible: bool) -> None:
    """One finding, and what to do about it."""
    node = lab.node_a if possible else WithoutTun(lab.node_a.name)
    words = ("check", "-o", "json", "--bpffs", str(lab.bpffs))
    text = node.run(sys.executable, "-m", "lazymesh", *words, check=False)
    (finding,) = [each for each in json.loads(text)["findings"] if each["name"] == "holding"]
    assert finding["verdict"] == ("ok" if possible else "warn")
    assert ("/dev/net/tun" in finding["text"]) is not possible
