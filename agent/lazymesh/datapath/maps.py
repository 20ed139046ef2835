"""The maps in core terms: addresses, entries, CIDRs, identities instead of bytes.

Each class wraps one pinned map; what may be written where, and in which order, is decided in installer.py and by the
roles.
"""

from __future__ import annotations

import enum
import errno
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from lazymesh.core.audit import Window
from lazymesh.core.model import Address, Direction, Entry, Network
from lazymesh.datapath import abi
from lazymesh.datapath.libbpf import (
    BPF_ANY,
    BPF_F_NO_PREALLOC,
    BPF_NOEXIST,
    MAP_TYPE_ARRAY_OF_MAPS,
    MAP_TYPE_LPM_TRIE,
    Map,
    MapLayout,
    pin,
    possible_cpus,
    run_program,
)
from lazymesh.errors import DatapathError, MapFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_FULL = (errno.ENOSPC, errno.E2BIG, errno.ENOMEM)


def open_map(path: Path) -> Map:
    """Open a pin; DatapathError says what is missing."""
    try:
        return Map.pinned(path)
    except FileNotFoundError as exc:
        raise DatapathError(
            f"no map at {path}: start `lazymesh agent` first, or name its bpffs with --bpffs"
        ) from exc
    except OSError as exc:
        raise DatapathError(f"cannot open the map at {path}: {exc.strerror}") from exc


def make_map(name: str, layout: MapLayout, like: int = 0) -> Map:
    """Make a map that is not pinned yet; DatapathError. like: of a map of maps, one that it takes."""
    try:
        return Map.create(name, layout, like)
    except OSError as exc:
        raise DatapathError(f"cannot make the map {name}: {exc.strerror}") from exc


def open_or_make_map(path: Path, layout: MapLayout) -> Map:
    """Open the pin, or make a map of its name and pin it there."""
    if path.exists():
        return open_map(path)
    made = make_map(path.name, layout)
    pin_map(made, path)
    return made


def pin_map(made: Map, path: Path) -> None:
    """Pin a map, or close it and raise DatapathError."""
    try:
        pin(made.fd, path)
    except OSError as exc:
        made.close()
        raise DatapathError(f"cannot pin a map at {path}: {exc.strerror}") from exc


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
            if exc.errno in _FULL:
                raise MapFullError(f"the ipcache map is full ({self.max_entries} entries)") from exc
            raise DatapathError(f"cannot write to the ipcache map at {self._path}: {exc.strerror}") from exc
        return True


Line = tuple[bytes, Entry, int]
"""What the journal is to say of a new entry: key of the address, entry, cluster id."""


class Standing(Struct, frozen=True, gc=False):
    """What an ipcache says of an address."""

    entry: Entry
    tagged: bool
    """It carries our tag, so it is exactly this address' own, and ours."""


class Views:
    """Which ipcaches the programs look into: a packet is a miss to them when it is one to any of these."""

    def __init__(self, outer: Mapping[View, Map], config: ConfigMap) -> None:
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


class RecentMap:
    """The peers that this node talks to, as the programs note them."""

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map

    def newest_first(self) -> list[Address]:
        """Return their addresses, those of the latest epochs first."""
        return [abi.address_of_dedup_key(key) for _, key in sorted(self._read(), reverse=True)]

    def of_epoch(self, epoch: int) -> list[Address]:
        """Return those that were talked to in this epoch, or since."""
        return [abi.address_of_dedup_key(key) for at, key in self._read() if at >= epoch]

    def _read(self) -> list[tuple[int, bytes]]:
        return [(int.from_bytes(epoch, sys.byteorder), key) for key, epoch in self._map.items()]


def kernel_honours_noexist() -> bool:
    """Tell whether BPF_NOEXIST works on LPM tries here (kernels without eae6a075e953 ignore it): try it once."""
    probe = Map.create("lm_probe", MapLayout(MAP_TYPE_LPM_TRIE, 24, 24, 2, BPF_F_NO_PREALLOC))
    try:
        key = abi.pack_address_key(bytes(4))
        probe.update(key, bytes(24))
        probe.update(key, bytes(24), BPF_NOEXIST)
    except OSError as exc:
        return exc.errno == errno.EEXIST
    else:
        return False
    finally:
        probe.close()


class Journal:
    """The ownership journal: which ipcache entries are ours."""

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map
        self.size = bpf_map.layout.max_entries

    def items(self) -> Iterator[tuple[Address, abi.OwnedEntry]]:
        """Yield every line; keys that are no host addresses are none of ours and are passed over."""
        for key, value in self._map.items():
            address = abi.address_of_key(key)
            if address is not None:
                yield address, abi.unpack_owned(value)

    def read(self, address: Address) -> abi.OwnedEntry | None:
        """Return the line of one address."""
        raw = self._map.lookup(abi.pack_address_key(address))
        return None if raw is None else abi.unpack_owned(raw)

    def write(self, address: Address, owned: abi.OwnedEntry) -> None:
        """Add or replace a line; MapFullError when there is no room."""
        self._write([(abi.pack_address_key(address), abi.pack_owned(owned))])

    def write_many(self, lines: Iterable[Line]) -> None:
        """Add or replace the lines of new entries; MapFullError when there is no room."""
        self._write([(key, abi.pack_owned_new(entry, number)) for key, entry, number in lines])

    def _write(self, lines: list[tuple[bytes, bytes]]) -> None:
        try:
            self._map.update_many(lines)
        except OSError as exc:
            if exc.errno in _FULL:
                raise MapFullError("the ownership journal is full") from exc
            raise DatapathError(f"cannot write to the ownership journal: {exc.strerror}") from exc

    def remove(self, address: Address) -> None:
        """Strike a line out."""
        try:
            self._map.delete(abi.pack_address_key(address))
        except OSError as exc:
            raise DatapathError(f"cannot delete from the ownership journal: {exc.strerror}") from exc


