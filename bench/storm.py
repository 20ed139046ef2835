"""A storm of misses: each pod of a mesh is missed once, as fast as a sender can, until all have their entries.

Beside it, in turns: the Go program, reading the same keys in the same transactions; and a bare loop of our client's
that reads them and does nothing with what it gets. Only --signal-rate is lifted, and the map is made larger than the
storm. What the agent has no room for at the moment (muted, lost, shed) is counted by it and sent again at once, as pods
do; the time runs until the last entry stands.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from bench import gopeer, records
from bench.bed import Bed
from bench.gopeer import Peer
from bench.report import Part, Row
from bench.stage import cpu_s, running
from bench.store import Store
from lazymesh.datapath.libbpf import Map
from lazymesh.datapath.pins import IPCACHE, Pins
from tests.support.lab import Lab
from tests.support.node import SIGNAL_OUTCOMES, metric, pack_key, pack_value, packets, status

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.lab import Pod

ADDRESSES, IN_A_ROW, REPEATS = 50_000, 500_000, 5
MAP_SIZE = 20 * 60_000
"""A twentieth of it is the agent's: more than one storm."""
PATIENCE_S, LOOK_S, QUIET_S, SAMPLE = 180, 0.005, 0.05, 200
OVER_GO, SHARE_OF_CPU, SHARE_OF_BARE = 1.5, 0.5, 0.5


@dataclass(frozen=True)
class Storm:
    """How one went. Processor time is the resolving process' alone."""

    addresses: int
    seconds: float
    """From the first packet to the last entry, by the look of a sample; what it lacked would have begun a new round."""
    cpu_us_each: float
    """Until then."""
    rounds: int
    """How often what was missing was sent."""
    sent_s: float
    """What the sender needed for the first of them."""
    wrong: int
    lost: int
    """Addresses without an entry at the end."""


class Resolving(Protocol):
    """Whoever is stormed."""

    @property
    def pid(self) -> int:
        """Its process."""


def storm(who: Resolving, pod: Pod, ipcache: Map, first: int, count: int) -> Storm:
    """Have each address missed until it has an entry."""
    ips = [records.pod_ip(number) for number in range(first, first + count)]
    keys = {ip: pack_key(ip) for ip in ips}
    sock = pod.namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    left, rounds, stood = ips, 0, 0.0
    before, began = cpu_s(who.pid), time.monotonic()
    with sock:
        for ip in ips:
            sock.sendto(b"", (ip, 9))
        sent_s = time.monotonic() - began
        while left and time.monotonic() < began + PATIENCE_S:
            _wait(ipcache, keys, left)
            rounds, stood = rounds + 1, time.monotonic()
            left = [ip for ip in left if _missed_again(ipcache, keys[ip], sock, ip)]
    seconds, cpu = stood - began, cpu_s(who.pid) - before
    expected = pack_value(records.IDENTITY, records.HOST)
    wrong = sum(1 for key in keys.values() if ipcache.lookup(key) not in (None, expected))
    return Storm(count, seconds, cpu * 1e6 / count, rounds, sent_s, wrong, len(left))


def _missed_again(ipcache: Map, key: bytes, sock: socket.socket, ip: str) -> bool:
    """Send a packet again if its address has no entry; not after looking at all others, as pods wait for no others."""
    if ipcache.lookup(key) is not None:
        return False
    sock.sendto(b"", (ip, 9))
    return True


