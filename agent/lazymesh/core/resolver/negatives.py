"""The negative cache: which addresses are absent, for which reason, until when.

One row per reason: within a row the lifetime is the same, so that insertion order is expiry order and nothing
is ever scanned. Forgetting an address (and unwatching it) is left to the resolver.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from lazymesh.core.model import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazymesh.core.model import Address
    from lazymesh.core.resolver.limits import Limits
    from lazymesh.core.resolver.tracked import Tracked


class Negatives:
    """Absent addresses, oldest first in each reason's row."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._rows: dict[Reason, OrderedDict[Address, Tracked]] = {reason: OrderedDict() for reason in Reason}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, tracked: Tracked, reason: Reason, now: float) -> None:
        """Remember that the address is absent from now on."""
        tracked.reason = reason
        tracked.expires = now + self._limits.negative_ttl[reason]
        self._rows[reason][tracked.address] = tracked
        self._count += 1

    def remove(self, tracked: Tracked) -> None:
        """Take out an address that was added; it is no longer absent, or absent for another reason."""
        del self._rows[tracked.reason][tracked.address]
        self._count -= 1

    def expired(self, now: float) -> Iterator[Tracked]:
        """Yield each address whose time is over; the caller removes it before it asks for the next."""
        for row in self._rows.values():
            while row and (first := next(iter(row.values()))).expires <= now:
                yield first

    def overflow(self) -> Tracked | None:
        """Return the address to forget next (it would expire first), or None while the bound holds."""
        if self._count <= self._limits.negatives:
            return None
        return min((next(iter(row.values())) for row in self._rows.values() if row), key=lambda t: t.expires)

    def counts(self) -> dict[Reason, int]:
        """Return how many addresses are absent for each reason."""
        return {reason: len(row) for reason, row in self._rows.items() if row}
