"""The miss signals: the kernel's perf rings, driven by the event loop.

A signal alone does not wake the agent. Before it looks into the rings it says that it wants to be woken (struct
lm_reader), and the program that sends the next signal rings the doorbell, another perf event. While the agent will look
into them anyway, no packet has to pay for waking it, which is nine tenths of what a signal costs.
"""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from lazymesh.datapath import abi
from lazymesh.datapath.perfbuffer import PerfBuffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.datapath.libbpf import Map


class SignalMaps(NamedTuple):
    """The signals, what wakes their reader, and where it says that it wants that."""

    events: Map
    doorbell: Map
    reader: Map


RING_PAGES = 128
"""Pages per CPU: 512 KiB hold about 9,000 signals."""
FEW_PAGES = 32
"""Where the kernel allows no more: all rings together may lock 516 KiB per CPU (perf_event_mlock_kb), others' included.
The rest is up to RLIMIT_MEMLOCK, unless the agent has CAP_IPC_LOCK."""

AT_ONCE = 512
"""Signals handed over before the event loop gets its turn: one or two milliseconds of it."""
ROOM = 65_536
"""Signals that may wait here, some 6 MB: a burst is read from the rings much faster than it is resolved."""
CROWDED, RELIEVED = ROOM * 3 // 4, ROOM // 4
EACH_S = 30e-6
"""The time allotted to a signal: after several that took less, the reader waits for the rest, at most REST_S. So a lone
miss never waits, and in a flood few wake-ups handle many signals: each of 250 costs half of what each of ten does.
The event loop's timers round up to whole milliseconds, so such a wait takes one to three of them."""
REST_S = 0.002
_TURNS = 100
"""How often we may ask for the doorbell before its own rings, which hold 255 events each, are emptied."""


class SignalReader:
    """Reads signals from the rings when the doorbell rings, and hands them over in order.

    on_signals runs in the event loop, with all signals of that moment (or AT_ONCE): batching without waiting.
    on_crowded is called when so many wait that there should be no more, and when that is over.
    """

    def __init__(
        self,
        maps: SignalMaps,
        on_signals: Callable[[abi.Signals], None],
        on_crowded: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.invalid = 0
        """Records other than miss signals: there should be none."""
        self.crowded = False
        self._on_signals = on_signals
        self._on_crowded = on_crowded
        self._waiting: deque[bytes] = deque()
        self._doorbell = PerfBuffer(maps.doorbell, 1, lambda _: None, wakes=True)
        self._buffer = self._open(maps.events)
        self._wanted = abi.Reader.from_buffer(mmap.mmap(maps.reader.fd, mmap.PAGESIZE))
        self._order = threading.Lock()
        self._turns = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next: asyncio.Handle | None = None
        """When we will look into the rings again, whether woken or not."""
        self._paused = False

    def start(self) -> None:
        """Start reading; must be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._doorbell.fd, self.look)
        self.look()  # what came before

    def look(self, planned: bool = False) -> None:
        """Look into the rings, unless that is planned for later: what comes before then is to wait, and come together.

        Called when the doorbell rings, which it may still do after we have looked. Call it now and then, too: see
        ``_want_wake``.
        """
        loop = self._loop
        if loop is None or (self._next is not None and not planned):
            return
        self._next = None
        self._want_wake()
        # What finds no room here stays in the rings; what finds none there is lost, and counted by the kernel.
        room = ROOM - len(self._waiting)
        more = room > 0 and self._buffer.consume(room)
        if self.crowded or len(self._waiting) >= CROWDED:
            self._update_crowded()
        began, handed = monotonic(), 0
        if not self._paused and self._waiting:
            handed = self._hand_over()
            more = more or bool(self._waiting)
        rest = min(began + handed * EACH_S - monotonic(), REST_S) if handed > 1 else 0.0
        if more or rest > 0:
            self._wanted.wake = 0
            self._plan(loop.call_soon(self.look, True) if more else loop.call_later(rest, self.look, True))

    def pause(self, on: bool) -> None:
        """Stop handing signals over, or resume."""
        self._paused = on
        if not on and self._loop is not None:
            self._plan(self._loop.call_soon(self.look, True))

    def close(self) -> None:
        """Stop reading; signals from now on count as lost in the kernel."""
        if self._loop is not None:
            self._plan(None)
            self._loop.remove_reader(self._doorbell.fd)
            self._loop = None
        self._doorbell.close()
        self._buffer.close()

    def _open(self, events: Map) -> PerfBuffer:
        try:
            return PerfBuffer(events, RING_PAGES, self._waiting.extend)
        except PermissionError:
            return PerfBuffer(events, FEW_PAGES, self._waiting.extend)

    def _plan(self, following: asyncio.Handle | None) -> None:
        if self._next is not None:
            self._next.cancel()
        self._next = following

    def _want_wake(self) -> None:
        """Have the next signal wake us; those before it are in the rings when this returns.

        That needs our write to be done before we read the rings, and the program's signal to be there before it reads
        what we want. On x86 a lock here, and an atomic addition there, see to that. Other processors promise less, so
        there, once in a long while, a signal may wake nobody: it is found by ``look``.
        """
        self._wanted.wake = 1
        with self._order:
            pass
        self._turns += 1
        if self._turns % _TURNS == 0:
            self._doorbell.consume()

    def _hand_over(self) -> int:
        waiting = self._waiting
        if len(waiting) == 1:
            records = [waiting.popleft()]
        else:
            records = [waiting.popleft() for _ in range(min(AT_ONCE, len(waiting)))]
        signals = abi.unpack_signals(records)
        self.invalid += len(records) - len(signals.addresses)
        if signals.addresses:
            self._on_signals(signals)
        return len(records)

    def _update_crowded(self) -> None:
        waiting = len(self._waiting)
        if waiting <= RELIEVED if self.crowded else waiting >= CROWDED:
            self.crowded = not self.crowded
            self._on_crowded(self.crowded)