def _wait(ipcache: Map, keys: dict[str, bytes], ips: list[str]) -> None:
    """Wait while entries come, by the look of a sample: some from all over, and those that were sent last."""
    sample, moved = [*ips[:: max(1, len(ips) // SAMPLE)], *ips[-SAMPLE:]], time.monotonic()
    while sample and time.monotonic() < moved + QUIET_S:
        time.sleep(LOOK_S)
        left = [ip for ip in sample if ipcache.lookup(keys[ip]) is None]
        if len(left) < len(sample):
            sample, moved = left, time.monotonic()


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    left_out = gopeer.build(say)
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "bare": [], "go": []}
    with Lab(pods=2) as lab, contextlib.ExitStack() as stack:
        bed = Bed(lab, "plain", lab.etcd.url)
        store = stack.enter_context(Store(lab.node_a, bed.file))
        store.fill("cluster_b", 1)
        say(f"{IN_A_ROW:,} pods are published")
        store.fill("pods", 0, IN_A_ROW)
        for number in range(REPEATS):
            say(f"round {number + 1} of {REPEATS}: {ADDRESSES:,} addresses")
            found["ours"].append(of_agent(bed, ADDRESSES, MAP_SIZE))
            found["bare"].append(store.bare(0, ADDRESSES))
            if not left_out:
                with Peer(bed, lab.pods[1], batch=True, size=MAP_SIZE) as peer:
                    result = asdict(storm(peer, lab.pods[1], peer.ipcache, 0, ADDRESSES))
                    found["go"].append(result | {"counts": peer.counts()})
        say(f"{IN_A_ROW:,} addresses")
        row = of_agent(bed, IN_A_ROW, 20 * IN_A_ROW)
    return replace(summary(found, row), left_out=left_out)


def of_agent(bed: Bed, count: int, size: int) -> dict[str, Any]:
    """Storm an agent that starts empty."""
    lab = bed.lab
    options = {"interface": "lxc0", "uplink": None, "policy": None, "clustermesh_config": str(bed.config)}
    words = ("--on-miss", "drop", "--signal-rate", "0", "--ipcache-size", str(size))
    with running(lab, *words, **options) as agent:
        ipcache = Map.pinned(Pins.under(lab.bpffs).path(IPCACHE))
        with contextlib.closing(ipcache):
            result = storm(agent, lab.pods[0], ipcache, 0, count)
        counted = {name: packets(agent, name) for name in ("missed", *SIGNAL_OUTCOMES)} | {
            outcome: int(metric(agent, "lazymesh_resolutions_total", outcome=outcome, cached="false"))
            for outcome in ("installed", "absent", "failed", "shed")
        }
        evicted = int(metric(agent, "lazymesh_entries_evicted_total"))
        (cluster,) = [each for each in status(lab)["clusters"] if each["name"] == "b"]
    return asdict(result) | {
        "counts": counted | {"evicted": evicted},
        "watched_keys": cluster["watchedKeys"],
        "watches": cluster["watchedRanges"],
    }


def summary(found: dict[str, list[dict[str, Any]]], row: dict[str, Any]) -> Part:
    """Return medians, and the runs that they come from."""
    ours, bare, go = (found[name] for name in ("ours", "bare", "go"))
    figures: dict[str, Any] = _of(ours) | {
        "misses_without_cause": sum(_without_cause(one["counts"]) for one in ours),
        "rounds": [one["rounds"] for one in ours],
        "watches": ours[0]["watches"],
        "bare_per_second": round(statistics.median(one["found"] / one["seconds"] for one in bare)),
        "bare_cpu_us_each": round(statistics.median(one["cpu_s"] * 1e6 / one["found"] for one in bare), 2),
        "in_a_row": _of([row]) | {"misses_without_cause": _without_cause(row["counts"])},
        "runs": found | {"in_a_row": [row]},
    }
    if go:
        figures["go"] = _of(go)
    repeats = {
        "per_second": [one["addresses"] / one["seconds"] for one in ours],
        "cpu_us_each": [one["cpu_us_each"] for one in ours],
        "bare_per_second": [one["found"] / one["seconds"] for one in bare],
        "go.per_second": [one["addresses"] / one["seconds"] for one in go],
        "go.cpu_us_each": [one["cpu_us_each"] for one in go],
    }
    return Part(figures, rows(figures), repeats)


def _of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "addresses": runs[0]["addresses"],
        "seconds": _median(runs, "seconds"),
        "per_second": round(statistics.median(one["addresses"] / one["seconds"] for one in runs)),
        "cpu_us_each": _median(runs, "cpu_us_each"),
        "wrong": sum(one["wrong"] for one in runs),
        "lost": sum(one["lost"] for one in runs),
    }


def _without_cause(counts: dict[str, int]) -> int:
    """Return by how many packets the programs' counters of a miss and of what became of it differ."""
    return abs(counts["missed"] - sum(counts[outcome] for outcome in SIGNAL_OUTCOMES))


def _median(runs: list[dict[str, Any]], name: str) -> float:
    return round(statistics.median(one[name] for one in runs), 3)


def rows(figures: dict[str, Any]) -> list[Row]:
    """Say what is to be compared; a ratio's budget is the most that it may be, so these are others' by ours."""
    rate = f"{figures['per_second']:,}/s"
    bare = figures["bare_per_second"]
    found = [
        Row(
            "bare transactions' rate by ours",
            rate,
            f"bare {bare:,}/s",
            bare / figures["per_second"],
            1 / SHARE_OF_BARE,
        ),
        *_faults("", figures),
    ]
    if "go" in figures:
        go = figures["go"]
        found[:0] = [
            Row(
                "Go's rate by ours", rate, f"Go {go['per_second']:,}/s",
                go["per_second"] / figures["per_second"], 1 / OVER_GO,
            ),
            Row(
                "processor time for each", f"{figures['cpu_us_each']:.1f} us", f"Go {go['cpu_us_each']:.1f} us",
                figures["cpu_us_each"] / go["cpu_us_each"], SHARE_OF_CPU,
            ),
        ]  # fmt: skip
    row = figures["in_a_row"]
    words = f", {row['addresses']:,} in a row"
    found += [
        Row(
            f"bare transactions' rate by ours{words}",
            f"{row['per_second']:,}/s",
            f"bare {bare:,}/s",
            bare / row["per_second"],
        ),
        *_faults(words, row),
    ]
    return found


def _faults(where: str, figures: dict[str, Any]) -> list[Row]:
    """Say what must not be at all; what the agent shed meanwhile explains no address that has no entry at the end."""
    return [
        Row(f"{what}{where}", str(figures[name]), "none", figures[name], 0, unit)
        for what, name, unit in (
            ("wrong entries", "wrong", "entries"),
            ("addresses without an entry", "lost", "addresses"),
            ("misses without a cause", "misses_without_cause", "misses"),
        )
    ]
