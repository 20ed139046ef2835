"""Beside Cilium: its ipcache is ours to read, and to add entries to; its agent's own writes win, silently.

Cilium makes a new map at each start, and its programs move to it one by one. So this module looks at pins and programs,
has our programs look into all maps that count (core/ipcaches.py), and fills the new one at once with what this node
needs: our own entries, and its recent peers as the old map knew them, which the resolver then confirms with their
clusters. Whatever is still missing when a program switches is a miss like any other: held, resolved, given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import TYPE_CHECKING, Any

import structlog

from lazymesh.core.ipcaches import Arrangement
from lazymesh.datapath.cilium import TAG, pinned_ipcaches, pins_directory
from lazymesh.datapath.ipcachemaps import IpcacheMap
from lazymesh.errors import DatapathError
from lazymesh.roles.carryover import SLICE, CarryOver
from lazymesh.roles.ipcaches import describe_map
from lazymesh.roles.room import EntryCount, MapRoom
from lazymesh.tasks import in_thread, take_turns, together, wait

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
    from pathlib import Path

    from lazymesh.core.model import Address
    from lazymesh.core.resolver import Resolver
    from lazymesh.datapath.cilium import NodeView
    from lazymesh.datapath.installer import Installer
    from lazymesh.datapath.netlinkthread import NetlinkThread
    from lazymesh.datapath.program import Datapath
    from lazymesh.metrics import Metrics
    from lazymesh.roles.driver import Driver
    from lazymesh.roles.mesh import Mesh

log = structlog.get_logger()

LOOK_EVERY_S = 0.05
"""Between looks at the pin: what Cilium re-creates is in our programs' view within 100 ms."""
READ_EVERY_S, READ_SETTLED_S = 0.25, 2.0
"""Between looks at the programs: while some may still read an old map, and otherwise."""
READ_SHARE = 0.1
"""At most this share of the time goes into that: hundreds of interfaces with filters take half a second."""
PIN_AWAY_S = 10.0
"""An agent that starts removes the pin for a moment only (cilium-live 6)."""
SWEEP_EVERY_S = 30.0
"""Between looks for our entries that Cilium has taken over."""
ADDRESSES_EVERY_S = 10.0
FIRST_S = 0.1
"""A new map is filled for this long before our programs look into it; the rest follows while they do."""


