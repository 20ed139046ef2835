"""Which of Cilium's ipcaches count at a moment: the one that is pinned, and those that its programs still read.

At each start its agent makes a new, empty map and pins it; its programs go on reading the old one, each interface's
until it is regenerated, 5 to 75 s later (cilium-live 6). A packet needs its entry in the map that its interface's
program reads, and nobody tells when that changes: so meanwhile all of them count, for lookups and for writes.

Pure: map ids in, map ids out. Looking at pins and programs is left to datapath/cilium.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MOST = 3
"""LM_VIEWS: the newest are kept. More than two old maps take three restarts within a minute."""
ORPHAN_AFTER_S = 300.0
"""Programs that have not taken up the pinned map for so long never will (cilium issue 45196). A regeneration may wait
for a minute, and then take another for hundreds of endpoints."""
LETTING_GO_S = 1.0
"""A map that no program reads any more still counts for so long: a packet may be on its way through the last one."""


@dataclass(slots=True)
class Arrangement:
    """Follows the maps; ``maps`` is the arrangement in force: the one to be written for good first, then old ones."""

    maps: tuple[int, ...] = ()
    orphan: int | None = None
    """A pinned map that nothing reads; it is left alone."""
    _pinned: int | None = None
    _pinned_at: float = 0.0
    _read_at: dict[int, float] = field(default_factory=dict)
    """When each old map was last seen being read."""

    @property
    def settled(self) -> bool:
        """Whether only one map counts."""
        return len(self.maps) == 1

    def step(self, pinned: int | None, read: frozenset[int], now: float) -> tuple[int, ...]:
        """Take a look at the node; return the maps that count from now on.

        pinned: None while there is no pin, which says nothing. read: what programs on our interfaces look into.
        """
        if pinned is not None and pinned != self._pinned:
            self._pinned, self._pinned_at = pinned, now
        if self._pinned is None:
            return self.maps
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

    def _counts(self, map_id: int, now: float) -> bool:
        return now - self._read_at[map_id] < LETTING_GO_S

    def _is_orphan(self, read: frozenset[int], now: float) -> bool:
        return bool(read) and self._pinned not in read and now - self._pinned_at > ORPHAN_AFTER_S
