"""The fewest capabilities with which the agent works on this kernel, whatever limit memory has; each of them counts."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.lab import Lab, remote_address, this_checkout
from tests.support.node import connect, filters, metric, options, pins

if TYPE_CHECKING:
    from collections.abc import Iterator

KERNEL = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
NEEDED = ("NET_ADMIN", "SYS_ADMIN") + (("SYS_RESOURCE",) if KERNEL < (5, 11) else ())


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab for all agents."""
    with Lab(pods=1) as built:
        yield built


def only(*capabilities: str) -> tuple[str, ...]:
    """Return the words that run a program of root's with these, under the usual limit for what may be locked."""
    bounds = ",".join(["-all", *(f"+{name.lower()}" for name in capabilities)])
    return "prlimit", "--memlock=8388608:8388608", "setpriv", f"--bounding-set={bounds}", "--inh-caps=-all"


def test_agent_works_with_the_fewest(lab: Lab) -> None:
    """Programs, maps, a TAP, a packet that is held and given back, and all of it taken off the node again."""
    lab.program = lambda *words: [*only(*NEEDED), *this_checkout(*words)]
    agent = lab.start_agent("--cleanup")
    peer = remote_address(1)
    lab.publish(peer)
    assert connect(lab.pods[0].namespace, peer) is not None
    assert metric(agent, "lazymesh_held_packets_total", outcome="held") >= 1
    assert agent.stop() == 0
    assert pins(lab) == []
    assert filters(lab.node_a) == []


@pytest.mark.parametrize("without", NEEDED)
def test_each_of_them_is_missed(lab: Lab, without: str) -> None:
    """By the agent, in one line, before it does anything; and by the check."""
    words = only(*(name for name in NEEDED if name != without))
    for command in (["agent", *options(lab)], ["check", "--bpffs", str(lab.bpffs)]):
        done = subprocess.run(
            lab.node_a.command(*words, *this_checkout(*command)),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 3
        assert f"missing CAP_{without}, " in (done.stderr if command[0] == "agent" else done.stdout)
    assert pins(lab) == []
