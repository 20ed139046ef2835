"""The ipcache maps, our own and Cilium's: their layouts, their entries, and which of them our programs look into."""

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


class View(enum.IntEnum):
    """enum lm_view: what the kernel takes for one kind of map in a map of maps; the words are for people."""

    V1 = 1
    """Cilium up to 1.17."""
    V2 = 2
    """1.18, and our own."""
    V2_READONLY = 3
    """1.19 and later: programs may not write."""

    @property
    def words(self) -> str:
        """What people call it."""
        return self.name.lower().replace("_", "-")


_VIEWS = {(12, 1): View.V1, (24, 1): View.V2, (24, 129): View.V2_READONLY}
"""By value size and flags (cilium-formats 1.1, cilium-live 3.1)."""

_VIEW_LAYOUT = MapLayout(MAP_TYPE_ARRAY_OF_MAPS, 4, 4, len(abi.Config().view), 0)


def view_of(layout: MapLayout) -> View | None:
    """Return which ipcache a map is by its layout, None for what is none that we know."""
    if (layout.kind, layout.key_size) != (MAP_TYPE_LPM_TRIE, 24):
        return None
    return _VIEWS.get((layout.value_size, layout.flags))


def layout_of(view: View) -> MapLayout:
    """Return the layout of the smallest ipcache of a kind."""
    value_size, flags = next(layout for layout, kind in _VIEWS.items() if kind is view)
    return MapLayout(MAP_TYPE_LPM_TRIE, 24, value_size, 1, flags)


def make_view(view: View, name: str) -> Map:
    """Make a map of maps for ipcaches of a kind.

    The maps that it takes are like one made here, without BTF, as neither ours nor those of Cilium's agent have any:
    from 5.15 to 6.1 the kernel takes no map without BTF for one with it, and BCC would give it some.
    """
    like = make_map("lm_like", layout_of(view))
    try:
        return make_map(name, _VIEW_LAYOUT, like.fd)
    finally:
        like.close()


class Standing(Struct, frozen=True, gc=False):
    """What an ipcache says of an address."""

    entry: Entry
    tagged: bool
    """It carries our tag, so it is exactly this address' own, and ours."""


