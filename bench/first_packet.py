"""First connections to pods that are not in the ipcache, dropped and held, beside warm ones in the same run."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from bench.report import Part, Row, milliseconds, percentiles, repeated
from bench.stage import connect_each, fresh, running, syn_retransmits
from tests.support.lab import ETCD_PORT, Lab
from tests.support.proxy import Proxy
from tests.support.traffic import Probe, probe

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECTIONS, BLOCK = 1_000, 250
SLOW_CONNECTIONS = 100
SLOW_S = 0.05
PROXY_PORT = 12_379


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    with Lab(pods=1) as lab:
        say("dropped: 20 connections at once, their first SYN denied as world")
        dropped = measure_dropped(lab)
        say(f"held: {CONNECTIONS} connections one after the other, in turns with warm ones")
        held, warm, lost = measure_held(lab)
        say(f"held: {SLOW_CONNECTIONS} with etcd answering {SLOW_S * 1_000:.0f} ms later")
        slow, slow_lost = measure_slow(lab)
    figures = {
        "dropped_ms": percentiles(dropped),
        "hold_ms": percentiles(chain.from_iterable(held)),
        "warm_ms": percentiles(chain.from_iterable(warm)),
        "hold_slow_etcd_ms": percentiles(slow),
        "syns_lost": lost + slow_lost,
    }
    return Part(figures, rows(figures), repeated({"hold_ms": held, "warm_ms": warm}))


def rows(figures: dict) -> list[Row]:
    """Return the comparisons."""
    hold, warm, slow = figures["hold_ms"], figures["warm_ms"], figures["hold_slow_etcd_ms"]
    against = f"warm {milliseconds(warm['p50'])} / {milliseconds(warm['p99'])}"
    dropped = figures["dropped_ms"]["p50"]
    return [
        Row("held, p50 above warm", milliseconds(hold["p50"]), against, hold["p50"] - warm["p50"], 1, "ms"),
        Row("held, p99 above warm", milliseconds(hold["p99"]), against, hold["p99"] - warm["p99"], 10, "ms"),
        Row(
            "held, etcd 50 ms slower, p99 above that", milliseconds(slow["p99"]), "50 ms",
            slow["p99"] - SLOW_S * 1_000, 20, "ms",
        ),
        Row("SYNs sent twice", str(figures["syns_lost"]), "none", figures["syns_lost"], 0, "SYNs"),
        Row(
            "held p50 by dropped p50", milliseconds(hold["p50"]), f"dropped {milliseconds(dropped)}",
            hold["p50"] / dropped,
        ),
    ]  # fmt: skip


def measure_dropped(lab: Lab) -> list[float]:
    """With ``pass`` the policy denies the first SYN as world; the second comes a second later."""
    addresses = fresh(20)
    lab.publish_many(addresses)
    with running(lab, "--on-miss", "pass"):
        exchanges = probe(lab.pods[0].namespace, Probe(tcp=tuple(addresses), echoes=1))
    return [one.first_ms for one in exchanges if one.first_ms is not None]


def measure_held(lab: Lab) -> tuple[list[list[float]], list[list[float]], int]:
    """Measure blocks of first and of warm connections in turns, directly to etcd; also count the lost SYNs."""
    addresses = fresh(CONNECTIONS)
    lab.publish_many(addresses)
    pod = lab.pods[0].namespace
    held: list[list[float]] = []
    warm: list[list[float]] = []
    with running(lab, "--on-miss", "hold", policy=None):
        before = syn_retransmits(pod)
        for at in range(0, CONNECTIONS, BLOCK):
            held.append(connect_each(pod, addresses[at : at + BLOCK]))
            warm.append(connect_each(pod, addresses[at : at + BLOCK]))
        return held, warm, syn_retransmits(pod) - before


def measure_slow(lab: Lab) -> tuple[list[float], int]:
    """Do the same through a proxy that delays each answer."""
    addresses = fresh(SLOW_CONNECTIONS)
    lab.publish_many(addresses)
    config = lab.directory / "slow"
    config.mkdir()
    url = lab.etcd.url.replace(str(ETCD_PORT), str(PROXY_PORT))
    (config / lab.remote_name).write_text(f"endpoints:\n- {url}\n", encoding="ascii")
    pod = lab.pods[0].namespace
    with (
        Proxy(lab.node_a, PROXY_PORT, ETCD_PORT) as proxy,
        running(lab, "--on-miss", "hold", policy=None, clustermesh_config=str(config)),
    ):
        proxy.delay(SLOW_S)
        before = syn_retransmits(pod)
        return connect_each(pod, addresses), syn_retransmits(pod) - before
