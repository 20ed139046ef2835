"""The maps for holding packets as the agent sees them: limits and heartbeat in, counters out."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.datapath import abi
from lazymesh.datapath.libbpf import Map, possible_cpus
from lazymesh.datapath.settingsmap import token_bucket

if TYPE_CHECKING:
    from pathlib import Path

COOKIE_BITS = 12
"""The bits of a mark that LM_HOLD_COOKIE_SHIFT leaves."""


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """How much may be parked; the kernel enforces it before anything is copied."""

    address_packets: int = 256
    address_bytes: int = 4 << 20
    interface_packets: int = 4_096
    interface_bytes: int = 8 << 20
    total_bytes: int = 16 << 20
    """For all parked packets together."""
    interface_rate: int = 2_000
    """Newly held addresses per second and interface: keeps a scanning pod from taking up the holder's time."""
    interface_burst: int = 1_024


class HoldControl:
    """struct lm_hold_control in this process's memory."""

    def __init__(self, pins: Path) -> None:
        control = Map.pinned(pins / "lm_hold_control")
        self._words = abi.HoldControl.from_buffer(mmap.mmap(control.fd, mmap.PAGESIZE))
        control.close()  # the mapping keeps it

    def beat(self, now_ns: int) -> None:
        """Show the kernel that the agent is alive."""
        self._words.agent_beat_ns = now_ns

    def holder_beat(self) -> int:
        """Return the time of the holder's last heartbeat, in ns of the monotonic clock."""
        return int(self._words.holder_beat_ns)

    def set_limits(self, limits: HoldLimits, limit_s: float) -> None:
        """Put limits in force, and the longest time that a packet may wait."""
        words = self._words
        words.limit_ns = int(limit_s * 1e9)
        for name in (
            "address_packets",
            "address_bytes",
            "interface_packets",
            "interface_bytes",
            "total_bytes",
        ):
            setattr(words, name, getattr(limits, name))
        interval, depth = token_bucket(limits.interface_rate, limits.interface_burst)
        words.interface_burst_ns = depth
        words.interface_interval_ns = interval


class HoldCounterMap:
    """What happened to parked packets: the kernel's counts and the holder's."""

    def __init__(self, pins: Path) -> None:
        self._kernel = Map.pinned(pins / "lm_hold_count")
        self._holder = Map.pinned(pins / "lm_holder_stats")
        self._total = Map.pinned(pins / "lm_hold_total")

    def kernel(self) -> dict[str, int]:
        """Return struct lm_hold_counters, summed over CPUs."""
        copies = (abi.HoldCounters * possible_cpus()).from_buffer_copy(self._kernel.lookup(bytes(4)) or b"")
        return {name: sum(getattr(copy, name) for copy in copies) for name, *_ in abi.HoldCounters._fields_}

    def outstanding(self) -> tuple[int, int]:
        """Return the number of packets that are parked or on their way back, and their bytes."""
        total = abi.Outstanding.from_buffer_copy(self._total.lookup(bytes(4)) or b"")
        return total.packets, total.bytes

    def holder(self) -> dict[str, int]:
        """Return struct lm_holder_stats."""
        stats = abi.HolderStats.from_buffer_copy(self._holder.lookup(bytes(4)) or b"")
        return {name: getattr(stats, name) for name, *_ in abi.HolderStats._fields_}

    def close(self) -> None:
        """Give the maps back."""
        for opened in (self._kernel, self._holder, self._total):
            opened.close()
