"""Beside Cilium: its ipcache is ours to read, and to lend entries to; its agent's own writes win, silently.

Cilium makes a new map at each start, and its programs move to it one by one. So this looks at pins and programs, puts
all maps that count in front of our programs (core/ipcaches.py), and fills the new one at once with what this node
needs: our own entries, and the peers that it talks to as the old map knew them, which the resolver then confirms with
their clusters. What is missing still when a program switches is a miss like any other: held, resolved, given back.
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
from lazymesh.datapath.maps import IpcacheMap
from lazymesh.errors import DatapathError
from lazymesh.roles.ipcaches import describe_map
from lazymesh.roles.lending import SLICE, Lender
from lazymesh.roles.room import EntryCount, MapRoom
from lazymesh.tasks import take_turns, together, wait

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
    from pathlib import Path

    from lazymesh.core.model import Address
    from lazymesh.core.resolver import Resolver
    from lazymesh.datapath.cilium import NodeView
    from lazymesh.datapath.installer import Installer
    from lazymesh.datapath.program import Datapath
    from lazymesh.metrics import Metrics
    from lazymesh.roles.driver import Driver
    from lazymesh.roles.mesh import Mesh

log = structlog.get_logger()

LOOK_EVERY_S = 0.05
"""Between looks at the pin: what Cilium re-creates is in our programs' view within 100 ms."""
READ_EVERY_S, READ_SETTLED_S = 0.25, 2.0
"""Between looks at the programs, while some of them may still read an old map, and otherwise."""
READ_SHARE = 0.1
"""Of the time at most: hundreds of interfaces with filters take half a second to look at."""
PIN_AWAY_S = 10.0
"""No start of an agent takes the pin away for longer than a moment (cilium-live 6)."""
SWEEP_EVERY_S = 30.0
"""Between looks for entries of ours that Cilium has taken over."""
ADDRESSES_EVERY_S = 10.0
FIRST_S = 0.1
"""A new map is filled for so long before programs look into it; the rest comes while they do."""


