"""Somebody keeps the kernel's lock over interfaces, for which every question about them waits: misses do not."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import pytest
from pyroute2 import IPRoute

from lazymesh.datapath.holdmaps import HoldCounterMap
from tests.support.burst import Sink, Ticker
from tests.support.cilium import Cilium
from tests.support.lab import Lab, remote_address
from tests.support.node import beside_cilium, launched, options
from tests.support.rtnl import rtnl_kept

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.lab import AgentProcess
    from tests.support.namespaces import Namespace

pytestmark = pytest.mark.needs("clang", "userfaultfd")

KEPT_S = 0.6
"""Longer than the silence of an agent after which packets are not held any more. (Where 3,000 pairs of interfaces go
at once, the kernel keeps the lock for some 0.4 s.)"""
KNOWN, *FRESH = (remote_address(number) for number in range(8_000))
_fresh = iter(FRESH)


class Questions:
    """Asks the kernel for something that takes the lock, again and again, and notes the longest wait."""

    def __init__(self, namespace: Namespace) -> None:
        self.longest_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=namespace.call, args=(self._ask,))

    def __enter__(self) -> Questions:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        with IPRoute() as route:
            while not self._stop.wait(0.005):
                began = time.monotonic()
                route.link("set", index=1, state="up")
                self.longest_s = max(self.longest_s, time.monotonic() - began)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab, with more peers than all tests send to."""
    with Lab(pods=1) as built:
        built.publish_many([KNOWN, *FRESH])
        yield built


@pytest.fixture(params=["alone", "beside Cilium"])
def agent(request: pytest.FixtureRequest, lab: Lab) -> Iterator[AgentProcess]:
    """Return an agent that holds missed packets."""
    if request.param == "alone":
        with launched(lab, *options(lab, policy=None), "--on-miss", "hold", "--cleanup") as running:
            running.wait_ready()
            yield running
    else:
        with Cilium(lab), beside_cilium(lab) as running:
            yield running


@pytest.mark.usefixtures("agent")
def test_misses_are_answered_while_the_kernel_keeps_its_lock_over_interfaces(lab: Lab) -> None:
    """Twice; nothing times out, nothing passes unheld."""
    with Sink(lab.node_b) as sink, Ticker(lab.pods[0].namespace, KNOWN, _fresh, 0.005) as ticker:
        for _ in range(2):
            with Questions(lab.node_a) as questions:
                with rtnl_kept(lab.node_a):
                    time.sleep(KEPT_S)
                time.sleep(0.4)
            assert questions.longest_s > 0.9 * KEPT_S, "the lock was not kept for long"
        ticker.stop()
        sink.wait(len(ticker.sent))
    with contextlib.closing(HoldCounterMap(lab.bpffs / "lazymesh")) as maps:
        timeouts, held = maps.holder()["timeout"], maps.kernel()
    assert (timeouts, held["refused_stale"], held["held"] > 200) == (0, 0, True)
    assert len(sink.arrived) == len(ticker.sent)
