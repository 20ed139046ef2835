"""Keeps the audit of the open window: reads the kernel's windows, closes them when their addresses are answered."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from lazymesh.core.audit import AuditLog, Finding
from lazymesh.core.model import format_address
from lazymesh.datapath.maps import window_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazymesh.core.audit import Window
    from lazymesh.core.model import Address, Direction
    from lazymesh.core.resolver import Resolver
    from lazymesh.datapath.maps import CounterMap, WindowMap

    Allows = Callable[[Direction, int], bool]

LOOK_EVERY_S = 5.0
MANY = 64
"""From so many addresses on, to look once whether any window is open costs less than to look for the window of each."""
IDLE_S = 60.0
"""A window through which nothing has passed for so long is closed, answered or not."""


class Auditor:
    """Owns the log; the driver tells it which addresses have their entry now.

    allows: what policy says of a peer; None: somebody else decides that.
    """

    def __init__(
        self, windows: WindowMap, counters: CounterMap, allows: Allows | None, resolver: Resolver
    ) -> None:
        still_open = windows.count()
        self.log = AuditLog(time.monotonic(), counters.windows_opened() - still_open)
        self._windows = windows
        self._counters = counters
        self._allows = allows
        self._resolver = resolver

    def installed(self, addresses: Sequence[Address]) -> None:
        """Close the addresses' windows, if they have any. Mostly none has: packets are held, or dropped."""
        if len(addresses) >= MANY and self._windows.is_empty():
            return
        for address in addresses:
            window = self._windows.take(address)
            if window is not None:
                self.log.close(self._finding(window, open_=False))

    async def run(self) -> None:
        """Close the windows of addresses that nobody talks to any more, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            idle = time.monotonic() - IDLE_S
            self.installed([each.address for each in map(window_of, self._look()) if each.last < idle])

    def describe(self, since_s: float) -> dict[str, Any]:
        """Return the findings of the last so many seconds, closed ones first, and since when there are all."""
        moment = time.monotonic() - since_s
        still_open = [
            self._finding(each, open_=True) for each in map(window_of, self._look()) if each.last >= moment
        ]
        windows = [_as_object(finding) for finding in (*self.log.since(moment), *still_open)]
        return {"windows": windows, "recordedSince": _as_date(self.log.complete_since)}

    def _look(self) -> list[tuple[bytes, bytes]]:
        """Return the windows that are open, and note whether others had to make room for them."""
        opened = self._counters.windows_opened()
        elements = self._windows.elements()
        self.log.compare(opened, len(elements), time.monotonic())
        return elements

    def _finding(self, window: Window, open_: bool) -> Finding:
        view = self._resolver.describe(window.address)
        identity = view.entry.identity if view and view.entry else None
        verdict = self._verdict(window.direction, identity)
        return Finding(window, view.cluster if view else None, identity, verdict, open_)

    def _verdict(self, direction: Direction, identity: int | None) -> str:
        if identity is None or self._allows is None:
            return "unknown"
        return "allowed" if self._allows(direction, identity) else "denied"


def _as_object(finding: Finding) -> dict[str, Any]:
    window = finding.window
    return {
        "address": format_address(window.address),
        "direction": window.direction.name.lower(),
        "cluster": finding.cluster,
        "since": _as_date(window.first),
        "seconds": round(window.seconds, 6),
        "packets": window.packets,
        "bytes": window.bytes,
        "identity": finding.identity,
        "verdict": finding.verdict,
        "open": finding.open,
    }


def _as_date(moment: float) -> str:
    ago = timedelta(seconds=time.monotonic() - moment)
    return (datetime.now(UTC) - ago).isoformat(timespec="milliseconds")
