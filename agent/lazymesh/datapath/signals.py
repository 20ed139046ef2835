"""The miss signals: the kernel's perf rings, driven by the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lazymesh.datapath import abi
from lazymesh.datapath.libbpf import PerfBuffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.datapath.libbpf import Map

RING_PAGES = 64
"""Pages per CPU: 256 KiB hold about 5,000 signals, a quarter of a second at the global rate limit."""


AT_ONCE = 256
"""Signals of one CPU that are taken before the event loop gets its turn."""


class SignalReader:
    """Hands every signal that is waiting to one callback, each time the kernel says that there is something.

    on_signals runs in the event loop, with all signals of that moment (or AT_ONCE): batching without waiting.
    """

    def __init__(self, events: Map, on_signals: Callable[[list[abi.Signal]], None]) -> None:
        self._on_signals = on_signals
        self._batch: list[abi.Signal] = []
        self.invalid = 0
        """Records that were no miss signal: there should be none."""
        self._buffer = PerfBuffer(events, RING_PAGES, self._take)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._paused = False

    def start(self) -> None:
        """Read from now on; to be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._buffer.fd, self._drain)
        self._drain()  # what came before the loop looked

    def pause(self, on: bool) -> None:
        """Leave what waits in the rings, or go on: they are the better queue while there is no other room for it."""
        self._paused = on
        if not on and self._loop is not None:
            self._loop.call_soon(self._drain)

    def close(self) -> None:
        """Stop reading; signals from now on count as lost in the kernel."""
        if self._loop is not None:
            self._loop.remove_reader(self._buffer.fd)
            self._loop = None
        self._buffer.close()

    def _take(self, raw: bytes) -> None:
        signal = abi.unpack_signal(raw)
        if signal is None:
            self.invalid += 1
        else:
            self._batch.append(signal)

    def _drain(self) -> None:
        if self._paused or self._loop is None:
            return
        more = self._buffer.consume(AT_ONCE)
        if self._batch:
            batch, self._batch = self._batch, []
            self._on_signals(batch)
        if more:  # the kernel has told already that there is something
            self._loop.call_soon(self._drain)