class Writer:
    """Writes the journal and an ipcache of our own, by one call of the kernel for many addresses (install.h)."""

    def __init__(self, program: int) -> None:
        self.program = program

    def write(self, lines: Sequence[Line]) -> list[bool | None]:
        """Write line and entry of new addresses; tell of each whether it stands. If not, the journal may have the line.

        None: the kernel does not tell, as it gives an error for the whole run; some do so after it, too.
        """
        stand: list[bool | None] = []
        for at in range(0, len(lines), abi.INSTALL_MOST):
            part = lines[at : at + abi.INSTALL_MOST]
            try:
                verdict, packet = run_program(self.program, abi.pack_installs(part))
            except OSError:
                stand += [None] * len(part)
                continue
            stand += [verdict == 0 and error == 0 for error in abi.unpack_installed(packet)]
        return stand


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
        """Bring the map up to date by a difference: additions first, so that no address falls out in between."""
        try:
            self._map.update_many([(abi.pack_network_key(n), abi.pack_mesh_cidr(c)) for n, c in upserts])
            self._map.delete_many([abi.pack_network_key(network) for network in deletes])
        except OSError as exc:
            raise DatapathError(f"cannot write the mesh CIDRs: {exc.strerror}") from exc


class WindowMap:
    """What went through as world for addresses that had no entry."""

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map

    def take(self, address: Address) -> Window | None:
        """Close the window of an address: return what it let through and forget it."""
        key = abi.pack_dedup_key(address)
        raw = self._map.lookup(key)
        if raw is None:
            return None
        self._map.delete(key)
        return window_of((key, raw))

    def is_empty(self) -> bool:
        """Tell whether no window is open."""
        return self._map.is_empty()

    def elements(self) -> list[tuple[bytes, bytes]]:
        """Return the windows that are open, as window_of takes them: there may be thousands, and that takes longer."""
        return list(self._map.items())


def window_of(element: tuple[bytes, bytes]) -> Window:
    """Return what an element of the map says."""
    address, found = abi.address_of_dedup_key(element[0]), abi.Window.from_buffer_copy(element[1])
    direction = Direction(found.direction)
    return Window(address, direction, found.first_ns / 1e9, found.last_ns / 1e9, found.packets, found.bytes)


class PolicyMap:
    """Which identities may talk, by direction."""

    _ALLOW = (1).to_bytes(4, "little")

    def __init__(self, bpf_map: Map) -> None:
        self._map = bpf_map

    def items(self) -> set[tuple[Direction, int]]:
        """Return everything that is allowed."""
        keys = (abi.PolicyKey.from_buffer_copy(key) for key, _ in self._map.items())
        return {(Direction(key.direction), key.identity) for key in keys}

    def apply(self, allow: Iterable[tuple[Direction, int]], revoke: Iterable[tuple[Direction, int]]) -> None:
        """Bring the map up to date by a difference: what is taken away goes first."""
        try:
            self._map.delete_many([abi.pack_policy_key(*pair) for pair in revoke])
            self._map.update_many([(abi.pack_policy_key(*pair), self._ALLOW) for pair in allow])
        except OSError as exc:
            if exc.errno in _FULL:
                raise MapFullError("the policy map is full: select fewer identities") from exc
            raise DatapathError(f"cannot write the policy map: {exc.strerror}") from exc


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
    parked: int = 2
    """The verdict that ends the way of a parked packet: a drop (2), as all hooks know it."""
    remember: bool = True
    """The programs may take what the ipcache said for true until the clock's next tick."""


def bits_of(directions: Iterable[Direction]) -> int:
    """Return directions as ``lm_config.enforced`` has them."""
    return sum(1 << direction for direction in directions)


class ConfigMap:
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
        raw.parked, raw.muted, raw.hold_cookie = config.parked, 0, 0
        raw.generation = _next(raw.generation) if config.remember else 0
        for name in ("interface", "uplink", "global"):
            interval, depth = _bucket(getattr(config, f"{name}_rate"), getattr(config, f"{name}_burst"))
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


def _bucket(rate: int, burst: int) -> tuple[int, int]:
    """Return spacing and depth in ns; the depth leaves room for ``burst`` tokens at once."""
    interval = 1_000_000_000 // rate if rate else 0
    return interval, max(burst - 1, 0) * interval


@dataclass(frozen=True, slots=True)
class PacketCounters:
    """The packets of struct lm_counters of one direction, summed over CPUs; the C header says what each means."""

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
        """Sum the copies of all CPUs."""
        copies = self._copies(direction)
        names = [field.name for field in fields(PacketCounters)]
        return PacketCounters(**{name: sum(getattr(copy, name) for copy in copies) for name in names})

    def windows_opened(self) -> int:
        """Return how many windows were opened, in both directions, since this map was made."""
        return sum(copy.windows_opened for direction in Direction for copy in self._copies(direction))

    def _copies(self, direction: Direction) -> Iterable[abi.Counters]:
        raw = self._map.lookup(int(direction).to_bytes(4, "little")) or b""
        return (abi.Counters * possible_cpus()).from_buffer_copy(raw)
