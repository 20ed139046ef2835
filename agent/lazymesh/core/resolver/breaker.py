"""A circuit breaker for one cluster's store: after several failures in a row, ask rarely instead of always.

Closed: everything passes. Open: nothing passes until the back-off is over. Half-open: one read passes and
decides. The back-off doubles with each failed probe and has full jitter, so that a thousand nodes do not come
back at once.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from lazymesh.core.backoff import Backoff, BackoffLimits

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.core.resolver.limits import Limits


class BreakerState(enum.Enum):
    """The state of a breaker; the value is the word in status and metrics."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


ALLOWED = {
    BreakerState.CLOSED: {BreakerState.OPEN},
    BreakerState.OPEN: {BreakerState.HALF_OPEN, BreakerState.CLOSED},
    BreakerState.HALF_OPEN: {BreakerState.OPEN, BreakerState.CLOSED},
}
"""From open straight to closed: a read that was sent before the breaker opened may still succeed."""


class Breaker:
    """Counts how a cluster's reads end and says whether the next one may be sent."""

    __slots__ = ("_backoff", "_failures", "_jitter", "_limits", "_retry_at", "state")

    def __init__(self, limits: Limits, jitter: Callable[[], float]) -> None:
        self.state = BreakerState.CLOSED
        self._limits = limits
        self._jitter = jitter
        self._backoff = Backoff(BackoffLimits(limits.backoff_first, limits.backoff_most), jitter)
        self._failures = 0
        self._retry_at = 0.0

    def admits(self, now: float) -> bool:
        """Return whether a read may be sent now."""
        if self.state is BreakerState.CLOSED:
            return True
        return self.state is BreakerState.OPEN and now >= self._retry_at

    def sent(self) -> None:
        """Note that an admitted read was sent."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def succeeded(self) -> None:
        """Note that the store answered."""
        self._failures = 0
        if self.state is not BreakerState.CLOSED:
            self.state = BreakerState.CLOSED
            self._backoff.reset()

    def failed(self, now: float) -> None:
        """Note that a read failed."""
        self._failures += 1
        # While open, failures are those of reads sent before: they must not lengthen the pause.
        if self.state is BreakerState.HALF_OPEN or (
            self.state is BreakerState.CLOSED and self._failures >= self._limits.breaker_failures
        ):
            self.state = BreakerState.OPEN
            self._retry_at = now + self._backoff.next_s()

    def spread(self) -> float:
        """Return the pause after which the known addresses of a store that is back are read again."""
        return self._limits.revalidation_spread * self._jitter()
