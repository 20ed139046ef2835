"""Late answers: fewer misses are let in while they last, each refused one counted, and all of them again afterwards."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

import pytest

from tests.support.etcd import wait_until
from tests.support.lab import ETCD_PORT, Lab, remote_address
from tests.support.node import launched, metric, options, packets, send_udp, status
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

PROXY_PORT = 12_381
BURST = 1_100
"""Somewhat more than a pod has free."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab whose etcd can be made slow."""
    with Lab(pods=1) as built:
        config = built.directory / "proxied"
        config.mkdir()
        url = built.etcd.url.replace(str(ETCD_PORT), str(PROXY_PORT))
        (config / "b").write_text(f"endpoints:\n- {url}\n", encoding="ascii")
        yield built


class Misses:
    """Sends to a new address every few milliseconds, about a hundred a second."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        for number in itertools.count(BURST):
            send_udp(self._lab.pods[0].namespace, remote_address(number % 16_000), 1)
            if self._stop.wait(0.01):
                return

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def test_late_answers_let_fewer_misses_in_until_they_are_in_time_again(lab: Lab) -> None:
    """The share falls, status says so, every refused miss is counted; then it comes back to all."""
    words = options(lab, clustermesh_config=str(lab.directory / "proxied"), policy=None)
    with (
        Proxy(lab.node_a, PROXY_PORT, ETCD_PORT) as proxy,
        launched(lab, *words, "--on-miss", "pass", "--signal-rate", "100") as agent,
    ):
        agent.wait_ready()
        for number in range(BURST):
            send_udp(lab.pods[0].namespace, remote_address(number), 1)
        with Misses(lab):
            wait_until(
                lambda: metric(agent, "cilium_ipcache_miss_signal_total") > BURST, 20, "a second of misses"
            )
            assert metric(agent, "lazymesh_admitted_ratio") == 1
            proxy.delay(0.4)
            wait_until(lambda: metric(agent, "lazymesh_admitted_ratio") < 1, 30, "a smaller share")
            assert metric(agent, "lazymesh_admission_cuts_total", reason="latency") >= 1
            assert any("misses are throttled" in line for line in status(lab)["wrong"])
            refused = packets(agent, "suppressed_rate")
            wait_until(
                lambda: packets(agent, "suppressed_rate") > refused + 50, 30, "misses that are not let in"
            )
            proxy.delay(0)
            wait_until(
                lambda: metric(agent, "lazymesh_admitted_ratio") == 1,
                90,
                lambda: f"everything let in, but {status(lab)['wrong']}",
            )
        ends = ("signalled", "suppressed_dedup", "suppressed_rate", "muted", "lost")
        assert sum(packets(agent, end) for end in ends) == packets(agent, "missed")
        assert metric(agent, "lazymesh_unexpected_errors_total") == 0
