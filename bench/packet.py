"""Nanoseconds that the program costs a packet, beside an empty program and one that does the lookup alone.

Its budgets are of a hit in both ways in which the agent has the programs work: what the ipcache said is remembered for
a tick; and beside a Cilium, where packets may be held (the default there), nothing is remembered. What a hit costs
above an empty program has a budget only in the first, as a lookup alone costs more than that.
"""

from __future__ import annotations

import contextlib
import ipaddress
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import Part, Row
from lazymesh.core.model import Direction, Entry
from lazymesh.datapath import abi
from lazymesh.datapath.libbpf import Map
from lazymesh.datapath.perfbuffer import PerfBuffer
from lazymesh.datapath.pins import IPCACHE, Pins
from lazymesh.datapath.program import open_own_ipcache
from lazymesh.datapath.settingsmap import DatapathConfig
from lazymesh.datapath.signals import RING_PAGES
from lazymesh.settings import IPCACHE_SIZE
from tests.datapath.conftest import mounted_bpffs
from tests.support.bpfobject import BpfObject, compile_bpf
from tests.support.loaded import load
from tests.support.packets import INTERNET, POD_B1, Flow, Host, pod_of_b
from tests.support.prog_run import run_packet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lazymesh.datapath.program import Datapath

SIZES = {"1k": 1_000, "100k": 100_000, "512k": 511_000}
ADDED_NS, ABOVE_LOOKUP_NS = 50, 15
"""Budgets: what a hit may cost above nothing, with a thousand entries, and above the lookup alone, with any."""
ROUNDS, ADDRESSES, REPEAT, RING_HOLDS, WAKES = 15, 8, 20_000, 1_000, 200
_ENTRY = abi.pack_entry(Entry(131_073, ipaddress.ip_address("172.18.0.2").packed, 0, 2))


class Stage:
    """The programs to be compared, over one map."""

    def __init__(self, datapath: Datapath, ipcache: Map, others: BpfObject) -> None:
        self._datapath = datapath
        self._ipcache = ipcache
        self._programs = {
            "bare": others.program("empty"),
            "lookup": others.program("lookup"),
            "ours": datapath.program(Direction.EGRESS)[1],
        }
        self._next = 0

    def fill(self, count: int) -> None:
        """Bring the map to so many entries: pods all over 10.0.0.0/8, the measured ones among them."""
        measured = [ipaddress.ip_address(pod_of_b(n).v4).packed for n in range(ADDRESSES)]
        spread = (
            (0x0A000000 + (number * 2_654_435_761 & 0xFFFFFF)).to_bytes(4, "big")
            for number in range(self._next, count)
        )
        keys = [abi.pack_address_key(address) for address in (*measured, *spread)]
        self._ipcache.update_many([(key, _ENTRY) for key in keys])
        self._next = count

    def turn(self, *names: str, peers: list[Host]) -> dict[str, list[float]]:
        """Run the programs in turns over packets to these peers; return nanoseconds of each turn."""
        took = defaultdict(list)
        frames = [Flow(peer).tcp() for peer in peers]
        for _ in range(ROUNDS):
            for name in names:
                runs = [run_packet(self._programs[name], frame, repeat=REPEAT).ns for frame in frames]
                took[name].append(statistics.fmean(runs))
        return took

    def hold(self, peers: list[Host]) -> list[float]:
        """Have packets hit while a holder is there; return nanoseconds of each turn."""
        self._datapath.config.change(hold_cookie=0xC4D)
        took = self.turn("ours", peers=peers)["ours"]
        self._datapath.config.change(hold_cookie=0)
        return took

    def beside_cilium(self, peers: list[Host]) -> list[float]:
        """The same beside a Cilium, where the agent has nothing remembered while packets may be held."""
        self._datapath.config.remember(on=False)
        took = self.hold(peers)
        self._datapath.config.remember(on=True)
        return took

    def unremembered(self, peers: list[Host]) -> list[float]:
        """Have every packet look its peer up, as the first of each tick does; return nanoseconds of each turn."""
        self._datapath.config.remember(on=False)
        took = self.turn("ours", peers=peers)["ours"]
        self._datapath.config.remember(on=True)
        return took

    def suppressed(self) -> list[float]:
        """Have packets of a peer miss whose miss is signalled already; return nanoseconds of each turn."""
        with self._reading():
            return self.turn("ours", peers=[POD_B1])["ours"]

    def signalled(self) -> list[float]:
        """Have every packet's miss signalled to a reader at work, with room for it; return nanoseconds of each turn."""
        took, frame = [], Flow(POD_B1).tcp()
        with self._signalling(), self._reading() as ring:
            for _ in range(10 * ROUNDS):
                took.append(float(run_packet(self._programs["ours"], frame, repeat=RING_HOLDS).ns))
                ring.consume()
        return took

    def waking(self) -> list[float]:
        """Have every packet's signal wake a reader that sleeps, as a lone one does; return nanoseconds of each turn."""
        took, frame, (_, bell, reader) = [], Flow(POD_B1).tcp(), self._datapath.signals
        with (
            self._signalling(),
            self._reading() as ring,
            contextlib.closing(PerfBuffer(bell, 1, lambda _: None, wakes=True)) as doorbell,
        ):
            for _ in range(ROUNDS):
                runs = []
                for _ in range(WAKES):
                    reader.update(bytes(4), bytes(abi.Reader(wake=1)))
                    runs.append(run_packet(self._programs["ours"], frame, repeat=1).ns)
                took.append(statistics.median(runs))
                ring.consume()
                doorbell.consume()
        return took

    @contextlib.contextmanager
    def _signalling(self) -> Iterator[None]:
        """Have every miss signalled."""
        self._datapath.config.write(DatapathConfig(rearm_s=0, interface_rate=0, global_rate=0))
        time.sleep(2)  # until the address may be signalled again
        yield
        self._datapath.config.write(DatapathConfig())

    def _reading(self) -> contextlib.closing[PerfBuffer]:
        return contextlib.closing(PerfBuffer(self._datapath.signals.events, RING_PAGES, lambda _: None))

    def insist(self) -> None:
        """Raise RuntimeError unless every packet was what it was sent as."""
        counts = asdict(self._datapath.counters.read(Direction.EGRESS))
        turn = ROUNDS * REPEAT
        expected = {
            "hit": turn * ADDRESSES * (3 * len(SIZES) + 1),
            "missed": turn + ROUNDS * (10 * RING_HOLDS + WAKES),
            "suppressed_dedup": turn - 1,
            "signalled": 1 + ROUNDS * (10 * RING_HOLDS + WAKES),
            "not_mesh": turn,
        }
        if {name: counts[name] for name in expected} != expected:
            raise RuntimeError(f"expected {expected}, but the program counted {counts}")


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """Load everything; unload it afterwards."""
    with mounted_bpffs() as bpffs, tempfile.TemporaryDirectory() as scratch:
        pins = Pins.under(bpffs)
        datapath = load(pins, IPCACHE_SIZE)
        own = open_own_ipcache(pins, 512_000)
        datapath.config.write(DatapathConfig())
        datapath.visible.show([own])
        datapath.mesh_cidrs.apply([(ipaddress.ip_network("10.2.0.0/16"), 2)], [])
        source = compile_bpf(Path(__file__).with_suffix(".c"), Path(scratch) / "packet.o")
        with (
            contextlib.closing(Map.pinned(pins.path(IPCACHE))) as raw,
            BpfObject(source, ["empty", "lookup"], {"bench_ipcache": raw.fd}) as others,
        ):
            yield Stage(datapath, raw, others)
        own.close()
        datapath.close()


