"""How many misses the kernel may signal, as a share of what the settings allow; adapted to how fast they are answered.

Each cluster is compared with itself: its fastest answers of the last minute show how far away its store is, and when
its slowest ones (the 99th percentile of a second) take many times as long, they wait for something. One cluster alone
does not show whether that is its store or this agent; but when *every* cluster that answers has become slow, the cause
is here, and fewer misses are admitted: half as many, then a look at whether it helped. One slow second is a burst, not
a cause; a slow cluster among good ones changes nothing for them.

Down at once and up by a tenth a second, unless half of the answers take half as long as what is slow, as they do when
they queue. So it neither swings nor starves, nor does it stay down where a few are late in every second, because the
node is busy. The queue's own alarm is the mute flag (machine); after that, too, the share is halved, so that the flood
does not come back at once.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.core.resolver.limits import Limits

WINDOW_S = 1.0
"""How often the answers are judged."""
SAMPLES = 20
"""Answers that a cluster must give in a window: fewer say nothing about a percentile."""
MEMORY = 60
"""Windows for which a cluster's fastest answer is remembered."""


class Admission:
    """The controller; ``share`` is the one in force, from ``Limits.admission_least`` to 1."""

    def __init__(self, limits: Limits) -> None:
        self.share = 1.0
        self.p99 = 0.0
        """Seconds; that of the least slow cluster in the last window with enough answers."""
        self.cuts = {"latency": 0, "queue": 0}
        """How often the share was halved, by cause."""
        self._limits = limits
        self._clusters: dict[str, _Cluster] = {}
        self._ends = 0.0
        self._settling = False
        self._late = 0

    def took(self, cluster: str, seconds: Sequence[float]) -> None:
        """Note how long misses took that were answered from the cluster's store."""
        if not seconds:
            return
        known = self._clusters.get(cluster)
        if known is None:
            known = self._clusters[cluster] = _Cluster()
        known.times += seconds

    def forget(self, cluster: str) -> None:
        """Forget a cluster that is gone."""
        self._clusters.pop(cluster, None)

    def look(self, now: float) -> bool:
        """Judge the window if it is over; return whether the share has changed."""
        if now < self._ends:
            return False
        self._ends = now + WINDOW_S
        slowness = [each for each in (c.close() for c in self._clusters.values()) if each is not None]
        if self._settling:
            # These answers belong to misses that were admitted before the share was halved.
            self._settling = False
            return False
        if not slowness:
            return self._grow()
        self.p99, median, usual = min(slowness, key=lambda each: each[0] / self._bound(each[2]))
        bound = self._bound(usual)
        self._late = self._late + 1 if self.p99 > bound else 0
        if self._late > 1:
            return self._halve("latency")
        return self._grow() if self.p99 <= bound and median <= bound / 2 else False

    def overrun(self) -> bool:
        """Note that the queue is so full that the kernel is muted; return whether the share has changed."""
        return self._halve("queue")

    def _bound(self, usual: float) -> float:
        return max(self._limits.admission_floor, self._limits.admission_factor * usual)

    def _halve(self, cause: str) -> bool:
        self._settling = True
        before, self.share = self.share, max(self._limits.admission_least, self.share / 2)
        if self.share == before:
            return False
        self.cuts[cause] += 1
        return True

    def _grow(self) -> bool:
        before, self.share = self.share, min(1.0, self.share * self._limits.admission_growth)
        return self.share != before


class _Cluster:
    """How long one cluster's answers take."""

    __slots__ = ("_fastest", "times")

    def __init__(self) -> None:
        self.times: list[float] = []
        self._fastest: deque[float] = deque(maxlen=MEMORY)

    def close(self) -> tuple[float, float, float] | None:
        """End a window; return 99th percentile, median and the usual time, or None if there are too few answers."""
        times, self.times = self.times, []
        if len(times) < SAMPLES:
            return None
        times.sort()
        self._fastest.append(times[0])
        return times[math.ceil(len(times) * 0.99) - 1], times[len(times) // 2], min(self._fastest)