class GuestIpcaches:
    """Cilium's maps: followed, looked into, and written to with good manners."""

    mode = "cilium"
    shared = True

    def __init__(self, bpffs: Path, datapath: Datapath, node: NodeView) -> None:
        self._here: set[Address] = set()
        self._bpffs = bpffs
        self._datapath = datapath
        self._node = node
        self._arrangement = Arrangement()
        self._maps: list[IpcacheMap] = []
        self._shown = False
        """They are in force."""
        self._gone: list[IpcacheMap] = []
        """Maps that count no more, but are in force still, or have entries of ours."""
        self._read: frozenset[int] = frozenset()
        self._read_at, self._read_took = -math.inf, 0.0
        self._noticed_s: float | None = None
        """How long after it was pinned the last new map was seen."""
        self._settled = asyncio.Event()
        """Only one map is left: what is ours in it can be told from what is not."""
        self._problem: str | None = None
        """Why Cilium's map cannot be used: meanwhile the last good arrangement stays in force."""
        self._lender: Lender | None = None
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
    def lent(self) -> Mapping[str, int]:
        """What became of entries at re-creations."""
        return self._lender.lent if self._lender is not None else {}

    @property
    def maps(self) -> Sequence[IpcacheMap]:
        """The one that Cilium's agent writes, then those that its programs still read."""
        return tuple(self._maps)

    async def open(self, on_wait: Callable[[Path], None]) -> None:
        """Wait until Cilium has pinned its map, and put it in force; DatapathError for a layout that we do not know.

        on_wait is told, once, where the pin is waited for.
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
            raise DatapathError(f"no ipcache is pinned in {directory} any more: is Cilium leaving?")

    def connect(self, installer: Installer, driver: Driver, resolver: Resolver, mesh: Mesh) -> None:
        """Let entries be written."""
        self._lender = Lender(installer, driver, resolver, mesh)
        self._room = MapRoom(lambda: self._maps[0], installer, driver, resolver)

    async def run(self) -> None:
        """Follow Cilium until cancelled."""
        parts = [
            _repeat(self._look_on, LOOK_EVERY_S),
            _repeat(self._learn_addresses, ADDRESSES_EVERY_S),
            self._room.run(),
        ]
        if self._lender is not None:
            parts.append(self._sweep(self._lender))
        await together(*parts)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong, a line each."""
        if self._problem:
            yield self._problem
        away = time.monotonic() - self._arrangement.there_at
        if away > PIN_AWAY_S:
            yield (
                f"Cilium's ipcache has not been pinned in {pins_directory(self._bpffs)} for {away:.0f} s, its last map"
                " is served meanwhile: does its agent start? If Cilium has left this node, run `lazymesh uninstall`"
            )
        if self._node.tcx_in_use and not self._datapath.pins.linked():
            yield "Cilium is attached by tcx here, our programs by clsact are never asked: leave out --attach clsact"
        if self._arrangement.orphan is not None:
            yield (
                f"nothing reads the pinned ipcache (map {self._arrangement.orphan}), Cilium's programs are on map"
                f" {self._arrangement.maps[0]}, which is served instead: restart the Cilium agent"
            )
        if self._room.crowded:
            yield (
                f"the ipcache map is nearly full ({self._room.used} of {self._maps[0].max_entries} entries): what is"
                " left is for Cilium, new addresses are refused; publish fewer endpoints, or more of them pull-only"
            )

    def describe(self) -> dict[str, Any]:
        """Show the maps."""
        first = "pinned" if self._arrangement.orphan is None else "read"
        return {
            "maps": [describe_map(one, "old" if n else first) for n, one in enumerate(self._maps)],
            "recreated": self.recreated_total,
            "noticedMs": None if self._noticed_s is None else round(self._noticed_s * 1000),
            "entriesInMap": self._room.used,
            "lent": dict(self.lent),
        }

    def export(self, metrics: Metrics) -> None:
        """Register what is counted."""
        metrics.collect_gauge(
            "lazymesh_ipcache_maps", "Ipcaches of Cilium's that count: more than one while it restarts", (),
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
            lambda: [((fate,), count) for fate, count in self.lent.items()],
        )
        metrics.collect_gauge(
            "lazymesh_ipcache_entries",
            "Entries in the ipcache, whoever wrote them",
            (),
            lambda: [((), self._room.used)],
        )

    # --- which maps ---------------------------------------------------------------------------------------------------

    async def _look_on(self) -> None:
        try:
            await self._look()
        except DatapathError as exc:  # what we have is better than nothing
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
            self._read = await self._node.ipcaches()
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
            log.info("ipcaches", maps=[one.map_id for one in maps], layouts=[one.view.words for one in maps])
        if self._lender is not None:
            self._lender.installer.use(maps)
            if moved:
                self._room.begin()
        lending: Iterator[None] = iter(())
        if self._lender is not None and moved:
            lending = self._lender.lend_all(self._datapath.recent.newest_first(), maps[1:])
        # Cilium's programs go on reading the old map for seconds, so ours may for a moment.
        await take_turns(lending, FIRST_S)
        self._datapath.views.show(maps)
        self._shown = True
        await take_turns(lending)
        if self._lender is not None and self._gone:
            await take_turns(self._lender.withdraw_all(self._gone))
        for one in self._gone:
            one.close()
        self._gone = []
        if len(maps) == 1:
            self._settled.set()

    def _open(self, map_ids: tuple[int, ...]) -> list[IpcacheMap]:
        """Return the maps, those opened already as they are; DatapathError if one is not what it should be."""
        opened = {one.map_id: one for one in self._maps}
        maps: list[IpcacheMap] = []
        try:
            for map_id in map_ids:
                # A map may go with its last program while we look.
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

    async def _sweep(self, lender: Lender) -> None:
        """Look for entries of ours that are not ours any more, and let go of them."""
        while True:
            await wait(self._settled, SWEEP_EVERY_S)
            for count, address in enumerate(lender.installer.owned_addresses(), 1):
                # In a map that is being filled most of ours do not stand yet.
                if not self._arrangement.settled:
                    break
                lender.give_up_if_lost(address)
                if count % SLICE == 0:
                    await asyncio.sleep(0)

    async def _learn_addresses(self) -> None:
        try:
            found = await self._node.addresses()
        except DatapathError as exc:  # they hardly ever change
            log.warning("the node's addresses are not known anew", error=str(exc))
            return
        self._here.clear()
        self._here.update(found)


def _pinned_at(bpffs: Path) -> float:
    """Return when the youngest pin was made."""
    found = []
    for path in pins_directory(bpffs).glob("cilium_ipcache*"):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_ctime)
    return max(found, default=time.time())


async def _repeat(step: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        await step()
