"""One start of the stand-in for cilium-agent, as steps that a test takes itself or as a timeline in a thread.

What a real agent was seen to do (cilium-live.md section 6): the pin keeps the old map until the agent is a second
old, is missing for a moment, then names a new, empty map. That is filled; each device's programs go on reading the
old map until they are switched, filled or not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.cilium import Cilium
    from tests.support.cilium_ipcache import Record

_TICK_S = 0.01
_CHUNK = 4096
UNPINNED, PINNED, FILLED, SWITCHED = "unpinned", "pinned", "filled", "switched"


@dataclass(frozen=True)
class Timeline:
    """When a start does what, in seconds from its beginning."""

    repin_after: float = 1.3
    """When the old map's pin goes; 1.0 to 1.6 s were seen."""
    pin_missing: float = 0.02
    fill_rate: float | None = None
    """Entries of pods per second, None: at once. Reserved ones, nodes and local pods come first and at once."""
    switch_after: float | Mapping[str, float] = 6.0
    """When programs are switched, or when each device's are; 6 to 17 s, and 67 or 75 s with 500,000 pods, were seen.

    Not before the new map is pinned, whatever it says here; a device that a mapping leaves out waits for switch().
    """


INSTANT = Timeline(repin_after=0, pin_missing=0, switch_after=0)


class Boot:
    """An agent that starts: every step at most once, in this order, but switches fall anywhere after the pin."""

    def __init__(self, cilium: Cilium) -> None:
        self._cilium = cilium
        self._queue: list[tuple[str, Record | None]] = cilium.listing()
        """Upserts, and deletes that came meanwhile; a watch's events wait behind the listing."""
        self._next = 0
        self._began = time.monotonic()
        self._lock = cilium.lock
        self._done = {name: threading.Event() for name in (UNPINNED, PINNED, FILLED, SWITCHED)}
        self._left = list(cilium.devices)
        self._cancelled = threading.Event()
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self.times: dict[str, float] = {}
        """When each step was done, in seconds from the start; a device's switch under its name."""

    # Steps.

    def unpin(self) -> None:
        """Remove the old map's pin."""
        self._cilium.unpin()
        self._note(UNPINNED)

    def pin(self) -> None:
        """Pin a new, empty map, and write what needs no peer: reserved entries, local pods, nodes."""
        if not self._done[UNPINNED].is_set():
            self.unpin()
        self._cilium.pin_new_map()
        self._note(PINNED)
        self.fill(self._cilium.own_entries)

    def fill(self, count: int | None = None) -> int:
        """Write the next entries of the listing, or all that are left; returns how many are left then."""
        with self._lock:
            end = len(self._queue) if count is None else min(self._next + count, len(self._queue))
            part, self._next = self._queue[self._next : end], end
            self._cilium.write(part)
            left = len(self._queue) - self._next
            if not left and not self._done[FILLED].is_set():
                self._note(FILLED)
        return left

    def switch(self, device: str | None = None) -> None:
        """Give one device, or all that still wait, programs that read the new map."""
        assert self._done[PINNED].is_set(), "there is no new map to switch to: pin() comes before switch()"
        for name in [device] if device else list(self._left):
            self._cilium.load_programs(name)
            self._left.remove(name)
            self._note(name)
        if not self._left:
            self._note(SWITCHED)

    def later(self, prefix: str, record: Record | None) -> bool:
        """Put a change behind what is still to be filled; False when all is filled."""
        with self._lock:
            if self._done[FILLED].is_set():
                return False
            self._queue.append((prefix, record))
            return True

    @property
    def filled(self) -> int:
        """How many entries the new map was given so far."""
        return self._next

    # The timeline.

    def run(self, timeline: Timeline) -> None:
        """Take all steps by the clock, in threads."""
        for part in (self._run_map, self._run_programs):
            thread = threading.Thread(target=self._guard, args=(part, timeline), name="cilium-agent")
            self._threads.append(thread)
            thread.start()

    def wait(self, step: str, timeout: float = 60) -> float:
        """Return when a step is done, with the time that it took; the thread's own error comes out here."""
        end = time.monotonic() + timeout
        while not self._done[step].wait(0.05):
            if self._error:
                raise RuntimeError("the agent's start failed") from self._error
            assert time.monotonic() < end, f"not {step} after {timeout} s"
        return self.times[step]

    def is_done(self, step: str) -> bool:
        """Tell whether a step is done."""
        return self._done[step].is_set()

    def cancel(self) -> None:
        """Stop where it is, as an agent that is killed while it starts; an error of its threads comes out here."""
        self._cancelled.set()
        for thread in self._threads:
            thread.join()
        if self._error:
            raise RuntimeError("the agent's start failed") from self._error

    def _guard(self, part: Callable[[Timeline], None], timeline: Timeline) -> None:
        try:
            part(timeline)
        except BaseException as exc:
            self._error = exc

    def _run_map(self, timeline: Timeline) -> None:
        if self._sleep_until(timeline.repin_after):
            self.unpin()
        if self._sleep_until(timeline.repin_after + timeline.pin_missing):
            self.pin()
            self._fill_by_clock(timeline.fill_rate)

    def _fill_by_clock(self, rate: float | None) -> None:
        began, before = time.monotonic(), self._next
        while not self._cancelled.is_set():
            due = _CHUNK if rate is None else int((time.monotonic() - began) * rate) + before - self._next
            if not self.fill(due) or (rate and self._cancelled.wait(_TICK_S)):
                return

    def _run_programs(self, timeline: Timeline) -> None:
        when = timeline.switch_after
        times = dict(when) if isinstance(when, Mapping) else dict.fromkeys(self._left, when)
        for device, at in sorted(times.items(), key=lambda item: item[1]):
            while not self._done[PINNED].wait(_TICK_S):
                if self._cancelled.is_set():
                    return
            if self._sleep_until(at):
                self.switch(device)

    def _sleep_until(self, at: float) -> bool:
        return not self._cancelled.wait(max(0, self._began + at - time.monotonic()))

    def _note(self, step: str) -> None:
        self.times[step] = time.monotonic() - self._began
        if step in self._done:
            self._done[step].set()
