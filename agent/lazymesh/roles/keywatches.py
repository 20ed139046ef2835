"""Watches on the keys of single addresses, one for a whole neighbourhood: the pods of a node share it.

A store keeps every watch of every node in memory and looks through them at each write: their number is what a mesh pays
for staying right. Keys that differ only behind their last dot or colon are mostly those of one node's pods. A watch on
all of them costs as much as one on one of them, and brings only what happens to that node's pods.

It may begin later than the read of another key of the neighbourhood, and what happened to keys that nobody followed is
not kept. So each range knows since which revision it is complete for any key; when a key's read is older, the range is
watched anew from there. What comes twice by that is known by its revision (``Tracked.learn``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lazymesh.kvstore.model import Change, WatchListener, WatchLoss


class Watches(Protocol):
    """Where a store's watches are kept (kvstore.hub)."""

    def add(self, key: bytes, listener: WatchListener, start_revision: int, *, prefix: bool = False) -> int:
        """Watch from a revision on; return the watch's id."""

    def remove(self, watch_id: int) -> None:
        """End a watch."""


class KeyWatches:
    """The keys that are followed in one store.

    on_change is called for each change of a followed key, on_lost for each range that is not watched any more: its keys
    are not followed from then on.
    """

    def __init__(
        self, watches: Watches, on_change: Callable[[Change], None], on_lost: Callable[[WatchLoss], None]
    ) -> None:
        self._watches = watches
        self._on_change = on_change
        self._on_lost = on_lost
        self._ranges: dict[bytes, _Range] = {}

    def __len__(self) -> int:
        """Return how many keys are followed."""
        return sum(len(one.keys) for one in self._ranges.values())

    @property
    def ranges(self) -> int:
        """How many watches that takes."""
        return len(self._ranges)

    def follow(self, keys: Iterable[bytes], after: int) -> None:
        """Have all changes of these keys told that come after the revision at which they were read."""
        ranges = self._ranges
        for key in keys:
            prefix = neighbourhood(key)
            one = ranges.get(prefix)
            if one is None:
                one = ranges[prefix] = _Range(self, prefix)
                one.begin(after + 1)
            elif one.since > after + 1 and key not in one.keys:
                self._watches.remove(one.watch_id)
                one.begin(after + 1)
            one.keys.add(key)

    def unfollow(self, key: bytes) -> None:
        """Have nothing more of the key told."""
        prefix = neighbourhood(key)
        one = self._ranges.get(prefix)
        if one is None:
            return
        one.keys.discard(key)
        if not one.keys:
            del self._ranges[prefix]
            self._watches.remove(one.watch_id)

    def clear(self) -> None:
        """Follow nothing any more."""
        for one in self._ranges.values():
            self._watches.remove(one.watch_id)
        self._ranges.clear()

    def watch(self, one: _Range, start_revision: int) -> int:
        """Watch a range."""
        return self._watches.add(one.prefix, one, start_revision, prefix=True)

    def changed(self, change: Change) -> None:
        """Tell of a change of a followed key."""
        self._on_change(change)

    def lost(self, one: _Range, loss: WatchLoss) -> None:
        """Forget a range that is not watched any more."""
        if self._ranges.get(one.prefix) is one:
            del self._ranges[one.prefix]
        self._on_lost(loss)


class _Range:
    """The followed keys with one prefix, and their watch."""

    def __init__(self, owner: KeyWatches, prefix: bytes) -> None:
        self.prefix = prefix
        self.keys: set[bytes] = set()
        self.watch_id = 0
        self.since = 0
        """Of a key that is not followed yet, everything from this revision on is still to come."""
        self._owner = owner

    def begin(self, start_revision: int) -> None:
        """Watch from there."""
        self.since = start_revision
        self.watch_id = self._owner.watch(self, start_revision)

    def on_live(self, watch_id: int, revision: int) -> None:
        """Nothing hangs on it: the reads before it told the keys' state."""

    def on_changes(self, _watch_id: int, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.key in self.keys:
                self._owner.changed(change)
            elif change.mod_revision >= self.since:
                self.since = change.mod_revision + 1

    def on_lost(self, _watch_id: int, loss: WatchLoss) -> None:
        self._owner.lost(self, loss)


def neighbourhood(key: bytes) -> bytes:
    """Return what the keys around an address's key begin with: of 256 IPv4 addresses, of as many or more IPv6 ones."""
    dot = key.rfind(b".", key.rfind(b"/"))
    if dot >= 0:
        return key[: dot + 1]
    # The last two digits are a pod's on its node, where nodes have a /120 each (Cilium's default).
    colon = key.rfind(b":") + 1
    return key[: max(colon, len(key) - 2)]
