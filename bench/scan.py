"""Another pod's first connections while one pod scans the mesh at full speed, beside those without a scan."""

from __future__ import annotations

import sys
import threading
import time
from itertools import chain
from typing import TYPE_CHECKING, Self

from bench.report import Part, Row, milliseconds, percentiles, repeated
from bench.stage import connect_each, fresh, running
from lazymesh.datapath.holdmaps import HoldLimits
from tests.support.lab import Lab
from tests.support.node import SIGNAL_OUTCOMES, metric, packets

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from tests.support.lab import AgentProcess
    from tests.support.namespaces import Namespace

ROUNDS, CONNECTIONS, PAUSE_S = 3, 300, 0.005
LOOK_S = 0.1
"""Between two looks at how much is parked: a peak of less than that may not be seen."""


class Scan:
    """A process in a pod that sends datagrams to the addresses of a /17 in a loop."""

    _CODE = """
import itertools, socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in itertools.cycle(range(1 << 15)):
    sock.sendto(b"scan", (f"10.2.{128 + (number >> 8)}.{number & 255}", 9))
"""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    def __enter__(self) -> Self:
        self._process: subprocess.Popen[bytes] = self._namespace.popen(
            sys.executable, "-I", "-S", "-c", self._CODE
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()


class Peak:
    """Samples how much is parked, by the agent's metrics."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent
        self.bytes = 0
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        try:
            while not self._stop.wait(LOOK_S):
                self.bytes = max(self.bytes, int(metric(self._agent, "lazymesh_parked_bytes")))
        except Exception as exc:  # a thread's words reach nobody who could act on them
            self._failure = exc

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None and self._failure is not None:
            raise RuntimeError(f"how much is parked could not be read: {self._failure}") from self._failure


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    quiet: list[list[float]] = []
    beside: list[list[float]] = []
    with Lab(pods=2) as lab, running(lab, "--on-miss", "hold", policy=None) as agent, Peak(agent) as peak:
        scanner, pod = (one.namespace for one in lab.pods)
        for number in range(ROUNDS):
            say(
                f"round {number + 1} of {ROUNDS}: {CONNECTIONS} connections without a scan, {CONNECTIONS} with one"
            )
            addresses = fresh(2 * CONNECTIONS)
            lab.publish_many(addresses)
            time.sleep(1)
            quiet.append(connect_each(pod, addresses[:CONNECTIONS], PAUSE_S))
            with Scan(scanner):
                time.sleep(0.5)
                beside.append(connect_each(pod, addresses[CONNECTIONS:], PAUSE_S))
            time.sleep(1)
        missed = packets(agent, "missed")
        counted = sum(packets(agent, outcome) for outcome in SIGNAL_OUTCOMES)
        out = books(agent)
    figures = {
        "quiet_ms": percentiles(chain.from_iterable(quiet)),
        "beside_scan_ms": percentiles(chain.from_iterable(beside)),
        "misses": missed,
        "misses_without_cause": missed - counted,
        "parked_bytes_peak_sampled": peak.bytes,
        "packets_unaccounted": out,
    }
    return Part(figures, rows(figures), repeated({"quiet_ms": quiet, "beside_scan_ms": beside}))


def books(agent: AgentProcess) -> int:
    """Return the difference in the counters of held packets."""
    fates = {
        fate: int(metric(agent, "lazymesh_held_packets_total", outcome=fate))
        for fate in ("held", "gated", "returned", "discarded")
    }
    return fates["held"] + fates["gated"] - fates["returned"] - fates["discarded"]


def rows(figures: dict) -> list[Row]:
    """Return the comparisons."""
    quiet, beside = figures["quiet_ms"], figures["beside_scan_ms"]
    bound = HoldLimits().total_bytes
    return [
        *(
            Row(
                f"another pod's first connection, {rank}", milliseconds(beside[rank]),
                f"quiet {milliseconds(quiet[rank])}", beside[rank] / quiet[rank], budget,
            )
            for rank, budget in (("p50", 2), ("p99", 4))
        ),
        Row(
            f"parked at most, looked at every {LOOK_S:g} s", f"{figures['parked_bytes_peak_sampled']} bytes",
            f"bound {bound}", figures["parked_bytes_peak_sampled"] / bound, 1,
        ),
        Row(
            f"of {figures['misses']} misses without a cause", str(figures["misses_without_cause"]), "none",
            abs(figures["misses_without_cause"]), 0, "misses",
        ),
        Row(
            "held packets unaccounted for", str(figures["packets_unaccounted"]), "none",
            abs(figures["packets_unaccounted"]), 0, "packets",
        ),
    ]  # fmt: skip