class IpcacheMap:
    """An ipcache map of Cilium's layout, v1 or v2.

    tag: written into the values' padding, which every reader passes over, by those who share the map with Cilium. What
    carries it is ours, and still what we wrote: Cilium's writer leaves zero there. 0: no tag, the map is our own.
    """

    def __init__(self, bpf_map: Map, path: Path, tag: int = 0, *, read_only: bool = False) -> None:
        self._map = bpf_map
        self._path = path
        self._tag = tag
        self._packed_last: Entry | None = None
        self._packed = b""
        self.on_change: Callable[[], None] = lambda: None
        """Told after an entry was replaced or removed."""
        view = view_of(bpf_map.layout)
        if view is None and read_only:
            # Flags say who may write: entries can be read whatever they are.
            view = view_of(replace(bpf_map.layout, flags=BPF_F_NO_PREALLOC))
        if view is None:
            bpf_map.close()
            raise DatapathError(
                f"{path} is no ipcache that lazymesh knows ({bpf_map.layout}): expected an LPM trie with 24-byte keys,"
                " and 24-byte (Cilium >= 1.18, flags 0x1 or 0x81) or 12-byte (<= 1.17, flags 0x1) values"
            )
        self.view = view
        self.max_entries = bpf_map.layout.max_entries
        self.map_id = bpf_map.map_id

    @classmethod
    def pinned(cls, path: Path, tag: int = 0, *, read_only: bool = False) -> IpcacheMap:
        """Open the pinned map and check its layout; read_only: of whatever flags."""
        return cls(open_map(path), path, tag, read_only=read_only)

    @classmethod
    def by_id(cls, map_id: int, tag: int = 0) -> IpcacheMap:
        """Open a map that has no pin, or may have lost it; FileNotFoundError when it is gone."""
        return cls(Map.by_id(map_id), Path(f"map {map_id}"), tag)

    @property
    def fd(self) -> int:
        """The map's file descriptor."""
        return self._map.fd

    def close(self) -> None:
        """Give the file descriptor back."""
        self._map.close()

    def lookup(self, address: Address) -> Entry | None:
        """Return the datapath's own answer for an address: the longest prefix that covers it."""
        raw = self._map.lookup(abi.pack_address_key(address))
        return None if raw is None else abi.unpack_entry(raw)

    def stands(self, address: Address) -> Standing | None:
        """Return the same answer, and whether it is tagged."""
        raw = self._map.lookup(abi.pack_address_key(address))
        return None if raw is None else self._standing(raw)

    def as_read_back(self, entry: Entry) -> Entry:
        """Return what a lookup would say of an entry: v1 has no bits for tunnels, and only IPv4 endpoints."""
        return abi.unpack_entry(self._pack(entry))

    def items(self) -> Iterator[tuple[Network, int, Standing]]:
        """Yield prefix, cluster id and what stands there, for everything in the map."""
        for key, value in self._map.items():
            yield *abi.unpack_key(key), self._standing(value)

    def tagged(self) -> Iterator[Address]:
        """Yield the addresses whose entries carry our tag: a look at everything in the map."""
        for key, value in self._map.items():
            if abi.tag_of_entry(value) == self._tag and (address := abi.address_of_key(key)) is not None:
                yield address

    def count(self) -> int | None:
        """Return how many entries there are: LPM tries keep no account, so this walks over all of them.

        Too many if some went meanwhile; None if so many cannot be.
        """
        return self._map.count()

    def insert(self, address: Address, entry: Entry) -> bool:
        """Add the /32 or /128 unless that exact prefix exists; True when it was added."""
        return self._update(abi.pack_address_key(address), entry, BPF_NOEXIST)

    def insert_many(self, lines: Iterable[Line]) -> list[bool]:
        """Do the same for several that the journal has; False, too, for one that the kernel refuses."""
        pack = self._pack
        return self._map.insert_many([(key, pack(entry)) for key, entry, _ in lines])

    def replace(self, address: Address, entry: Entry) -> None:
        """Write the /32 or /128, whatever stands there."""
        self._update(abi.pack_address_key(address), entry, BPF_ANY)
        self.on_change()

    def delete(self, address: Address) -> bool:
        """Remove the /32 or /128; False when it was not there."""
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
        # Pods of one node come together, and with one and the same entry.
        if entry is not self._packed_last:
            pack = abi.pack_entry_v1 if self.view is View.V1 else abi.pack_entry
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


class Views:
    """Which ipcaches the programs look into: a packet is a miss to them when it is one to any of these."""

    def __init__(self, outer: Mapping[View, Map], config: SettingsMap) -> None:
        self._outer = outer
        self._config = config
        self._shown: list[View] = []
        self.most = len(abi.Config().view)

    def show(self, ipcaches: Sequence[IpcacheMap]) -> None:
        """Put maps in force, the one that is written to first; programs see all old or all new ones meanwhile, or both.

        From the last to the first: a map that moves up is in its new place before its old one is taken. DatapathError
        when the kernel refuses one; then to be repeated.
        """
        try:
            self._show(ipcaches)
        except OSError as exc:
            raise DatapathError(
                f"cannot show the ipcache to our programs: {exc.strerror}"
                " (kernels 5.15 to 6.1 allow that for maps without BTF only)"
            ) from exc

    def _show(self, ipcaches: Sequence[IpcacheMap]) -> None:
        for slot in reversed(range(len(ipcaches))):
            index = slot.to_bytes(4, sys.byteorder)
            self._outer[ipcaches[slot].view].update(index, ipcaches[slot].fd.to_bytes(4, sys.byteorder))
            self._config.set_view(slot, ipcaches[slot].view)
        for slot in range(len(ipcaches), self.most):  # an earlier life may have shown more
            self._config.set_view(slot, 0)
        for slot, view in enumerate(self._shown):
            if slot >= len(ipcaches) or ipcaches[slot].view is not view:
                self._outer[view].delete(slot.to_bytes(4, sys.byteorder))
        self._shown = [ipcache.view for ipcache in ipcaches]
        self._config.void()
        for ipcache in ipcaches:
            ipcache.on_change = self._config.void
