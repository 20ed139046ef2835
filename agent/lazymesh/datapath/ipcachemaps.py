"""Ipcache maps, ours and Cilium's: their layouts, their entries, and which of them our programs look into."""

from __future__ import annotations

import enum
import errno
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from lazymesh.datapath import abi
from lazymesh.datapath.libbpf import (
    BPF_ANY,
    BPF_F_NO_PREALLOC,
    BPF_NOEXIST,
    MAP_TYPE_ARRAY_OF_MAPS,
    MAP_TYPE_LPM_TRIE,
    Map,
    MapLayout,
)
from lazymesh.datapath.maps import NO_ROOM, make_map, open_map
from lazymesh.errors import DatapathError, MapFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from lazymesh.core.model import Address, Entry, Network
    from lazymesh.datapath.journal import Line
    from lazymesh.datapath.settingsmap import SettingsMap


class IpcacheLayout(enum.IntEnum):
    """enum lm_view: the layouts that the kernel distinguishes in a map of maps."""

    V1 = 1
    """Cilium up to 1.17."""
    V2 = 2
    """Cilium 1.18, and our own map."""
    V2_READONLY = 3
    """Cilium 1.19 and later: programs may not write."""

    @property
    def words(self) -> str:
        """The name shown to people."""
        return self.name.lower().replace("_", "-")


_LAYOUTS = {(12, 1): IpcacheLayout.V1, (24, 1): IpcacheLayout.V2, (24, 129): IpcacheLayout.V2_READONLY}
"""By value size and flags (cilium-formats 1.1, cilium-live 3.1)."""

_SLOTS = len(abi.Config().view)
"""LM_VIEWS: how many ipcaches the programs can look into."""
_OUTER_LAYOUT = MapLayout(MAP_TYPE_ARRAY_OF_MAPS, 4, 4, _SLOTS, 0)


def ipcache_layout_of(layout: MapLayout) -> IpcacheLayout | None:
    """Return which kind of ipcache a map is, None if its layout is unknown."""
    if (layout.kind, layout.key_size) != (MAP_TYPE_LPM_TRIE, 24):
        return None
    return _LAYOUTS.get((layout.value_size, layout.flags))


def map_layout_of(layout: IpcacheLayout) -> MapLayout:
    """Return the map layout of the smallest ipcache of a kind."""
    value_size, flags = next(known for known, kind in _LAYOUTS.items() if kind is layout)
    return MapLayout(MAP_TYPE_LPM_TRIE, 24, value_size, 1, flags)


def make_outer_map(layout: IpcacheLayout, name: str) -> Map:
    """Make a map of maps for ipcaches of a kind.

    Its template is made here, without BTF, because neither our maps nor those of Cilium's agent have any: kernels 5.15
    to 6.1 refuse a map without BTF where the template has it, and BCC would give it some.
    """
    like = make_map("lm_like", map_layout_of(layout))
    try:
        return make_map(name, _OUTER_LAYOUT, like.fd)
    finally:
        like.close()


class Standing(Struct, frozen=True, gc=False):
    """What an ipcache says of an address."""

    entry: Entry
    tagged: bool
    """It carries our tag, so it is ours and for exactly this address."""