class CiliumIpcaches:
    """Cilium's maps: followed, read, and written to without ever touching an entry of Cilium's."""

    mode = "cilium"
    shared = True

    def __init__(self, bpffs: Path, datapath: Datapath, node: NodeView, netlink: NetlinkThread) -> None:
        self._here: set[Address] = set()
        self._bpffs = bpffs
        self._datapath = datapath
        self._node = node
        self._netlink = netlink
        self._arrangement = Arrangement()
        self._maps: list[IpcacheMap] = []
        self._shown = False
        """Whether they are in force."""
        self._gone: list[IpcacheMap] = []
        """Maps that no longer count, but are still in force or hold our entries."""
        self._read: frozenset[int] = frozenset()
        self._read_at, self._read_took = -math.inf, 0.0
        self._noticed_s: float | None = None
        """How long after it was pinned the last new map was seen."""
        self._settled = asyncio.Event()
        """Set when only one map is left, so that our lost entries can be recognized."""
        self._problem: str | None = None
        """Why Cilium's map cannot be used; meanwhile the last good arrangement stays in force."""
        self._carry_over: CarryOver | None = None
        self._room = EntryCount(lambda: self._maps[0])

    @property
    def here(self) -> Container[Address]:
        """The node's own addresses: no tunnel leads to them."""
        return self._here

    @property
    def recreated_total(self) -> int:
        """How many new maps Cilium has pinned."""
        return self._arrangement.recreated

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Entries meant for new maps, by what became of them."""
        return self._carry_over.outcomes if self._carry_over is not None else {}

    @property
    def maps(self) -> Sequence[IpcacheMap]:
        """The map that Cilium's agent writes, then those that its programs still read."""
        return tuple(self._maps)

    async def open(self, on_wait: Callable[[Path], None]) -> None:
        """Wait until Cilium has pinned its map, and put it in force; DatapathError for an unknown layout.

        on_wait: called once, with the directory where the pin is awaited.
        """
        await self._learn_addresses()
        directory, waiting = pins_directory(self._bpffs), False
        while not pinned_ipcaches(self._bpffs):
            if not waiting:
                log.warning("waiting for Cilium to pin its ipcache", directory=str(directory))
                on_wait(directory)
            waiting = True
            await asyncio.sleep(1)
        await self._look()
        if not self._maps:
            raise DatapathError(f"no ipcache is pinned in {directory} any more: is Cilium being removed?")

    def connect(self, installer: Installer, driver: Driver, resolver: Resolver, mesh: Mesh) -> None:
        """Start writing entries."""
        self._carry_over = CarryOver(installer, driver, resolver, mesh)
        self._room = MapRoom(lambda: self._maps[0], installer, driver, resolver)

    async def run(self) -> None:
        """Follow Cilium until cancelled."""
        parts = [
            _repeat(self._look_on, LOOK_EVERY_S),
            _repeat(self._learn_addresses, ADDRESSES_EVERY_S),
            self._room.run(),
        ]
        if self._carry_over is not None:
            parts.append(self._sweep(self._carry_over))
        await together(*parts)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong, a line each."""
        if self._problem:
            yield self._problem
        away = time.monotonic() - self._arrangement.there_at
        if away > PIN_AWAY_S:
            yield (
                f"Cilium's ipcache has not been pinned in {pins_directory(self._bpffs)} for {away:.0f} s, its last map"
                " is served meanwhile: does its agent start? If Cilium was removed, run `lazymesh uninstall`"
            )
        if self._node.tcx_in_use and not self._datapath.pins.linked():
            yield "Cilium is attached by tcx here, so our programs on clsact never run: leave out --attach clsact"
        if self._arrangement.orphan is not None:
            yield (
                f"nothing reads the pinned ipcache (map {self._arrangement.orphan}), Cilium's programs read map"
                f" {self._arrangement.maps[0]}, which is served instead: restart the Cilium agent"
            )
        if self._room.crowded:
            yield (
                f"the ipcache map is nearly full ({self._room.used} of {self._maps[0].max_entries} entries): what is"
                " left is for Cilium, new addresses are refused; publish fewer endpoints, or more of them pull-only"
            )

    def describe(self) -> dict[str, Any]:
        """Return the maps, and what became of entries meant for new ones."""
        first = "pinned" if self._arrangement.orphan is None else "read"
        return {
            "maps": [describe_map(one, "old" if n else first) for n, one in enumerate(self._maps)],
            "recreated": self.recreated_total,
            "noticedMs": None if self._noticed_s is None else round(self._noticed_s * 1000),
            "entriesInMap": self._room.used,
            "lent": dict(self.outcomes),
        }

    def export(self, metrics: Metrics) -> None:
        """Register the metrics."""
        metrics.collect_gauge(
            "lazymesh_ipcache_maps", "Ipcaches of Cilium that count: more than one while it restarts", (),
            lambda: [((), len(self._maps))],
        )  # fmt: skip
        metrics.collect_counter(
            "lazymesh_ipcache_recreated", "New ipcaches that Cilium has pinned", (),
            lambda: [((), self.recreated_total)],
        )  # fmt: skip
        metrics.collect_counter(
            "lazymesh_ipcache_lent_entries",
            "Entries put into new ipcaches: carried (ours), warmed (peers that the old one knew); taken: Cilium was"
            " first, refused: there was no room",
            ("outcome",),
            lambda: [((outcome,), count) for outcome, count in self.outcomes.items()],
        )
        metrics.collect_gauge(
            "lazymesh_ipcache_entries",
            "Entries in the ipcache, lazymesh's and Cilium's",
            (),
            lambda: [((), self._room.used)],
        )

    # --- which maps ---------------------------------------------------------------------------------------------------

    async def _look_on(self) -> None:
        try:
            await self._look()
        except DatapathError as exc:  # the present arrangement is better than none
            self._complain(str(exc))
        else:
            self._problem = None

    async def _look(self) -> None:
        """Look at pins and, less often, at programs; put the maps that count in force."""
        now = time.monotonic()
        pins = self._pins()
        pause = READ_SETTLED_S if self._arrangement.settled else READ_EVERY_S
        due = self._read_at + max(pause, self._read_took / READ_SHARE)
        if self._arrangement.has_news(pins) or now >= due:
            self._read = await self._netlink.run(self._node.ipcaches())
            self._read_at = time.monotonic()
            self._read_took = self._read_at - now
            pins = self._pins()
        before = self.recreated_total
        maps = self._arrangement.step(pins, self._read, now)
        if self.recreated_total != before:
            self._noticed_s = time.time() - _pinned_at(self._bpffs)
        if maps != tuple(one.map_id for one in self._maps) or not self._shown:
            await self._rearrange(self._open(maps))

    def _pins(self) -> frozenset[int]:
        return frozenset(pinned_ipcaches(self._bpffs).values())

    async def _rearrange(self, maps: list[IpcacheMap]) -> None:
        if not maps:
            return
        before, self._maps, self._shown = self._maps, maps, False
        self._gone = [one for one in (*self._gone, *before) if one not in maps]
        moved = bool(before) and before[0] is not maps[0]
        if before != maps:
            log.info(
                "ipcaches", maps=[one.map_id for one in maps], layouts=[one.layout.words for one in maps]
            )
        if self._carry_over is not None:
            self._carry_over.installer.use(maps)
            if moved:
                self._room.begin()
        filling: Iterator[None] = iter(())
        if self._carry_over is not None and moved:
            filling = self._carry_over.fill(self._datapath.recent.newest_first(), maps[1:])
        # Cilium's programs read the old map for seconds more, so ours may for a moment.
        await take_turns(filling, FIRST_S)
        await in_thread(lambda: self._datapath.visible.show(maps))
        self._shown = True
        await take_turns(filling)
        if self._carry_over is not None and self._gone:
            await take_turns(self._carry_over.withdraw_all(self._gone))
        for one in self._gone:
            one.close()
        self._gone = []
        if len(maps) == 1:
            self._settled.set()

    def _open(self, map_ids: tuple[int, ...]) -> list[IpcacheMap]:
        """Return the maps, reusing those already open; DatapathError if one is not what it should be."""
        opened = {one.map_id: one for one in self._maps}
        maps: list[IpcacheMap] = []
        try:
            for map_id in map_ids:
                # A map may vanish with its last program while we look.
                with contextlib.suppress(FileNotFoundError):
                    maps.append(opened.get(map_id) or IpcacheMap.by_id(map_id, TAG))
        except DatapathError:
            for one in maps:
                if one.map_id not in opened:
                    one.close()
            raise
        return maps

    def _complain(self, problem: str) -> None:
        if problem != self._problem:
            log.error("cannot follow Cilium's ipcaches", problem=problem)
        self._problem = problem

    # --- what is in them ----------------------------------------------------------------------------------------------

    async def _sweep(self, carry_over: CarryOver) -> None:
        """Look for entries that are no longer ours, and give them up."""
        while True:
            await wait(self._settled, SWEEP_EVERY_S)
            for count, address in enumerate(carry_over.installer.owned_addresses(), 1):
                # A map that is being filled lacks most of our entries.
                if not self._arrangement.settled:
                    break
                carry_over.give_up_if_lost(address)
                if count % SLICE == 0:
                    await asyncio.sleep(0)

    async def _learn_addresses(self) -> None:
        try:
            found = await self._netlink.run(self._node.addresses())
        except DatapathError as exc:  # they hardly ever change
            log.warning("cannot refresh the node's addresses", error=str(exc))
            return
        self._here.clear()
        self._here.update(found)


def _pinned_at(bpffs: Path) -> float:
    """Return when the newest pin was made."""
    found = []
    for path in pins_directory(bpffs).glob("cilium_ipcache*"):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_ctime)
    return max(found, default=time.time())


async def _repeat(step: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        await step()
