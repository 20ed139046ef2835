"""The maps in core terms: addresses, CIDRs, identities and counters instead of bytes.

Each class wraps one pinned map; what may be written where, and in which order, is decided by installer.py and the
roles. Ipcaches, journal and settings have their own modules.
"""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from lazymesh.core.audit import Window
from lazymesh.core.model import Address, Direction, Network
from lazymesh.datapath import abi
from lazymesh.datapath.libbpf import Map, MapLayout, pin, possible_cpus
from lazymesh.errors import DatapathError, MapFullError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.E2BIG, errno.ENOMEM)
"""How the kernel says that a map is full."""


def open_map(path: Path) -> Map:
    """Open a pinned map; DatapathError says what is missing."""
    try:
        return Map.pinned(path)
    except FileNotFoundError as exc:
        raise DatapathError(
            f"no map at {path}: start `lazymesh agent` first, or name its bpffs with --bpffs"
        ) from exc
    except OSError as exc:
        raise DatapathError(f"cannot open the map at {path}: {exc.strerror}") from exc


def make_map(name: str, layout: MapLayout, like: int = 0) -> Map:
    """Make a map without a pin; DatapathError. like: for a map of maps, a template of what it holds."""
    try:
        return Map.create(name, layout, like)
    except OSError as exc:
        raise DatapathError(f"cannot make the map {name}: {exc.strerror}") from exc


def open_or_make_map(path: Path, layout: MapLayout) -> Map:
    """Open the pinned map, or make one of that name and pin it."""
    if path.exists():
        return open_map(path)
    made = make_map(path.name, layout)
    pin_map(made, path)
    return made


def pin_map(made: Map, path: Path) -> None:
    """Pin a map; close it and raise DatapathError if that fails."""
    try:
        pin(made.fd, path)
    except OSError as exc:
        made.close()
        raise DatapathError(f"cannot pin a map at {path}: {exc.strerror}") from exc


class RecentMap:
    """The peers that this node talks to, as noted by the programs."""

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map

    def newest_first(self) -> list[Address]:
        """Return their addresses, the latest epochs first."""
        return [abi.address_of_dedup_key(key) for _, key in sorted(self._read(), reverse=True)]

    def of_epoch(self, epoch: int) -> list[Address]:
        """Return those last noted in this epoch or later."""
        return [abi.address_of_dedup_key(key) for at, key in self._read() if at >= epoch]

    def _read(self) -> list[tuple[int, bytes]]:
        return [(int.from_bytes(epoch, sys.byteorder), key) for key, epoch in self._map.items()]


class MeshCidrs:
    """The pod CIDRs of the mesh, as the programs see them."""

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map

    def items(self) -> dict[Network, int]:
        """Return what is in force: CIDR to cluster id."""
        return {
            abi.unpack_key(key)[0]: abi.MeshCidr.from_buffer_copy(v).cluster_id
            for key, v in self._map.items()
        }

    def apply(self, upserts: Iterable[tuple[Network, int]], deletes: Iterable[Network]) -> None:
        """Apply a difference: additions first, so that no address is missing in between."""
        try:
            self._map.update_many([(abi.pack_network_key(n), abi.pack_mesh_cidr(c)) for n, c in upserts])
            self._map.delete_many([abi.pack_network_key(network) for network in deletes])
        except OSError as exc:
            raise DatapathError(f"cannot write the mesh CIDRs: {exc.strerror}") from exc


class WindowMap:
    """What passed as world for addresses without an entry."""

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map

    def take(self, address: Address) -> Window | None:
        """Close the window of an address: remove it and return what passed."""
        key = abi.pack_dedup_key(address)
        raw = self._map.lookup(key)
        if raw is None:
            return None
        self._map.delete(key)
        return window_of((key, raw))

    def is_empty(self) -> bool:
        """Return whether no window is open."""
        return self._map.is_empty()

    def elements(self) -> list[tuple[bytes, bytes]]:
        """Return the open windows, for window_of: decoding takes longer than reading, and there may be thousands."""
        return list(self._map.items())


def window_of(element: tuple[bytes, bytes]) -> Window:
    """Decode an element of the map."""
    address, found = abi.address_of_dedup_key(element[0]), abi.Window.from_buffer_copy(element[1])
    direction = Direction(found.direction)
    return Window(address, direction, found.first_ns / 1e9, found.last_ns / 1e9, found.packets, found.bytes)


class PolicyMap:
    """Which identities are allowed, by direction."""

    _ALLOW = (1).to_bytes(4, "little")

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map

    def items(self) -> set[tuple[Direction, int]]:
        """Return everything that is allowed."""
        keys = (abi.PolicyKey.from_buffer_copy(key) for key, _ in self._map.items())
        return {(Direction(key.direction), key.identity) for key in keys}

    def apply(self, allow: Iterable[tuple[Direction, int]], revoke: Iterable[tuple[Direction, int]]) -> None:
        """Apply a difference: revocations first."""
        try:
            self._map.delete_many([abi.pack_policy_key(*pair) for pair in revoke])
            self._map.update_many([(abi.pack_policy_key(*pair), self._ALLOW) for pair in allow])
        except OSError as exc:
            if exc.errno in NO_ROOM:
                raise MapFullError("the policy map is full: select fewer identities") from exc
            raise DatapathError(f"cannot write the policy map: {exc.strerror}") from exc


@dataclass(frozen=True, slots=True)
class PacketCounters:
    """The packet counts in struct lm_counters, of one direction and all CPUs; the C header says what each means."""

    hit: int
    not_mesh: int
    not_parsed: int
    missed: int
    signalled: int
    suppressed_dedup: int
    suppressed_rate: int
    muted: int
    lost: int
    missed_drop: int
    missed_again: int
    policy_allow: int
    policy_reply: int
    policy_fragment: int
    policy_deny: int


class CounterMap:
    """The packet counters."""

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map

    def read(self, direction: Direction) -> PacketCounters:
        """Return the sum of all CPUs' copies."""
        copies = self._copies(direction)
        names = [field.name for field in fields(PacketCounters)]
        return PacketCounters(**{name: sum(getattr(copy, name) for copy in copies) for name in names})

    def windows_opened(self) -> int:
        """Return how many windows were opened, in both directions, since the map was made."""
        return sum(copy.windows_opened for direction in Direction for copy in self._copies(direction))

    def _copies(self, direction: Direction) -> Iterable[abi.Counters]:
        raw = self._map.lookup(int(direction).to_bytes(4, "little")) or b""
        return (abi.Counters * possible_cpus()).from_buffer_copy(raw)
