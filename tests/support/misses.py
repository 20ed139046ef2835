"""All that a signal says: the agent needs a part of it, and reads no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lazymesh.core.model import Direction
from lazymesh.datapath import abi

if TYPE_CHECKING:
    from lazymesh.core.model import Address


class Signal(NamedTuple):
    """One struct ipcache_miss."""

    address: Address
    direction: Direction
    cluster_id: int
    ifindex: int
    ktime_ns: int


def signal_of(record: bytes) -> Signal | None:
    """Return what a perf record says, None if the agent takes it for no signal."""
    read = abi.unpack_signals([record])
    if not read.addresses:
        return None
    mirror = abi.IpcacheMiss.from_buffer_copy(record)
    (address,), (ktime_ns,) = read.addresses, read.ktimes_ns
    assert (read.inward, ktime_ns) == (mirror.direction, mirror.ktime_ns)
    assert bytes(mirror.addr).startswith(address)
    return Signal(address, Direction(mirror.direction), mirror.cluster_id, mirror.ifindex, ktime_ns)
