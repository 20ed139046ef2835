"""The holder's queues: which parked packet goes back, when, and in which order. Pure: frames in, returns out.

A packet waits for the answer to its address, at most the time limit; an answer, good or bad, lets all of that address
go in the order in which they came. What comes for an address that was answered a moment ago does not wait: the kernel
had parked it before it could see the answer. A *gated* packet is a hit that was parked only to stay behind held ones;
it waits if some of its address still do.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LATE_S = 0.005
"""A packet parked this shortly after its address's answer was parked by a program that could not know of it yet."""
REMEMBER_S = 1.0
"""How long answers are remembered: longer than any packet needs from the kernel to here."""


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
    """One parked packet: its slot in the kernel's table, and the bytes as they came."""

    slot: int
    address: bytes
    """The slot's 16 address bytes; IPv4 and IPv6 never share a queue, the family is the 17th."""
    parked_at: float
    gated: bool
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Return:
    """What is to be written back to the kernel now, and why."""

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
    _deadlines: deque[tuple[float, bytes, Frame]] = field(default_factory=deque)
    """One for each queue's first packet, in time order: the limit is the same for all."""
    _answered: OrderedDict[bytes, float] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        """How many packets wait."""
        return sum(map(len, self._queues.values()))

    def park(self, frame: Frame) -> Return | None:
        """Take a packet in; return it when it need not wait."""
        queue = self._queues.get(frame.address)
        if queue is not None:
            queue.append(frame)
            return None
        if frame.gated:
            return Return(frame, Cause.GATED)
        if frame.parked_at <= self._answered.get(frame.address, -1.0) + LATE_S:
            return Return(frame, Cause.LATE)
        self._queues[frame.address] = [frame]
        self._deadlines.append((frame.parked_at + self.limit_s, frame.address, frame))
        return None

    def answer(self, address: bytes, cause: Cause, now: float) -> list[Return]:
        """Let all packets of an address go: it is answered."""
        self._answered[address] = now
        self._answered.move_to_end(address)
        while self._answered and next(iter(self._answered.values())) < now - REMEMBER_S:
            self._answered.popitem(last=False)
        return [Return(frame, cause) for frame in self._queues.pop(address, ())]

    def expire(self, now: float) -> list[Return]:
        """Let go what has waited too long."""
        returns: list[Return] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, address, first = self._deadlines.popleft()
            queue = self._queues.get(address)
            if queue is not None and queue[0] is first:
                late = self.answer(address, Cause.TIMEOUT, now)
                returns += [Return(item.frame, item.cause, self.drop_on_timeout) for item in late]
        return returns

    def next_deadline(self) -> float | None:
        """Return when expire is due, None while nothing waits."""
        while self._deadlines and not self._waits(*self._deadlines[0][1:]):
            self._deadlines.popleft()
        return self._deadlines[0][0] if self._deadlines else None

    def drain(self) -> Iterator[Return]:
        """Let everything go: the holder ends."""
        for address in list(self._queues):
            for frame in self._queues.pop(address):
                yield Return(frame, Cause.SHUTDOWN)
        self._deadlines.clear()

    def _waits(self, address: bytes, first: Frame) -> bool:
        queue = self._queues.get(address)
        return queue is not None and queue[0] is first