def run(say: Callable[[str], None]) -> Part:
    """Measure."""
    took: dict[str, list[float]] = {}
    with stage() as bench:
        peers = [pod_of_b(number) for number in range(ADDRESSES)]
        for name, count in SIZES.items():
            say(f"hits with {count:,} entries")
            bench.fill(count)
            turns = bench.turn("bare", "lookup", "ours", peers=peers)
            took[f"bare_{name}_ns"] = turns["bare"]
            took[f"lookup_{name}_ns"] = turns["lookup"]
            took[f"hit_{name}_ns"] = turns["ours"]
            took[f"first_{name}_ns"] = bench.unremembered(peers)
            took[f"hit_beside_cilium_{name}_ns"] = bench.beside_cilium(peers)
        say("hits while packets may be held")
        took["hit_holding_ns"] = bench.hold(peers)
        say("misses")
        took["suppressed_ns"] = bench.suppressed()
        took["signalled_ns"] = bench.signalled()
        took["signalled_waking_ns"] = bench.waking()
        took["not_mesh_ns"] = bench.turn("ours", peers=[INTERNET])["ours"]
        bench.insist()
    figures = {name: _best(turns) for name, turns in took.items()}
    return Part(figures, rows(figures), took)


def rows(figures: dict[str, float]) -> list[Row]:
    """Say what is to be compared."""
    found = []
    for name, count in SIZES.items():
        bare, lookup = figures[f"bare_{name}_ns"], figures[f"lookup_{name}_ns"]
        for kind, words, above_empty, above_lookup in (
            ("hit", "hit", ADDED_NS, ABOVE_LOOKUP_NS),
            ("first", "first hit of a tick", None, None),
            ("hit_beside_cilium", "hit beside Cilium, holding", None, ABOVE_LOOKUP_NS),
        ):
            took = figures[f"{kind}_{name}_ns"]
            what, ours = f"{words}, {count:,} entries", f"{took:.0f} ns"
            if name == "1k":
                found.append(Row(what, ours, f"empty {bare:.0f} ns", took - bare, above_empty, "ns"))
            found.append(Row(what, ours, f"lookup alone {lookup:.0f} ns", took - lookup, above_lookup, "ns"))
    hit = figures["hit_512k_ns"]
    for name, words in {
        "hit_holding_ns": "hit, with a holder",
        "suppressed_ns": "miss, suppressed",
        "signalled_ns": "miss, signalled to a reader at work",
        "signalled_waking_ns": "miss, signalled, waking the reader",
        "not_mesh_ns": "not mesh traffic",
    }.items():
        found.append(Row(words, f"{figures[name]:.0f} ns", f"hit {hit:.0f} ns", figures[name] / hit))
    return found


def _best(values: list[float]) -> float:
    """Return the best turn's: whatever else the machine does only adds to it."""
    return round(min(values), 1)
