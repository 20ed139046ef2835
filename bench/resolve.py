"""From a miss to its entry, beside a bare read of etcd by the same client, and beside a Go program that does the same.

All take turns in blocks, one miss at a time; once in the clear, once over TLS. The clock of a miss starts with the
kernel's timestamp in the signal. It ends for us with the agent's own word that packets may go, which comes after the
map was written (it is looked into), and for the Go program with the return of its map update.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Self

from bench import gopeer, records
from bench.bed import Bed, tls_bed
from bench.gopeer import Peer
from bench.report import Part, Row, percentiles
from bench.stage import running
from bench.store import Store
from lazymesh.datapath.libbpf import Map
from lazymesh.datapath.pins import IPCACHE, Pins
from tests.support.lab import Lab
from tests.support.node import Misses, pack_key, pack_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS, BLOCK = 8, 250
MOST_RATIO, MOST_P99_MS, MOST_OF_GO = 1.5, 5, 1.0
PAUSE_S = 0.002
"""After each, misses and reads alike: a lone miss comes to an agent that sleeps, and what the agent does after an entry
stands must not be measured with the next."""


class Turns:
    """Who takes turns: our reader and our agent, and the Go program if there is one."""

    def __init__(self, bed: Bed, numbers: Iterator[int], store: Store, peer: Peer | None) -> None:
        self._bed, self._numbers, self._store, self._peer = bed, numbers, store, peer
        self._sockets = [
            pod.namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) for pod in bed.lab.pods
        ]
        self.took: dict[str, list[float]] = defaultdict(list)

    def __enter__(self) -> Self:
        self._misses = Misses(self._bed.lab.socket)
        self._ipcache = Map.pinned(Pins.under(self._bed.lab.bpffs).path(IPCACHE))
        return self

    def __exit__(self, *exc: object) -> None:
        self._misses.__exit__()
        self._ipcache.close()
        for sock in self._sockets:
            sock.close()

    def block(self) -> None:
        """Take a turn each."""
        keys = [f"{records.PUSHED}{ip}" for ip in self._fresh()]
        self.took["etcd_read"] += self._store.read(keys, PAUSE_S)
        self.took["miss_to_entry"] += [self._miss(ip) for ip in self._fresh()]
        if self._peer is not None:
            self.took["go_read"] += self._peer.read(keys, PAUSE_S)
            self.took["go_miss_to_entry"] += [self._miss_of_peer(self._peer, ip) for ip in self._fresh()]

    def _fresh(self) -> list[str]:
        return [records.pod_ip(number) for number in itertools.islice(self._numbers, BLOCK)]

    def _miss(self, ip: str) -> float:
        self._sockets[0].sendto(b"", (ip, 9))
        outcome = self._misses.next(ip)
        if outcome["outcome"] != "installed":
            raise RuntimeError(f"{ip}: {outcome}")
        _insist(self._ipcache, ip)
        time.sleep(PAUSE_S)
        return outcome["latency_ms"] * 1_000

    def _miss_of_peer(self, peer: Peer, ip: str) -> float:
        self._sockets[1].sendto(b"", (ip, 9))
        address, took = peer.next_entry()
        if address != ip:
            raise RuntimeError(f"{ip} missed, {address} resolved")
        _insist(peer.ipcache, ip)
        time.sleep(PAUSE_S)
        return took


def _insist(ipcache: Map, ip: str) -> None:
    value = ipcache.lookup(pack_key(ip))
    if value != pack_value(records.IDENTITY, records.HOST):
        raise RuntimeError(f"{ip} was resolved, but the map has {value and value.hex()}")


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    left_out = gopeer.build(say)
    took: dict[str, dict[str, list[float]]] = {}
    with Lab(pods=2) as lab, contextlib.ExitStack() as stack:
        plain = Bed(lab, "plain", lab.etcd.url)
        for name, bed in (("plain", plain), ("tls", stack.enter_context(tls_bed(lab)))):
            say(
                f"{name}: {ROUNDS * BLOCK:,} misses and reads in turns{'' if left_out else ', the Go program too'}"
            )
            took[name] = measure(bed, with_peer=not left_out)
    figures = summary(took["plain"]) | {"tls": summary(took["tls"])}
    repeats = noise(took["plain"]) | {f"tls.{name}": values for name, values in noise(took["tls"]).items()}
    return Part(figures, rows(figures), repeats, left_out)


def measure(bed: Bed, *, with_peer: bool) -> dict[str, list[float]]:
    """Return microseconds by who took them."""
    lab = bed.lab
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store(lab.node_a, bed.file))
        store.fill("cluster_b", 1)
        store.fill("pods", 0, 4 * ROUNDS * BLOCK)
        options = {"interface": "lxc0", "uplink": None, "policy": None, "clustermesh_config": str(bed.config)}
        stack.enter_context(running(lab, "--on-miss", "drop", "--signal-rate", "0", **options))
        peer = stack.enter_context(Peer(bed, lab.pods[1])) if with_peer else None
        turns = stack.enter_context(Turns(bed, itertools.count(), store, peer))
        for _ in range(ROUNDS):
            turns.block()
        return turns.took


def summary(took: dict[str, list[float]]) -> dict[str, Any]:
    """Return the figures of one way to etcd."""
    read, miss = (percentiles(took[name], 1) for name in ("etcd_read", "miss_to_entry"))
    figures: dict[str, Any] = {
        "etcd_read_us": read,
        "miss_to_entry_us": miss,
        "ratio_p50": round(miss["p50"] / read["p50"], 3),
    }
    if "go_read" in took:
        go = {name: percentiles(took[f"go_{name}"], 1) for name in ("read", "miss_to_entry")}
        figures["go"] = {f"{name}_us": value for name, value in go.items()}
        figures["ratio_go_p50"] = round(miss["p50"] / go["miss_to_entry"]["p50"], 3)
    return figures | {"samples": {name: [round(value) for value in values] for name, values in took.items()}}


def noise(took: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the medians of each round, and what follows from them."""
    medians = {
        name: [statistics.median(values[at : at + BLOCK]) for at in range(0, len(values), BLOCK)]
        for name, values in took.items()
    }
    miss, read = medians["miss_to_entry"], medians["etcd_read"]
    found = {
        "etcd_read_us.p50": read,
        "miss_to_entry_us.p50": miss,
        "ratio_p50": [ours / bare for ours, bare in zip(miss, read, strict=True)],
    }
    if "go_miss_to_entry" in medians:
        go = medians["go_miss_to_entry"]
        found["go.miss_to_entry_us.p50"] = go
        found["ratio_go_p50"] = [ours / theirs for ours, theirs in zip(miss, go, strict=True)]
    return found


def rows(figures: dict[str, Any]) -> list[Row]:
    """Say what is to be compared."""
    found = []
    for words, of in (("", figures), (", TLS", figures["tls"])):
        read, miss = of["etcd_read_us"], of["miss_to_entry_us"]
        ours = _us(miss)
        found.append(
            Row(f"miss to entry{words}, p50", ours, f"bare read {_us(read)}", of["ratio_p50"], MOST_RATIO)
        )
        found.append(
            Row(
                f"miss to entry{words}, p99",
                ours,
                f"bare read {_us(read)}",
                miss["p99"] / 1_000,
                MOST_P99_MS,
                "ms",
            )
        )
        if "go" in of:
            go = of["go"]["miss_to_entry_us"]
            found.append(
                Row(f"miss to entry{words}, p50", ours, f"Go {_us(go)}", of["ratio_go_p50"], MOST_OF_GO)
            )
    return found


def _us(of: dict[str, float]) -> str:
    return f"{of['p50']:.0f} / {of['p99']:.0f} us"
