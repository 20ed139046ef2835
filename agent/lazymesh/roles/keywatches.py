"""Watches on the keys of single addresses, one per neighbourhood: the pods of a node share it.

A store keeps every watch of every node in memory and checks them all at each write: their number is what a mesh pays
for staying correct. The keys of a node's pods mostly begin alike, so one watch on a range of keys serves them all: it
costs as much as a watch on one key, and brings only changes of that node's pods.

A watch may begin later than the read of another key in its range, and changes of keys that are not followed are not
kept. So each range knows from which revision on it is complete for any address; when an address was read before that,
the range is watched again from there. Changes that come twice are recognized by their revision (``Tracked.learn``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lazymesh.core.keys import common_text, group_of
from lazymesh.core.model import format_address, parse_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lazymesh.core.model import Address
    from lazymesh.kvstore.model import Change, WatchListener, WatchLoss


class Watches(Protocol):
    """Keeps a store's watches (kvstore.hub)."""

    def add(self, key: bytes, listener: WatchListener, start_revision: int, *, prefix: bool = False) -> int:
        """Watch from a revision on; return the watch's id."""

    def remove(self, watch_id: int) -> None:
        """End a watch."""


class KeyWatches:
    """The addresses whose keys below one prefix are followed.

    on_change: called for each change of such a key.
    on_lost: called for each range whose watch is lost; its addresses are no longer followed.
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

    def follow(self, neighbours: Iterable[tuple[bytes, list[Address]]], after: int) -> None:
        """Report all changes of addresses, given by groups, after the revision at which they were read."""
        for group, some in neighbours:
            one = self._ranges.get(group)
            if one is None:
                one = self._ranges[group] = _Range(self, group, self.prefix + common_text(some[0]))
                self._begin(one, after + 1)
            elif one.since > after + 1 and not one.addresses.issuperset(some):
                self._watches.remove(one.watch_id)
                self._begin(one, after + 1)
            one.addresses.update(some)

    def unfollow(self, address: Address) -> None:
        """Report nothing more about the address."""
        group = group_of(address)
        one = self._ranges.get(group)
        if one is None or address not in one.addresses:
            return
        one.addresses.remove(address)
        one.since = max(one.since, one.reported + 1)
        if not one.addresses:
            del self._ranges[group]
            self._watches.remove(one.watch_id)

    def clear(self) -> None:
        """Stop following everything."""
        for one in self._ranges.values():
            self._watches.remove(one.watch_id)
        self._ranges.clear()

    def lost(self, one: _Range, loss: WatchLoss) -> None:
        """Forget a range whose watch is lost."""
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
        """For an address not followed yet, every change from this revision on is still to come."""
        self.reported = 0
        """Revision of the last change reported for a followed address: once unfollowed, it does not come again."""
        self._owner = owner

    def on_live(self, watch_id: int, revision: int) -> None:
        """Do nothing: the reads before it have reported the keys' state."""

    def on_changes(self, _watch_id: int, changes: Sequence[Change]) -> None:
        for change in changes:
            address = _address_in(change.key[len(self._owner.prefix) :])
            if address in self.addresses:
                self.reported = change.mod_revision
                self._owner.on_change(address, change)
            elif change.mod_revision >= self.since:
                self.since = change.mod_revision + 1

    def on_lost(self, _watch_id: int, loss: WatchLoss) -> None:
        self._owner.lost(self, loss)


def _address_in(text: bytes) -> Address | None:
    try:
        address = parse_address(text.decode())
    except ValueError:  # not an address, so not a followed one
        return None
    # A key in another form is never read.
    return address if format_address(address).encode() == text else None