class IpcacheMap:
    """An ipcache map of Cilium's layout, v1 or v2.

    tag: written into the values' padding, which every reader ignores, when the map is shared with Cilium. An entry that
    carries it is ours, and still as we wrote it: Cilium writes zero there. 0: no tag, the map is our own.
    """

    def __init__(self, bpf_map: Map, path: Path, tag: int = 0, *, read_only: bool = False) -> None:
        self._map = bpf_map
        self._path = path
        self._tag = tag
        self._packed_last: Entry | None = None
        self._packed = b""
        self.on_change: Callable[[], None] = lambda: None
        """Called after an entry was replaced or removed."""
        layout = ipcache_layout_of(bpf_map.layout)
        if layout is None and read_only:
            # Flags only say who may write: entries can be read whatever they are.
            layout = ipcache_layout_of(replace(bpf_map.layout, flags=BPF_F_NO_PREALLOC))
        if layout is None:
            bpf_map.close()
            raise DatapathError(
                f"{path} is not an ipcache of a known layout ({bpf_map.layout}): expected an LPM trie with 24-byte"
                " keys, and 24-byte (Cilium >= 1.18, flags 0x1 or 0x81) or 12-byte (<= 1.17, flags 0x1) values"
            )
        self.layout = layout
        self.max_entries = bpf_map.layout.max_entries
        self.map_id = bpf_map.map_id

    @classmethod
    def pinned(cls, path: Path, tag: int = 0, *, read_only: bool = False) -> IpcacheMap:
        """Open the pinned map and check its layout; read_only: whatever its flags."""
        return cls(open_map(path), path, tag, read_only=read_only)

    @classmethod
    def by_id(cls, map_id: int, tag: int = 0) -> IpcacheMap:
        """Open a map whose pin may be gone; FileNotFoundError when the map itself is."""
        return cls(Map.by_id(map_id), Path(f"map {map_id}"), tag)

    @property
    def fd(self) -> int:
        """The map's file descriptor."""
        return self._map.fd

    def close(self) -> None:
        """Close the file descriptor."""
        self._map.close()

    def lookup(self, address: Address) -> Entry | None:
        """Return what the programs would find for an address: the longest prefix that covers it."""
        raw = self._map.lookup(abi.pack_address_key(address))
        return None if raw is None else abi.unpack_entry(raw)

    def stands(self, address: Address) -> Standing | None:
        """Return the same, and whether it is tagged."""
        raw = self._map.lookup(abi.pack_address_key(address))
        return None if raw is None else self._standing(raw)

    def as_read_back(self, entry: Entry) -> Entry:
        """Return an entry as a lookup would return it: v1 has no tunnel bits, and only IPv4 endpoints."""
        return abi.unpack_entry(self._pack(entry))

    def items(self) -> Iterator[tuple[Network, int, Standing]]:
        """Yield prefix, cluster id and entry of everything in the map."""
        for key, value in self._map.items():
            yield *abi.unpack_key(key), self._standing(value)

    def tagged(self) -> Iterator[Address]:
        """Yield the addresses whose entries carry our tag; reads the whole map."""
        for key, value in self._map.items():
            if abi.tag_of_entry(value) == self._tag and (address := abi.address_of_key(key)) is not None:
                yield address

    def count(self) -> int | None:
        """Return how many entries there are. LPM tries keep no count, so this walks over all of them.

        Too high if some were removed meanwhile; None if it is more than the map can hold.
        """
        return self._map.count()

    def insert(self, address: Address, entry: Entry) -> bool:
        """Add the /32 or /128 unless that exact prefix exists; True when it was added."""
        return self._update(abi.pack_address_key(address), entry, BPF_NOEXIST)

    def insert_many(self, lines: Iterable[Line]) -> list[bool]:
        """Add several that are in the journal already; False also for one that the kernel refuses."""
        packed: list[tuple[bytes, bytes]] = []
        for key, entry, _ in lines:
            packed.append((key, self._pack(entry)))
        return self._map.insert_many(packed)

    def replace(self, address: Address, entry: Entry) -> None:
        """Write the /32 or /128, whatever is there."""
        self._update(abi.pack_address_key(address), entry, BPF_ANY)
        self.on_change()

    def delete(self, address: Address) -> bool:
        """Remove the /32 or /128; False if it was not there."""
        try:
            deleted = self._map.delete(abi.pack_address_key(address))
        except OSError as exc:
            raise DatapathError(
                f"cannot delete from the ipcache map at {self._path}: {exc.strerror}"
            ) from exc
        self.on_change()
        return deleted

    def _standing(self, raw: bytes) -> Standing:
        return Standing(abi.unpack_entry(raw), self._tag != 0 and abi.tag_of_entry(raw) == self._tag)

    def _pack(self, entry: Entry) -> bytes:
        # Pods of one node come together, with the very same entry.
        if entry is not self._packed_last:
            pack = abi.pack_entry_v1 if self.layout is IpcacheLayout.V1 else abi.pack_entry
            self._packed, self._packed_last = pack(entry, self._tag), entry
        return self._packed

    def _update(self, key: bytes, entry: Entry, flags: int) -> bool:
        try:
            self._map.update(key, self._pack(entry), flags)
        except OSError as exc:
            if exc.errno == errno.EEXIST:
                return False
            if exc.errno in NO_ROOM:
                raise MapFullError(f"the ipcache map is full ({self.max_entries} entries)") from exc
            raise DatapathError(f"cannot write to the ipcache map at {self._path}: {exc.strerror}") from exc
        return True


class VisibleIpcaches:
    """The ipcaches that the programs look into: a packet that misses in any of them is a miss."""

    def __init__(self, outer: Mapping[IpcacheLayout, Map], config: SettingsMap) -> None:
        self._outer = outer
        self._config = config
        self._shown: list[IpcacheLayout] = []

    def show(self, ipcaches: Sequence[IpcacheMap]) -> None:
        """Put maps in force, first the one that is written; meanwhile programs see the old maps, the new, or both.

        From the last to the first, so that a map that moves up is in its new place before it loses the old one.
        DatapathError when the kernel refuses one; call this again then. The kernel takes its time, so the agent calls
        this in a thread.
        """
        try:
            self._show(ipcaches)
        except OSError as exc:
            raise DatapathError(
                f"cannot show the ipcache to our programs: {exc.strerror}"
                " (kernels 5.15 to 6.1 accept only maps without BTF)"
            ) from exc

    def _show(self, ipcaches: Sequence[IpcacheMap]) -> None:
        for ipcache in ipcaches:
            ipcache.on_change = self._config.void
        for slot in reversed(range(len(ipcaches))):
            index = slot.to_bytes(4, sys.byteorder)
            self._outer[ipcaches[slot].layout].update(index, ipcaches[slot].fd.to_bytes(4, sys.byteorder))
            self._config.set_view(slot, ipcaches[slot].layout)
        for slot in range(len(ipcaches), _SLOTS):  # an earlier life may have shown more
            self._config.set_view(slot, 0)
        for slot, layout in enumerate(self._shown):
            if slot >= len(ipcaches) or ipcaches[slot].layout is not layout:
                self._outer[layout].delete(slot.to_bytes(4, sys.byteorder))
        self._shown = [ipcache.layout for ipcache in ipcaches]
        self._config.void()
