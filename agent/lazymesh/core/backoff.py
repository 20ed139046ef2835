"""Exponential back-off with full jitter: how long to leave a store alone that did not answer.

Full jitter, because every node of a mesh loses the same store at the same moment and must not come back in
step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class BackoffLimits:
    """The two ends of the exponential curve, in seconds."""

    initial_s: float = 0.25
    """Longest first delay: what a restart of one etcd pod's process takes."""
    ceiling_s: float = 2.0
    """Longest delay ever. Misses cannot be resolved meanwhile, so a store that is back must be found soon; with full
    jitter a thousand nodes then knock a thousand times a second, and refusing a connection costs next to nothing."""


class Backoff:
    """The delays of one sequence of failures."""

    def __init__(self, limits: BackoffLimits, jitter: Callable[[], float]) -> None:
        """Jitter: random numbers from 0 to 1."""
        self._limits = limits
        self._jitter = jitter
        self._failures = 0

    def next_s(self) -> float:
        """Return the next delay: anything between nothing and the limit, which doubles each time."""
        # 2**32 seconds is past any ceiling; unbounded, the power would outgrow a float in a long outage.
        limit = min(self._limits.ceiling_s, self._limits.initial_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return self._jitter() * limit

    def reset(self) -> None:
        """Start over: what failed has worked again."""
        self._failures = 0
