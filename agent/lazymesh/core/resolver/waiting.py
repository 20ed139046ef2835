"""What waits for a read: the neighbourhood (a /24, or the like of IPv6) first whose first address has waited longest.

A lane holds the addresses that wait for one read group. Misses go first, because packets wait for them; re-reads of
known addresses (*checks*) take what room is left, but at least a quarter, so that a storm of misses cannot keep old
entries unverified. Re-reads of *adopted* entries, left by an earlier life of the agent, go before both: their records
may have changed while no agent ran. What is sent when is decided in ``backlog``.

A store finds the records of a whole /24 in one range in the time of some fifty single keys (measured, etcd 3.4). So
where more pods of one node wait, their /24 is read whole. IPv6 is different: the keys of a /120 need not lie together,
and what lies between them has no bound.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection

    from lazymesh.core.model import Address


class Addressed(Protocol):
    """An object that can wait, such as a tracked address."""

    address: Address


_T = TypeVar("_T", bound=Addressed)


class Batch(Generic[_T]):
    """What goes into one transaction."""

    __slots__ = ("apart", "whole")

    def __init__(self) -> None:
        self.whole: list[list[_T]] = []
        """Addresses of one /24 each, which is read whole."""
        self.apart: list[_T] = []

    def taken(self) -> list[_T]:
        """Return all addresses, those of whole /24s first."""
        return [*chain.from_iterable(self.whole), *self.apart] if self.whole else self.apart


class Waiting(Generic[_T]):
    """The addresses of one kind that wait in a lane."""

    __slots__ = ("_groups", "count")

    def __init__(self) -> None:
        # OrderedDict, not dict: taking from the front of a plain dict walks over all that was taken before. (For a
        # neighbourhood's 256 that does not matter.)
        self._groups: OrderedDict[bytes, dict[Address, _T]] = OrderedDict()
        self.count = 0
        """How many there are; read-only for others. (An attribute, as it is read often.)"""

    def add(self, some: Collection[_T]) -> None:
        """Add addresses that do not wait yet."""
        groups = self._groups
        for one in some:
            address = one.address
            group = address[:-1]
            members = groups.get(group)
            if members is None:
                members = groups[group] = {}
            members[address] = one
        self.count += len(some)

    def remove(self, address: Address) -> bool:
        """Remove an address; return whether it was waiting."""
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

    def first(self) -> _T:
        """Return the first address of the first neighbourhood; there is one."""
        return next(iter(next(iter(self._groups.values())).values()))

    def move_to(self, other: Waiting[_T]) -> None:
        """Move all addresses to another Waiting."""
        for members in self._groups.values():
            other.add(members.values())
        self._groups.clear()
        self.count = 0

    def take(self, batch: Batch[_T], room: int, whole_at: int | None) -> None:
        """Move addresses into the batch, neighbourhood by neighbourhood, until ``room`` is used up.

        A /24 of which at least ``whole_at`` wait (None: no /24) comes whole, even if there is less room. Two fill a
        transaction: by the store's work one would, but then it has fewer addresses to divide its own costs by, and an
        answer for two, some 170 KB, is not too long for those behind it.
        """
        half = max(1, room // 2)
        while room > 0 and self._groups:
            group, members = next(iter(self._groups.items()))
            if whole_at is not None and len(members) >= whole_at and len(group) == 3:
                batch.whole.append(list(members.values()))
                room -= half
            elif len(members) > room:
                batch.apart += [members.pop(address) for address in list(islice(members, room))]
                self.count -= room
                return
            else:
                batch.apart += members.values()
                room -= len(members)
            self.count -= len(members)
            del self._groups[group]


@dataclass(slots=True, eq=False)
class Lane(Generic[_T]):
    """The addresses that wait for a read of one group of spaces."""

    misses: Waiting[_T] = field(default_factory=Waiting)
    checks: Waiting[_T] = field(default_factory=Waiting)
    adopted: Waiting[_T] = field(default_factory=Waiting)
    """Checks of adopted entries, which go before everything else."""

    def __len__(self) -> int:
        return self.misses.count + self.checks.count + self.adopted.count

    def take_adopted(self, room: int, whole_at: int | None) -> Batch[_T]:
        """Remove and return addresses whose entries were adopted (as ``Waiting.take``)."""
        batch: Batch[_T] = Batch()
        self.adopted.take(batch, room, whole_at)
        return batch

    def take(self, room: int, whole_at: int | None, *, with_checks: bool) -> Batch[_T]:
        """Remove and return addresses (as ``Waiting.take``)."""
        if self.adopted.count:  # they have had their time
            self.adopted.move_to(self.checks)
        checks = min(self.checks.count, max(room // 4, room - self.misses.count)) if with_checks else 0
        batch: Batch[_T] = Batch()
        self.misses.take(batch, room - checks, whole_at)
        if checks:
            # No packet waits for checks, but misses would wait for a whole /24 of them.
            self.checks.take(batch, checks, None if batch.taken() else whole_at)
        return batch
