"""The settings of the programs: struct lm_config, in units for people."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.datapath import abi

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazymesh.core.model import Direction
    from lazymesh.datapath.libbpf import Map


class OnMiss(enum.IntEnum):
    """What becomes of a missed packet."""

    PASS = 0
    """It goes on as world."""
    DROP = 1
    HOLD = 2
    """It waits with the holder until its address is answered."""


@dataclass(frozen=True, slots=True)
class DatapathConfig:
    """The settings of the programs, in units for people."""

    rearm_s: float = 1.0
    """How long an address stays silent after a signal; up to a quarter is added by chance."""
    interface_rate: int = 250
    """Signals per second and pod's interface; 0: no limit."""
    interface_burst: int = 1_000
    uplink_rate: int = 1_000
    """The same for each interface to the network."""
    uplink_burst: int = 2_000
    global_rate: int = 2_500
    """Signals per second from all interfaces together; 0: no limit."""
    global_burst: int = 4_000
    on_miss: OnMiss = OnMiss.PASS
    enforced: frozenset[Direction] = frozenset()
    """Directions in which mesh traffic is denied unless the policy map allows it."""
    policy_tag: int = 0
    """Which policy the policy map is filled for."""
    park_verdict: int = 2
    """The verdict that ends the way of a parked packet: a drop (2), as all hooks know it."""
    remember: bool = True
    """The programs may take what the ipcache said for true until the clock's next tick."""


def bits_of(directions: Iterable[Direction]) -> int:
    """Return directions as ``lm_config.enforced`` has them."""
    return sum(1 << direction for direction in directions)


def token_bucket(rate: int, burst: int) -> tuple[int, int]:
    """Return spacing and depth in ns; the depth leaves room for ``burst`` tokens at once."""
    interval = 1_000_000_000 // rate if rate else 0
    return interval, max(burst - 1, 0) * interval


class SettingsMap:
    """The one element of settings."""

    _SLOT = bytes(4)

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map
        self._intervals: dict[str, int] = {}

    def write(self, config: DatapathConfig) -> None:
        """Put new settings in force; lowers the mute flag, and admits all that they allow.

        Which maps are looked into stays as it is.
        """
        raw = self.read()
        raw.rearm_ns = int(config.rearm_s * 1e9)
        raw.on_miss, raw.policy_tag = config.on_miss, config.policy_tag
        raw.enforced = bits_of(config.enforced)
        raw.park_verdict, raw.muted, raw.hold_cookie = config.park_verdict, 0, 0
        raw.generation = _next(raw.generation) if config.remember else 0
        for name in ("interface", "uplink", "global"):
            interval, depth = token_bucket(getattr(config, f"{name}_rate"), getattr(config, f"{name}_burst"))
            setattr(raw, f"{name}_interval_ns", interval)
            setattr(raw, f"{name}_burst_ns", depth)
            self._intervals[f"{name}_interval_ns"] = interval
        self._map.update(self._SLOT, bytes(raw))

    def read(self) -> abi.Config:
        """Return the settings in force."""
        return abi.Config.from_buffer_copy(self._map.lookup(self._SLOT) or b"")

    def change(self, **words: int) -> None:
        """Change some words of struct lm_config and leave the others as they are."""
        raw = self.read()
        for name, value in words.items():
            setattr(raw, name, value)
        self._map.update(self._SLOT, bytes(raw))

    def set_view(self, slot: int, view: int) -> None:
        """Say how an element of the view maps is to be read; 0: not at all."""
        raw = self.read()
        raw.view[slot] = view
        self._map.update(self._SLOT, bytes(raw))

    def remember(self, on: bool) -> None:
        """Let the programs remember answers of the ipcache, or not any more."""
        self.change(generation=_next(self.read().generation) if on else 0)

    def void(self) -> None:
        """Have the programs forget what the ipcache has said: it may say something else now."""
        raw = self.read()
        if raw.generation:
            raw.generation = _next(raw.generation)
            self._map.update(self._SLOT, bytes(raw))

    def mute(self, on: bool) -> None:
        """Raise or lower the mute flag: while it is up the programs count misses and signal none."""
        self.change(muted=int(on))

    def admit(self, share: float) -> None:
        """Let this share of the rates that were written be signalled; of a burst, too, as the depth stays."""
        self.change(**{name: int(interval / share) for name, interval in self._intervals.items()})


def _next(generation: int) -> int:
    return generation % 0xFFFFFFFF + 1
