"""The open window: what went through as world while an address had no entry, and what policy would have said.

A bounded record of closed windows, and the sums for the metrics. Times are seconds of the monotonic clock; whoever
shows them to a person turns them into dates.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazymesh.core.model import Address, Direction

Verdict = Literal["allowed", "denied", "unknown"]

KEEP = 10_000
"""Closed windows remembered; the oldest go first, the sums stay."""


@dataclass(frozen=True, slots=True)
class Window:
    """What one address let through before it had its entry."""

    address: Address
    direction: Direction
    first: float
    last: float
    packets: int
    bytes: int

    @property
    def seconds(self) -> float:
        """How long it was open: from the first packet to the last."""
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class AuditedWindow:
    """A window, and what is known of it now."""

    window: Window
    cluster: str | None
    identity: int | None
    """The peer's identity, once known; None for an address that was never resolved."""
    verdict: Verdict
    """What policy says of that identity."""
    open: bool
    """Nothing has closed it: the address has no entry still."""


@dataclass(slots=True)
class AuditLog:
    """Closed windows, in the order in which they were closed."""

    complete_since: float = 0.0
    """Whose last packet came before that may not be remembered."""
    gone_before: int = 0
    """Windows that the kernel had opened, and that were not open any more, when the log was begun."""
    windows_total: int = 0
    packets_total: int = 0
    seconds_total: float = 0.0
    forgotten_total: int = 0
    """Windows that were not closed, but had to make room for others: what went through them is in no sum."""
    _closed: deque[AuditedWindow] = field(default_factory=lambda: deque(maxlen=KEEP))

    def close(self, audited: AuditedWindow) -> None:
        """Record a closed window."""
        self.windows_total += 1
        self.packets_total += audited.window.packets
        self.seconds_total += audited.window.seconds
        if len(self._closed) == KEEP:
            self.complete_since = max(self.complete_since, self._closed[0].window.last)
        self._closed.append(audited)

    def compare(self, opened: int, open_now: int, now: float) -> None:
        """Learn whether the kernel has forgotten any, from how many it has opened and then, a moment later, had open.

        Never too many: what was opened in that moment only hides some, until next time.
        """
        forgotten = opened - self.gone_before - self.windows_total - open_now
        if forgotten > self.forgotten_total:
            self.forgotten_total = forgotten
            self.complete_since = now

    def since(self, moment: float) -> Iterator[AuditedWindow]:
        """Yield what was still open at that moment, or later."""
        return (audited for audited in self._closed if audited.window.last >= moment)
