"""What waits for a read: the neighbourhood (a /24, or the like of IPv6) first whose first address has waited longest.

A store finds the records of a whole /24 in one range in the time of some fifty single keys (measured, etcd 3.4). So
where more pods of one node wait, their /24 is read whole. Not so with IPv6: the keys of a /120 need not lie together,
and what lies between has no bound.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazymesh.core.model import Address
    from lazymesh.core.resolver.tracked import Tracked


class Batch:
    """What goes into one transaction."""

    __slots__ = ("apart", "whole")

    def __init__(self) -> None:
        self.whole: list[list[Tracked]] = []
        """Addresses of one /24 each, which is read whole."""
        self.apart: list[Tracked] = []

    def taken(self) -> list[Tracked]:
        """Return all addresses, those of whole /24s first."""
        return [*chain.from_iterable(self.whole), *self.apart] if self.whole else self.apart


class Waiting:
    """The addresses of one kind that wait in a lane."""

    __slots__ = ("_groups", "count")

    def __init__(self) -> None:
        # OrderedDict, not dict: taking from the front of a plain dict walks over all that was taken before. (Of a
        # neighbourhood's 256 that does not matter.)
        self._groups: OrderedDict[bytes, dict[Address, Tracked]] = OrderedDict()
        self.count = 0
        """How many there are; for others to read only. (An attribute, as it is asked for often.)"""

    def add(self, tracked: Tracked) -> None:
        """Have an address wait, which does not yet."""
        address = tracked.address
        group = address[:-1]
        members = self._groups.get(group)
        if members is None:
            members = self._groups[group] = {}
        members[address] = tracked
        self.count += 1

    def remove(self, address: Address) -> bool:
        """Have an address wait no more; tell whether it did."""
        group = address[:-1]
        members = self._groups.get(group)
        if members is None or address not in members:
            return False
        if next(iter(members)) == address:  # the others came later
            self._groups.move_to_end(group)
        del members[address]
        self.count -= 1
        if not members:
            del self._groups[group]
        return True

    def first(self) -> Tracked:
        """Return the first address of the first neighbourhood; there is one."""
        return next(iter(next(iter(self._groups.values())).values()))

    def move_to(self, other: Waiting) -> None:
        """Have all of them wait there instead."""
        for members in self._groups.values():
            for tracked in members.values():
                other.add(tracked)
        self._groups.clear()
        self.count = 0

    def take(self, batch: Batch, room: int, whole_at: int | None) -> None:
        """Move addresses into the batch, neighbourhood by neighbourhood, until ``room`` is used up.

        A /24 of which at least ``whole_at`` wait (None: never so many) comes whole, also if there is less room.
        """
        while room > 0 and self._groups:
            group, members = next(iter(self._groups.items()))
            if whole_at is not None and len(members) >= whole_at and len(group) == 3:
                batch.whole.append(list(members.values()))
            elif len(members) > room:
                batch.apart += [members.pop(address) for address in list(islice(members, room))]
                self.count -= room
                return
            else:
                batch.apart += members.values()
            room -= len(members)
            self.count -= len(members)
            del self._groups[group]
