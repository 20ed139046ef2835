"""Our entries in the map: which, how recently used, which are in doubt, and by identity.

Only the books; the commands that change the map are issued in ``moves``. An entry is *owned* from its Install
command on. It is *in doubt* from the moment at which its truth can no longer be checked (its cluster fell
silent, its store was replaced, it was adopted) until an answer confirms it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lazymesh.core.model import Address, Entry
    from lazymesh.core.resolver.limits import Limits
    from lazymesh.core.resolver.tracked import Tracked


class Ledger:
    """The owned entries, least recently used first, and the indexes over them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._owned: OrderedDict[Address, Tracked] = OrderedDict()
        self.room = limits.owned
        """How many more entries there is room for; read-only for others."""
        self._doubted: OrderedDict[Address, tuple[float, Tracked]] = OrderedDict()
        self._named: dict[int, dict[Address, Tracked]] = {}
        self.unanswered: dict[Address, Tracked] = {}
        """Addresses with an Install that has no result yet, and whom it was sent for: at most one for each address at
        any time, even if it was forgotten and missed again meanwhile, so that no result is mistaken for another's."""

    def __len__(self) -> int:
        return len(self._owned)

    def __iter__(self) -> Iterator[Tracked]:
        return iter(self._owned.values())

    def own(self, some: Iterable[Tracked], entry: Entry) -> None:
        """Add the entry of these addresses, as the most recently used, and the identity that they depend on."""
        identity, owned = entry.identity, self._owned
        named = self._named.setdefault(identity, {})
        before = len(owned)
        for tracked in some:
            address = tracked.address
            owned[address] = tracked
            if tracked.entry is not None:
                owned.move_to_end(address)
            tracked.entry = entry
            if tracked.identity != identity:
                if tracked.identity:
                    self.name(tracked, 0)
                tracked.identity = identity
                named[address] = tracked
        self.room -= len(owned) - before

    def disown(self, tracked: Tracked) -> None:
        """Remove the address's entry."""
        self.room += 1
        tracked.entry = None
        del self._owned[tracked.address]
        self._doubted.pop(tracked.address, None)

    def touch(self, tracked: Tracked) -> None:
        """Note that the entry is in use."""
        self._owned.move_to_end(tracked.address)

    def oldest(self) -> Tracked | None:
        """Return the address whose entry was least recently used."""
        return next(iter(self._owned.values()), None)

    def doubt(self, some: Iterable[Tracked], now: float) -> None:
        """Put the entries in doubt; for those that already are, the clock runs on."""
        for tracked in some:
            self._doubted.setdefault(tracked.address, (now, tracked))

    def trust(self, tracked: Tracked) -> None:
        """Take the entry out of doubt."""
        self._doubted.pop(tracked.address, None)

    @property
    def in_doubt(self) -> bool:
        """Whether any entry is in doubt."""
        return bool(self._doubted)

    def doubts(self, tracked: Tracked) -> bool:
        """Return whether the entry is in doubt."""
        return tracked.address in self._doubted

    def doubted(self) -> dict[str, int]:
        """Return how many entries of each cluster are in doubt."""
        return dict(Counter([each.link.name for _, each in self._doubted.values() if each.link is not None]))

    def stale(self, now: float) -> Iterator[Tracked]:
        """Yield each entry that has been in doubt too long; the caller disowns it before it asks for the next."""
        while self._doubted:
            since, tracked = next(iter(self._doubted.values()))
            if now - since < self._limits.stale_after:
                return
            yield tracked

    def name(self, tracked: Tracked, identity: int) -> None:
        """Record which identity the address depends on; 0: none."""
        if tracked.identity == identity:
            return
        if tracked.identity:
            named = self._named[tracked.identity]
            del named[tracked.address]
            if not named:
                del self._named[tracked.identity]
        tracked.identity = identity
        if identity:
            self._named.setdefault(identity, {})[tracked.address] = tracked

    def named(self, identity: int) -> list[Tracked]:
        """Return the addresses that depend on the identity."""
        named = self._named.get(identity)
        return [] if named is None else list(named.values())
