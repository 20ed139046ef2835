"""How full Cilium's map is, and how many of our entries it therefore has room for.

When to count again, and what a count means, is decided in core/ipcaches.py (``Room``).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import TYPE_CHECKING

import structlog

from lazymesh.core import events
from lazymesh.core.ipcaches import ROOM_EVERY_S, Room
from lazymesh.datapath.ipcachemaps import IpcacheMap
from lazymesh.tasks import take_turns, wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lazymesh.core.resolver import Resolver
    from lazymesh.datapath.installer import Installer
    from lazymesh.roles.driver import Driver

log = structlog.get_logger()

COUNTS_APART_S = 1.0
"""From count to count of a map's entries at least: with 500,000 one takes a third of it."""
SHED_AT_ONCE = 200
"""Entries removed between two looks at what else there is to do."""


class EntryCount:
    """Counts the entries in the map that Cilium writes; in shadow mode, where none are ours, that is all.

    current: returns that map, which changes when Cilium starts.
    """

    def __init__(self, current: Callable[[], IpcacheMap]) -> None:
        self.used = 0
        """Entries in the map, ours and Cilium's, by the last count."""
        self._current = current

    @property
    def crowded(self) -> bool:
        """Whether no new entry of ours may be put in."""
        return False

    def begin(self) -> None:
        """Note that the map is a new one."""

    async def run(self) -> None:
        """Count until cancelled."""
        while True:
            ipcache = self._current()
            used = await self._count(ipcache)
            if used is not None and ipcache is self._current():  # else it says nothing about the present map
                self.used = used
            await asyncio.sleep(ROOM_EVERY_S)

    async def _count(self, ipcache: IpcacheMap) -> int | None:
        """Count a map's entries; None if the number cannot be trusted."""
        with contextlib.suppress(OSError):
            return await asyncio.to_thread(_count, ipcache.map_id)
        return None


class MapRoom(EntryCount):
    """Counts often enough that Cilium always finds room for its own entries, and limits ours accordingly."""

    def __init__(
        self, current: Callable[[], IpcacheMap], installer: Installer, driver: Driver, resolver: Resolver
    ) -> None:
        super().__init__(current)
        self._installer = installer
        self._driver = driver
        self._resolver = resolver
        self._room = Room()
        self._added = 0
        """The installer's ``added`` when the last count began."""
        self._due = asyncio.Event()
        """Set to count now: the kernel has found no room for our entry, or the map is new."""
        installer.on_full = self._due.set

    @property
    def crowded(self) -> bool:
        """Whether no new entry of ours may be put in: what is left is for Cilium."""
        return self._room.crowded

    def begin(self) -> None:
        """Note that the map is a new one: it is not crowded before it holds what the last one did."""
        self._room.begin()
        self._installer.crowded, self._installer.added_most = False, math.inf
        self._due.set()

    async def run(self) -> None:
        """Count, and keep to the counts, until cancelled."""
        while True:
            ipcache, began, added = self._current(), time.monotonic(), self._installer.added
            used = await self._count(ipcache)
            if used is not None and ipcache is self._current():
                self.used = used
                await take_turns(self.limit(used, ipcache.max_entries, added))
            await asyncio.sleep(COUNTS_APART_S)
            # What we add ourselves brings the next count forward.
            while used is not None and time.monotonic() < began + self.pause(ipcache.max_entries):
                if await wait(self._due, COUNTS_APART_S):
                    break

    def limit(self, used: int, size: int, added: int) -> Iterator[None]:
        """Stop new entries where room is scarce, and remove what is too much, in steps.

        used: a count of the map; added: the installer's ``added`` when the count began.
        """
        before, surplus = self._room.crowded, self._room.step(used, size)
        if self._room.crowded != before:
            log.log(20 if before else 30, "room in the ipcache", crowded=not before, entries=used, size=size)
        self._added = added
        self._installer.crowded = self._room.crowded
        self._installer.added_most = added + self._room.left(size)
        while surplus > 0 and self._resolver.owned and self._room.crowded:  # a new map is not
            self._driver.feed(events.Shrink(min(SHED_AT_ONCE, surplus)))
            surplus -= SHED_AT_ONCE
            yield

    def pause(self, size: int) -> float:
        """Return how long after the last count the next is due."""
        return self._room.pause(size, self._installer.added - self._added)

    async def _count(self, ipcache: IpcacheMap) -> int | None:
        """Count, and again before anything is removed because of it: a count may be far too high."""
        used = await super()._count(ipcache)
        if used is None or not self._room.looks_crowded(used, ipcache.max_entries):
            return used
        again = await super()._count(ipcache)
        return None if again is None else min(used, again)


def _count(map_id: int) -> int | None:
    """Count a map's entries, through a separate descriptor: the agent may close its own meanwhile."""
    with contextlib.closing(IpcacheMap.by_id(map_id)) as ipcache:
        return ipcache.count()
