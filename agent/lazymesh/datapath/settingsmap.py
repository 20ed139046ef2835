"""The settings of the programs: struct lm_config, in human units."""

from __future__ import annotations

import contextlib
import enum
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.datapath import abi

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lazymesh.core.model import Direction
    from lazymesh.datapath.libbpf import Map


class OnMiss(enum.IntEnum):
    """What happens to a missed packet."""

    PASS = 0
    """It passes as world."""
    DROP = 1
    HOLD = 2
    """It waits with the holder until its address is answered."""


@dataclass(frozen=True, slots=True)
class DatapathConfig:
    """The settings of the programs, in human units."""

    rearm_s: float = 1.0
    """How long an address stays silent after a signal; up to a quarter is added at random."""
    interface_rate: int = 250
    """Signals per second from each pod's interface; 0: no limit."""
    interface_burst: int = 1_000
    uplink_rate: int = 1_000
    """The same for each uplink."""
    uplink_burst: int = 2_000
    global_rate: int = 2_500
    """Signals per second from all interfaces together; 0: no limit."""
    global_burst: int = 4_000
    on_miss: OnMiss = OnMiss.PASS
    enforced: frozenset[Direction] = frozenset()
    """Directions in which mesh traffic is denied unless the policy map allows it."""
    policy_tag: int = 0
    """Identifies the policy that the policy map was filled for."""
    park_verdict: int = 2
    """The verdict for a packet whose clone was parked: a drop (2), which every hook understands."""
    remember: bool = True
    """The programs may reuse what the ipcache said until the next clock tick."""


def bits_of(directions: Iterable[Direction]) -> int:
    """Return directions as the bits of ``lm_config.enforced``."""
    return sum(1 << direction for direction in directions)


def token_bucket(rate: int, burst: int) -> tuple[int, int]:
    """Return a token bucket's spacing and depth in ns; the depth allows ``burst`` tokens at once."""
    interval = 1_000_000_000 // rate if rate else 0
    return interval, max(burst - 1, 0) * interval


class SettingsMap:
    """The map of settings, which has one element. Threads may share it."""

    _SLOT = bytes(4)

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map
        self._intervals: dict[str, int] = {}
        self._lock = threading.RLock()
        """Held from reading to writing: another thread's change in between would be lost."""

    def write(self, config: DatapathConfig) -> None:
        """Put new settings in force; unmutes, and admits the full rates.

        Leaves alone which maps are looked into.
        """
        with self._changing() as raw:
            raw.rearm_ns = int(config.rearm_s * 1e9)
            raw.on_miss, raw.policy_tag = config.on_miss, config.policy_tag
            raw.enforced = bits_of(config.enforced)
            raw.park_verdict, raw.muted, raw.hold_cookie = config.park_verdict, 0, 0
            raw.generation = _next(raw.generation) if config.remember else 0
            for name in ("interface", "uplink", "global"):
                rate, burst = getattr(config, f"{name}_rate"), getattr(config, f"{name}_burst")
                interval, depth = token_bucket(rate, burst)
                setattr(raw, f"{name}_interval_ns", interval)
                setattr(raw, f"{name}_burst_ns", depth)
                self._intervals[f"{name}_interval_ns"] = interval

    def read(self) -> abi.Config:
        """Return the settings in force."""
        with self._lock:
            return abi.Config.from_buffer_copy(self._map.lookup(self._SLOT) or b"")

    @contextlib.contextmanager
    def _changing(self) -> Iterator[abi.Config]:
        with self._lock:
            raw = self.read()
            yield raw
            self._map.update(self._SLOT, bytes(raw))

    def change(self, **words: int) -> None:
        """Change some members of struct lm_config."""
        with self._changing() as raw:
            for name, value in words.items():
                setattr(raw, name, value)

    def set_view(self, slot: int, view: int) -> None:
        """Set how a slot of the view maps must be read; 0: not at all."""
        with self._changing() as raw:
            raw.view[slot] = view

    def remember(self, on: bool) -> None:
        """Let the programs remember the ipcache's answers, or stop that."""
        with self._changing() as raw:
            raw.generation = _next(raw.generation) if on else 0

    def void(self) -> None:
        """Make the programs forget the ipcache's answers, which may have changed."""
        with self._lock:  # each replaced or removed entry comes here, most of them with nothing to forget
            raw = self.read()
            if raw.generation:
                raw.generation = _next(raw.generation)
                self._map.update(self._SLOT, bytes(raw))

    def mute(self, on: bool) -> None:
        """Set or clear the mute flag: while it is set the programs count misses but signal none."""
        self.change(muted=int(on))

    def admit(self, share: float) -> None:
        """Admit this share of the written rates; of a burst, too, as the depth stays the same."""
        self.change(**{name: int(interval / share) for name, interval in self._intervals.items()})


def _next(generation: int) -> int:
    return generation % 0xFFFFFFFF + 1
