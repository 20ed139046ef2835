"""Which of Cilium's ipcaches count at a moment: the one that is pinned, and those that its programs still read.

At each start Cilium's agent makes a new, empty map and pins it; its programs go on reading the old one, each
interface's until it is regenerated, 5 to 75 s later (cilium-live 6). A packet needs its entry in the map that its
interface's program reads, and Cilium does not say when that changes: so meanwhile all of them count, for lookups and
for writes.

Pure: map ids and counts in, decisions out. Looking at pins, programs and maps is left to datapath/cilium.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Set

MOST = 3
"""LM_VIEWS: the newest are kept. For more than two old maps it takes three restarts within a minute."""
ORPHAN_AFTER_S = 300.0
"""Programs that have not taken up the pinned map for this long never will (cilium issue 45196). A regeneration may
wait for a minute, and then take another for hundreds of endpoints."""
LETTING_GO_S = 1.0
"""How long a map that no program reads any more still counts: a packet may be on its way through the last program."""

CROWDED, ROOMY = 0.95, 0.93
"""Shares of the map: above the first, none of our entries is added; below the second, they are again."""
FULL = 0.98
"""Never more than this, whatever fitted before: it leaves two seconds of Cilium at its fastest."""
CILIUM_PER_S = 5_000
"""More entries than any agent adds in a second: 3,900 were seen (cilium-live 6)."""
ROOM_EVERY_S, ROOM_TIGHT_S = 60.0, 4.0
"""Between two counts of the map's entries: at most, and when it fills up. In four seconds, and one more for a count,
Cilium cannot fill what is left above CROWDED of a map of its default size."""

FILLING_MOST = 10
"""Counts: a map that no longer grows after this many is complete, even with less than half of what the last one held.
Before that Cilium may be waiting for something. With so few entries, counts are a minute apart."""


def running_ipcache(pins: Collection[int], read: Collection[int]) -> int | None:
    """Return the running agent's map of all pinned ones: one that is read, else the youngest (ids count up), if any."""
    return max(pins, key=lambda map_id: (map_id in read, map_id), default=None)


@dataclass(slots=True)
class Arrangement:
    """Follows the maps; ``maps`` is the arrangement in force: first the one that will stay, then old ones."""

    maps: tuple[int, ...] = ()
    orphan: int | None = None
    """A pinned map that nothing reads; it is left alone."""
    recreated: int = 0
    """How many maps were pinned while we looked on."""
    there_at: float = 0.0
    """When the running agent's map was last seen pinned."""
    _pins: Set[int] = frozenset()
    """All that was pinned at the last step."""
    _pinned: int | None = None
    """The running agent's map."""
    _pinned_at: float = 0.0
    _read_at: dict[int, float] = field(default_factory=dict)
    """When each old map was last seen being read."""

    @property
    def settled(self) -> bool:
        """Whether only one map counts."""
        return len(self.maps) == 1

    def step(self, pins: Set[int], read: Set[int], now: float) -> tuple[int, ...]:
        """Take a look at the node; return the maps that count from now on.

        pins: the maps behind all pins; a missing one means nothing. read: the maps that programs on our interfaces
        look into.
        """
        pinned = self._running(pins, read)
        if pinned is not None and pinned != self._pinned:
            self.recreated += self._pinned is not None
            self._pinned, self._pinned_at = pinned, now
        if self._pinned is None:
            return self.maps
        if self._pinned in pins:
            self.there_at = now
        self.orphan = self._pinned if self._is_orphan(read, now) else None
        for map_id in read:
            self._read_at[map_id] = now
        first = max(read) if self.orphan is not None else self._pinned
        # A map that counted when the pin moved is being read, whatever we have seen of it so far.
        for map_id in self.maps:
            self._read_at.setdefault(map_id, now)
        old = [m for m in {*self.maps, *read} if m not in (first, self.orphan) and self._counts(m, now)]
        self.maps = (first, *sorted(old, reverse=True)[: MOST - 1])
        self._read_at = {m: at for m, at in self._read_at.items() if m in self.maps}
        return self.maps

    def has_news(self, pins: Set[int]) -> bool:
        """Return whether something is pinned that was not at the last step."""
        return not pins <= self._pins

    def _running(self, pins: Set[int], read: Set[int]) -> int | None:
        """Return the map that the running agent has pinned, if it is a new one or the first.

        An agent of another version than the one before it uses another name, and the old pin stays. So a map that is
        pinned while we look on is the running agent's; of maps that were there before us, one that programs read.
        """
        before, self._pins = self._pins, pins
        if self._pinned is None:
            return running_ipcache(pins, read)
        newer = [m for m in pins if m > self._pinned and (m not in before or m in read)]
        return max(newer, default=None)

    def _counts(self, map_id: int, now: float) -> bool:
        return now - self._read_at[map_id] < LETTING_GO_S

    def _is_orphan(self, read: Set[int], now: float) -> bool:
        return bool(read) and self._pinned not in read and now - self._pinned_at > ORPHAN_AFTER_S


@dataclass(slots=True)
class Room:
    """Whether there is room for our entries in the map that Cilium writes, from counts of all that it holds.

    A new map fills up to where the last one was, and our entries in it are meanwhile mostly those that Cilium is about
    to write: a map counts as crowded only beyond that, or once it no longer grows.
    """

    crowded: bool = False
    _counted: int = 0
    _fits: int = 0
    """How many entries the last map held, while the new one fills up; else 0."""
    _looks: int = 0
    """Counts of this map so far."""

    def begin(self) -> None:
        """Note that the map is a new one."""
        self._fits, self._counted, self.crowded = max(self._fits, self._counted), 0, False
        self._looks = 0

    def looks_crowded(self, used: int, size: int) -> bool:
        """Return whether a count would find the map crowded."""
        # Making room ends exactly at ROOMY, so there the map must not count as crowded any more.
        bar = int(ROOMY * size) + 1 if self.crowded else int(CROWDED * size)
        return used >= bar and used > min(self._fits, FULL * size)

    def step(self, used: int, size: int) -> int:
        """Take a count; return how many of our entries must go."""
        self._looks += 1
        if used <= self._counted and (used > self._fits / 2 or self._looks > FILLING_MOST):
            self._fits = 0
        self._counted = used
        self.crowded = self.looks_crowded(used, size)
        return max(0, used - int(ROOMY * size)) if self.crowded else 0

    def left(self, size: int) -> int:
        """Return how many more entries the map could take, by the last count, before it was crowded."""
        return int(max(CROWDED * size, min(self._fits, FULL * size))) - self._counted

    def pause(self, size: int, added: int) -> float:
        """Return how long after a count to count again, so that Cilium cannot have filled the map by then.

        added: how many of our entries have been added since.
        """
        ahead = (self.left(size) - added) / CILIUM_PER_S
        return min(max(ahead, 0.0 if self._fits else ROOM_TIGHT_S), ROOM_EVERY_S)
