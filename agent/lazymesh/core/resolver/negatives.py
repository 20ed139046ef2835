"""The negative cache: which addresses are absent, for which reason, until when.

One row per reason and lifetime, so that insertion order is expiry order and nothing is ever scanned. Forgetting an
address (and unwatching it) is left to the resolver.

An address that was not found is watched while it is remembered, so that its publication is noticed at once. That costs
the store two watches, so there is an allowance: a network scan gets short memories instead of watches.
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


_STANDING = frozenset({Reason.FORGED, Reason.MALFORMED, Reason.OUT_OF_SCOPE})
"""Reasons that lie in the record itself: reading it again says the same."""


class Negatives:
    """Absent addresses, oldest first in each reason's row."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._rows: dict[tuple[Reason, bool], OrderedDict[Address, Tracked]] = {
            (reason, fleeting): OrderedDict() for reason in Reason for fleeting in (False, True)
        }
        self._count = 0
        self._watches_paid_until = 0.0
        """The allowance as a theoretical arrival time (GCRA), like the kernel's buckets."""

    def __len__(self) -> int:
        return self._count

    def add(self, tracked: Tracked, reason: Reason, now: float) -> None:
        """Remember that the address is absent from now on."""
        tracked.reason = reason
        tracked.fleeting = reason is Reason.NOT_FOUND and not tracked.watched and not self._may_watch(now)
        ttl = self._limits.unwatched_ttl if tracked.fleeting else self._limits.negative_ttl[reason]
        tracked.expires = now + ttl
        self._rows[reason, tracked.fleeting][tracked.address] = tracked
        self._count += 1

    def renew(self, tracked: Tracked, now: float) -> None:
        """Extend the absence of an address that missed again, if its record is watched and refused until it changes."""
        if tracked.watched and tracked.reason in _STANDING:
            row = self._rows[tracked.reason, tracked.fleeting]
            row.move_to_end(tracked.address)
            tracked.expires = now + self._limits.negative_ttl[tracked.reason]

    def remove(self, tracked: Tracked) -> None:
        """Take out an address that was added; it is no longer absent, or absent for another reason."""
        del self._rows[tracked.reason, tracked.fleeting][tracked.address]
        tracked.fleeting = False
        self._count -= 1

    def expired(self, now: float) -> Iterator[Tracked]:
        """Yield each address whose time is up; the caller removes it before it asks for the next."""
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
        counts = {
            reason: sum(len(self._rows[reason, fleeting]) for fleeting in (False, True)) for reason in Reason
        }
        return {reason: count for reason, count in counts.items() if count}

    def _may_watch(self, now: float) -> bool:
        paid_until = max(self._watches_paid_until, now)
        if paid_until - now > self._limits.negative_watch_burst / self._limits.negative_watch_rate:
            return False
        self._watches_paid_until = paid_until + 1 / self._limits.negative_watch_rate
        return True
