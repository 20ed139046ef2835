"""Keeps the audit of open windows: reads the kernel's windows, closes them when their addresses are answered."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from lazymesh.core.audit import AuditedWindow, AuditLog
from lazymesh.core.model import format_address
from lazymesh.datapath.maps import window_of
from lazymesh.tasks import FairShare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lazymesh.core.audit import Verdict, Window
    from lazymesh.core.model import Address, Direction
    from lazymesh.core.resolver import Resolver
    from lazymesh.datapath.maps import CounterMap, WindowMap

    Allows = Callable[[Direction, int], bool]
    Element = tuple[bytes, bytes]

LOOK_EVERY_S = 5.0
MANY = 64
"""From this many addresses on, checking once whether any window is open costs less than looking for each."""
IDLE_S = 60.0
"""A window through which nothing has passed for this long is closed, answered or not."""


class Auditor:
    """Owns the log; the driver reports which addresses have their entry now.

    allows: policy's verdict on a peer; None where lazymesh does not enforce policy.
    """

    def __init__(
        self, windows: WindowMap, counters: CounterMap, allows: Allows | None, resolver: Resolver
    ) -> None:
        still_open = len(windows.elements())
        self.log = AuditLog(time.monotonic(), counters.windows_opened() - still_open)
        self._windows = windows
        self._counters = counters
        self._allows = allows
        self._resolver = resolver

    def installed(self, addresses: Sequence[Address]) -> None:
        """Close the addresses' windows; mostly there are none, as packets are held or dropped."""
        if len(addresses) >= MANY and self._windows.is_empty():
            return
        for address in addresses:
            window = self._windows.take(address)
            if window is not None:
                self.log.close(self._finding(window, open_=False))

    async def run(self) -> None:
        """Close idle windows until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await FairShare().work(self._look(), self._close_idle)

    async def describe(self, since_s: float) -> dict[str, Any]:
        """Return the findings of the last ``since_s`` seconds, closed ones first, and since when they are complete.

        All are of one moment: a window that is closed while thousands are turned into objects is shown as open.
        """
        moment = time.monotonic() - since_s
        still_open, closed = self._look(), list(self.log.since(moment))
        recorded_since, share = _as_date(self.log.complete_since), FairShare()
        windows: list[dict[str, Any]] = []
        await share.work(closed, lambda some: windows.extend(map(_as_object, some)))
        await share.work(still_open, lambda some: windows.extend(self._still_open(some, moment)))
        return {"windows": windows, "recordedSince": recorded_since}

    def _close_idle(self, elements: Sequence[Element]) -> None:
        idle = time.monotonic() - IDLE_S
        self.installed([each.address for each in map(window_of, elements) if each.last < idle])

    def _still_open(self, elements: Sequence[Element], moment: float) -> Iterator[dict[str, Any]]:
        for window in map(window_of, elements):
            if window.last >= moment:
                yield _as_object(self._finding(window, open_=True))

    def _look(self) -> list[Element]:
        """Return the open windows, and note whether others had to make room for them."""
        opened = self._counters.windows_opened()
        elements = self._windows.elements()
        self.log.compare(opened, len(elements), time.monotonic())
        return elements

    def _finding(self, window: Window, open_: bool) -> AuditedWindow:
        known = self._resolver.describe(window.address)
        identity = known.entry.identity if known and known.entry else None
        verdict = self._verdict(window.direction, identity)
        return AuditedWindow(window, known.cluster if known else None, identity, verdict, open_)

    def _verdict(self, direction: Direction, identity: int | None) -> Verdict:
        if identity is None or self._allows is None:
            return "unknown"
        return "allowed" if self._allows(direction, identity) else "denied"


def _as_object(finding: AuditedWindow) -> dict[str, Any]:
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
