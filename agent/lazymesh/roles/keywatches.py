"""Watches on the keys of single addresses, one for a whole neighbourhood: the pods of a node share it.

A store keeps every watch of every node in memory and looks through them at each write: their number is what a mesh pays
for staying right. The texts of a node's pods mostly begin alike, so one watch on a range of keys serves them all: it
costs as much as one on a key, and brings only what happens to that node's pods.

It may begin later than the read of another key of the range, and what happened to keys that nobody followed is not
kept. So each range knows since which revision it is complete for any address; when an address's read is older, the
range is watched anew from there. What comes twice by that is known by its revision (``Tracked.learn``).
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from lazymesh.core.keys import common_text, group_of
from lazymesh.core.model import format_address, parse_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lazymesh.core.model import Address
    from lazymesh.kvstore.model import Change, WatchListener, WatchLoss


class Watches(Protocol):
    """Where a store's watches are kept (kvstore.hub)."""

    def add(self, key: bytes, listener: WatchListener, start_revision: int, *, prefix: bool = False) -> int:
        """Watch from a revision on; return the watch's id."""

    def remove(self, watch_id: int) -> None:
        """End a watch."""


Neighbours = tuple[bytes, set["Address"]]
"""What the addresses of one group have in common, and such addresses."""


def neighbours_of(addresses: Iterable[Address]) -> list[Neighbours]:
    """Return the addresses by group; one that they come back to, twice."""
    return [(group, set(some)) for group, some in groupby(addresses, group_of)]


class KeyWatches:
    """The addresses whose keys below one prefix are followed.

    on_change is called for each change of such a key, on_lost for each range that is not watched any more: its
    addresses are not followed from then on.
    """

    def __init__(
        self,
        watches: Watches,
        prefix: bytes,
        on_change: Callable[[Address, Change], None],
        on_lost: Callable[[WatchLoss], None],
    ) -> None:
        self.prefix = prefix
        self.on_change = on_change
        self._watches = watches
        self._on_lost = on_lost
        self._ranges: dict[bytes, _Range] = {}

    def __len__(self) -> int:
        """Return how many addresses are followed."""
        return sum(len(one.addresses) for one in self._ranges.values())

    @property
    def ranges(self) -> int:
        """How many watches that takes."""
        return len(self._ranges)

    def follow(self, neighbours: Iterable[Neighbours], after: int) -> None:
        """Have all changes of these addresses told that come after the revision at which they were read."""
        for group, some in neighbours:
            one = self._ranges.get(group)
            if one is None:
                one = self._ranges[group] = _Range(self, group, self.prefix + common_text(next(iter(some))))
                self._begin(one, after + 1)
            elif one.since > after + 1 and not some <= one.addresses:
                self._watches.remove(one.watch_id)
                self._begin(one, after + 1)
            one.addresses |= some

    def unfollow(self, address: Address) -> None:
        """Have nothing more of the address told."""
        group = group_of(address)
        one = self._ranges.get(group)
        if one is None or address not in one.addresses:
            return
        one.addresses.remove(address)
        one.since = max(one.since, one.told + 1)
        if not one.addresses:
            del self._ranges[group]
            self._watches.remove(one.watch_id)

    def clear(self) -> None:
        """Follow nothing any more."""
        for one in self._ranges.values():
            self._watches.remove(one.watch_id)
        self._ranges.clear()

    def lost(self, one: _Range, loss: WatchLoss) -> None:
        """Forget a range that is not watched any more."""
        if self._ranges.get(one.group) is one:
            del self._ranges[one.group]
        self._on_lost(loss)

    def _begin(self, one: _Range, start_revision: int) -> None:
        one.since = start_revision
        one.watch_id = self._watches.add(one.prefix, one, start_revision, prefix=True)


class _Range:
    """The followed addresses of one group, and their watch."""

    def __init__(self, owner: KeyWatches, group: bytes, prefix: bytes) -> None:
        self.group = group
        self.prefix = prefix
        self.addresses: set[Address] = set()
        self.watch_id = 0
        self.since = 0
        """Of an address that is not followed yet, everything from this revision on is still to come."""
        self.told = 0
        """The last change that was told of a followed address: it is not still to come, should that be let go."""
        self._owner = owner

    def on_live(self, watch_id: int, revision: int) -> None:
        """Nothing hangs on it: the reads before it told the keys' state."""

    def on_changes(self, _watch_id: int, changes: Sequence[Change]) -> None:
        for change in changes:
            address = _address_in(change.key[len(self._owner.prefix) :])
            if address in self.addresses:
                self.told = change.mod_revision
                self._owner.on_change(address, change)
            elif change.mod_revision >= self.since:
                self.since = change.mod_revision + 1

    def on_lost(self, _watch_id: int, loss: WatchLoss) -> None:
        self._owner.lost(self, loss)


def _address_in(text: bytes) -> Address | None:
    try:
        address = parse_address(text.decode())
    except ValueError:  # no address, so none that is followed
        return None
    # Nobody reads a key in another form.
    return address if format_address(address).encode() == text else None
