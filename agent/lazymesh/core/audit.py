"""The open window: what went through as world while an address had no entry, and what policy would have said.

A bounded log of closed windows, and the sums for the metrics. Times are seconds of the monotonic clock; the code that
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
    """What passed for one address before it had its entry."""

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
    """A window, and what is known about it now."""

    window: Window
    cluster: str | None
    identity: int | None
    """The peer's identity, if known; None for an address that was never resolved."""
    verdict: Verdict
    """What policy says about that identity."""
    open: bool
    """Nothing has closed it: the address still has no entry."""


@dataclass(slots=True)
class AuditLog:
    """Closed windows, in the order in which they were closed."""

    complete_since: float = 0.0
    """Windows whose last packet came before this may have been forgotten."""
    gone_before: int = 0
    """Windows that the kernel had opened, and that were no longer open, when the log began."""
    windows_total: int = 0
    packets_total: int = 0
    seconds_total: float = 0.0
    forgotten_total: int = 0
    """Windows that had to make room for others before they were closed: what went through them is in no sum."""
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
        """Work out whether the kernel has forgotten any, from how many it had opened and, a moment later, had open.

        Never counts too many: windows opened in that moment only hide forgotten ones until next time.
        """
        forgotten = opened - self.gone_before - self.windows_total - open_now
        if forgotten > self.forgotten_total:
            self.forgotten_total = forgotten
            self.complete_since = now

    def since(self, moment: float) -> Iterator[AuditedWindow]:
        """Yield the windows that were still open at that moment, or later."""
        return (audited for audited in self._closed if audited.window.last >= moment)
