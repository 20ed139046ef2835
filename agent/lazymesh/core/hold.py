"""The holder's queues: which parked packet goes back, when, and in which order. Pure: frames in, returns out.

A packet waits for the answer to its address, for at most the time limit; an answer, good or bad, releases all packets
of that address in the order in which they came. Answers carry the time from which they hold: a packet whose miss is
younger was signalled again, because its entry has vanished, and waits for an answer of its own.
"""

from __future__ import annotations

import enum
import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

REMEMBER_S = 2.0
"""How long answers are remembered: longer than the kernel keeps an address silent, which is 1.25 s at most."""


class Why(enum.IntEnum):
    """Why a packet was parked (enum hold in lazymesh_abi.h)."""

    FIRST = 1
    """Its miss was signalled: an answer will come."""
    BEHIND = 2
    """It missed while others of its address were held, and was not signalled itself."""
    GATED = 3
    """It was a hit, parked only to stay behind held packets."""


class Cause(enum.Enum):
    """Why a packet goes back; the value is the counter's label."""

    INSTALLED = "installed"
    NEGATIVE = "negative"
    TIMEOUT = "timeout"
    LATE = "late"
    GATED = "gated"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class Frame:
    """One parked packet: its slot in the kernel's table, and its bytes unchanged."""

    slot: int
    address: bytes
    """The family, then the slot's 16 address bytes."""
    parked_ns: int
    """The kernel's time of parking: a slot with another time holds another packet by now."""
    why: Why
    data: bytes | memoryview

    @property
    def parked_at(self) -> float:
        """The time of parking in seconds."""
        return self.parked_ns / 1e9


@dataclass(frozen=True, slots=True)
class Return:
    """A packet to write back to the kernel now, and why."""

    frame: Frame
    cause: Cause
    discard: bool = False
    """Uncount and drop it instead of letting it pass."""


@dataclass(slots=True)
class HoldQueues:
    """All packets that wait."""

    limit_s: float = 0.25
    """How long a packet waits at most."""
    drop_on_timeout: bool = False
    _queues: dict[bytes, list[Frame]] = field(default_factory=dict)
    _deadlines: list[tuple[float, bytes, int]] = field(default_factory=list)
    """A heap: deadline and address of a queue, and when its first packet was parked. (Not the packet, which may be long
    gone by then; nor its slot, which may have another packet of the same address by then.)"""
    _answered: OrderedDict[bytes, tuple[float, bool]] = field(default_factory=OrderedDict)
    """Since when, and whether to discard what comes late."""

    def __len__(self) -> int:
        """How many packets wait."""
        return sum(map(len, self._queues.values()))

    def park(self, frame: Frame) -> Return | None:
        """Take a packet; return it if it need not wait."""
        queue = self._queues.get(frame.address)
        if queue is not None:
            queue.append(frame)
            return None
        if frame.why is Why.GATED:
            return Return(frame, Cause.GATED)
        since, discard = self._answered.get(frame.address, (-REMEMBER_S, False))
        # A packet that came behind was not signalled: once its address is answered, no other answer will come.
        patience = REMEMBER_S if frame.why is Why.BEHIND else 0.0
        if since > 0 and frame.parked_at <= since + patience:
            return Return(frame, Cause.LATE, discard)
        self._wait(frame.address, [frame])
        return None

    def answer(self, address: bytes, cause: Cause, since: float) -> list[Return]:
        """Release the packets of an address, which is answered from that moment on."""
        self._remember(address, since, discard=False)
        queue = self._queues.pop(address, [])
        fresh = next(
            (i for i, f in enumerate(queue) if f.why is Why.FIRST and f.parked_at > since), len(queue)
        )
        if fresh < len(queue):
            self._wait(address, queue[fresh:])
        return [Return(frame, cause) for frame in queue[:fresh]]

    def expire(self, now: float) -> list[Return]:
        """Release packets that have waited too long, and those that came behind them."""
        returns: list[Return] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, address, parked_ns = heapq.heappop(self._deadlines)
            if self._is_first(address, parked_ns):
                self._remember(address, now, self.drop_on_timeout)
                returns += [
                    Return(frame, Cause.TIMEOUT, self.drop_on_timeout) for frame in self._queues.pop(address)
                ]
        return returns

    def next_deadline(self) -> float | None:
        """Return when ``expire`` is due; None while nothing waits."""
        while self._deadlines and not self._is_first(*self._deadlines[0][1:]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def drain(self) -> Iterator[Return]:
        """Release everything: the holder ends."""
        for address in list(self._queues):
            for frame in self._queues.pop(address):
                yield Return(frame, Cause.SHUTDOWN)
        self._deadlines.clear()

    def _wait(self, address: bytes, frames: list[Frame]) -> None:
        self._queues[address] = frames
        heapq.heappush(self._deadlines, (frames[0].parked_at + self.limit_s, address, frames[0].parked_ns))

    def _is_first(self, address: bytes, parked_ns: int) -> bool:
        queue = self._queues.get(address)
        return queue is not None and queue[0].parked_ns == parked_ns

    def _remember(self, address: bytes, since: float, discard: bool) -> None:
        self._answered[address] = (since, discard)
        self._answered.move_to_end(address)
        while next(iter(self._answered.values()))[0] < since - REMEMBER_S:
            self._answered.popitem(last=False)
