"""The Python mirror of bpf/include/*_abi.h, and the functions that convert its structs to core values and back.

Written by hand; tests/datapath/test_abi_layout.py compares every field and offset with the C side's BTF, and the
compiler compares the sizes with the compiled maps before anything is loaded. Multi-byte numbers are native endian;
members named *addr*, *endpoint*, *local*, *peer* and *port* hold network-order bytes.
"""

from __future__ import annotations

import ctypes
import ipaddress
import struct
from ctypes import c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from functools import lru_cache
from typing import TYPE_CHECKING

from msgspec import Struct

from lazymesh.core.model import Address, Direction, Entry, EntryFlag, Network

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SIGNAL_IPCACHE_MISS = 3
FAMILY_IPV4, FAMILY_IPV6 = 1, 2


class IpcacheKey(ctypes.Structure):
    """struct ipcache_key."""

    _fields_ = (
        ("prefixlen", c_uint32),
        ("cluster_id", c_uint16),
        ("pad1", c_uint8),
        ("family", c_uint8),
        ("addr", c_uint8 * 16),
    )


class IpcacheEntry(ctypes.Structure):
    """struct ipcache_entry: Cilium's value since 1.18."""

    _fields_ = (
        ("sec_identity", c_uint32),
        ("tunnel_endpoint", c_uint8 * 16),
        ("pad", c_uint16),
        ("encrypt_key", c_uint8),
        ("flags", c_uint8),
    )


class IpcacheEntryV1(ctypes.Structure):
    """struct ipcache_entry_v1: Cilium's value up to 1.17."""

    _fields_ = (
        ("sec_identity", c_uint32),
        ("tunnel_endpoint", c_uint8 * 4),
        ("pad", c_uint16),
        ("encrypt_key", c_uint8),
        ("flags", c_uint8),
    )


class IpcacheMiss(ctypes.Structure):
    """struct ipcache_miss: one signal."""

    _fields_ = (
        ("signal", c_uint32),
        ("family", c_uint8),
        ("direction", c_uint8),
        ("cluster_id", c_uint16),
        ("ifindex", c_uint32),
        ("addr", c_uint8 * 16),
        ("pad", c_uint32),
        ("ktime_ns", c_uint64),
    )


class Config(ctypes.Structure):
    """struct lm_config."""

    _fields_ = (
        ("rearm_ns", c_uint64),
        ("interface_interval_ns", c_uint64),
        ("interface_burst_ns", c_uint64),
        ("uplink_interval_ns", c_uint64),
        ("uplink_burst_ns", c_uint64),
        ("global_interval_ns", c_uint64),
        ("global_burst_ns", c_uint64),
        ("muted", c_uint32),
        ("on_miss", c_uint32),
        ("enforced", c_uint32),
        ("hold_cookie", c_uint32),
        ("park_verdict", c_uint32),
        ("view", c_uint32 * 3),
        ("epoch", c_uint32),
        ("generation", c_uint32),
        ("policy_tag", c_uint64),
    )


class Counters(ctypes.Structure):
    """struct lm_counters."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            "hit",
            "not_mesh",
            "not_parsed",
            "missed",
            "signalled",
            "suppressed_dedup",
            "suppressed_rate",
            "muted",
            "lost",
            "missed_drop",
            "missed_again",
            "policy_allow",
            "policy_reply",
            "policy_fragment",
            "policy_deny",
            "windows_opened",
        )
    )


class MeshCidr(ctypes.Structure):
    """struct lm_mesh_cidr."""

    _fields_ = (("cluster_id", c_uint16), ("pad", c_uint16))


class DedupKey(ctypes.Structure):
    """struct lm_dedup_key."""

    _fields_ = (("addr", c_uint8 * 16), ("family", c_uint32))


class Window(ctypes.Structure):
    """struct lm_window: what passed as world."""

    _fields_ = (
        ("first_ns", c_uint64),
        ("last_ns", c_uint64),
        ("packets", c_uint64),
        ("bytes", c_uint64),
        ("direction", c_uint32),
        ("pad", c_uint32),
    )


class PolicyKey(ctypes.Structure):
    """struct lm_policy_key."""

    _fields_ = (("identity", c_uint32), ("direction", c_uint32))


class FlowKey(ctypes.Structure):
    """struct lm_flow_key."""

    _fields_ = (
        ("local", c_uint8 * 16),
        ("peer", c_uint8 * 16),
        ("local_port", c_uint16),
        ("peer_port", c_uint16),
        ("family", c_uint8),
        ("protocol", c_uint8),
        ("initiator", c_uint8),
        ("pad", c_uint8),
    )


class Flow(ctypes.Structure):
    """struct lm_flow."""

    _fields_ = (("seen_ns", c_uint64), ("closing", c_uint32), ("pad", c_uint32))


class Owned(ctypes.Structure):
    """struct lm_owned: a line of the ownership journal."""

    _fields_ = (
        ("entry", IpcacheEntry),
        ("previous", IpcacheEntry),
        ("cluster_id", c_uint16),
        ("pad1", c_uint16),
        ("pad2", c_uint32),
    )


class Install(ctypes.Structure):
    """struct lm_install: an entry for the kernel to install, and the result."""

    _fields_ = (
        ("key", IpcacheKey),
        ("entry", IpcacheEntry),
        ("cluster_id", c_uint16),
        ("pad", c_uint16),
        ("error", c_int32),
    )


INSTALL_HEAD, INSTALL_MOST = 16, 56
"""LM_INSTALL_HEAD and LM_INSTALL_MOST."""


class Slot(ctypes.Structure):
    """struct lm_slot: what is known of a parked packet."""

    _fields_ = (
        ("parked_ns", c_uint64),
        ("ifindex", c_uint32),
        ("mark", c_uint32),
        ("hash", c_uint32),
        ("length", c_uint32),
        ("addr", c_uint8 * 16),
        ("source_mac", c_uint8 * 6),
        ("family", c_uint8),
        ("pad", c_uint8),
        ("hold", c_uint32),
        ("state", c_uint32),
    )


SLOT_FREE, SLOT_PARKED, SLOT_RETURNING, SLOT_DISCARD, SLOT_CUT = range(5)


class HoldControl(ctypes.Structure):
    """struct lm_hold_control."""

    _fields_ = (
        ("agent_beat_ns", c_uint64),
        ("holder_beat_ns", c_uint64),
        ("interface_interval_ns", c_uint64),
        ("interface_burst_ns", c_uint64),
        ("limit_ns", c_uint64),
        ("address_packets", c_int64),
        ("address_bytes", c_int64),
        ("interface_packets", c_int64),
        ("interface_bytes", c_int64),
        ("total_bytes", c_int64),
        ("tap_ifindex", c_uint32),
        ("udp_gso", c_uint32),
    )


class Outstanding(ctypes.Structure):
    """struct lm_outstanding."""

    _fields_ = (("packets", c_int64), ("bytes", c_int64), ("moment", c_uint64))


class HoldCounters(ctypes.Structure):
    """struct lm_hold_counters."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            "held",
            "gated",
            "returned",
            "discarded",
            "park_failed",
            "stray",
            "refused_off",
            "refused_stale",
            "refused_size",
            "refused_vlan",
            "refused_gso",
            "refused_address",
            "refused_interface",
            "refused_bytes",
            "refused_rate",
            "refused_slots",
        )
    )


class Reader(ctypes.Structure):
    """struct lm_reader."""

    _fields_ = (("barrier", c_uint64), ("wake", c_uint32), ("pad", c_uint32))


class HolderStats(ctypes.Structure):
    """struct lm_holder_stats."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            "installed",
            "negative",
            "timeout",
            "late",
            "gated",
            "shutdown",
            "lost",
            "never_arrived",
            "write_errors",
            "strays",
        )
    )


STRUCTS: Mapping[str, type[ctypes.Structure]] = {
    "ipcache_key": IpcacheKey,
    "ipcache_entry": IpcacheEntry,
    "ipcache_entry_v1": IpcacheEntryV1,
    "ipcache_miss": IpcacheMiss,
    "lm_config": Config,
    "lm_counters": Counters,
    "lm_reader": Reader,
    "lm_mesh_cidr": MeshCidr,
    "lm_dedup_key": DedupKey,
    "lm_window": Window,
    "lm_policy_key": PolicyKey,
    "lm_flow_key": FlowKey,
    "lm_flow": Flow,
    "lm_owned": Owned,
    "lm_install": Install,
    "lm_slot": Slot,
    "lm_hold_control": HoldControl,
    "lm_outstanding": Outstanding,
    "lm_hold_counters": HoldCounters,
    "lm_holder_stats": HolderStats,
}
"""Every struct that both sides know, by its C name; the layout test walks this registry."""

_STATIC_BITS = 8 * (IpcacheKey.addr.offset - IpcacheKey.cluster_id.offset)
"""Bits that every prefix length includes before the address: cluster id, padding, family."""

# struct is three times as fast as filling a ctypes structure, and this is the miss path; the layout test checks both.
_KEY = struct.Struct("=IHBB16s")
_KEY_HEAD, _KEY_TAIL = _KEY.pack(_STATIC_BITS + 32, 0, 0, FAMILY_IPV4, b"")[:-16], bytes(12)
"""What the key of an IPv4 address has before and after it."""
_ENTRY = struct.Struct("=I16sHBB")
_ENTRY_V1 = struct.Struct("=I4sHBB")
_OWNED = struct.Struct("=24s24sHHI")
_INSTALL = struct.Struct("=24sHHi")
_LINE = _KEY.size + _INSTALL.size
_RUN = INSTALL_MOST * _LINE
_FIRST_ERROR = (INSTALL_HEAD + _LINE) // 4 - 1
"""The place of the first line's result, its last four bytes, in a run as an array of them."""
_UNTOUCHED = -1
"""The result of lines that the program has not reached."""
_DEDUP_KEY = struct.Struct("=16sI")
_MISS = struct.Struct("=IBB6x16s4xQ")
_PADDED_IPV4_MISS = struct.Struct("=IBB6x4s12x4xQ4x")
"""As perf records have it, which it pads."""
_FAMILIES = frozenset({FAMILY_IPV4, FAMILY_IPV6})


def pack_address_key(address: Address) -> bytes:
    """Return the full-length key of an address, cluster id 0."""
    if len(address) == 4:
        return _KEY.pack(_STATIC_BITS + 32, 0, 0, FAMILY_IPV4, address)
    return _KEY.pack(_STATIC_BITS + 128, 0, 0, FAMILY_IPV6, address)


def pack_network_key(network: Network) -> bytes:
    """Return the key of a CIDR, cluster id 0."""
    family = FAMILY_IPV4 if network.version == 4 else FAMILY_IPV6
    return _KEY.pack(_STATIC_BITS + network.prefixlen, 0, 0, family, network.network_address.packed)


def unpack_key(raw: bytes) -> tuple[Network, int]:
    """Return the CIDR and the cluster id of a key; ValueError for bytes that no writer of this layout produces."""
    prefixlen, cluster_id, _, family, addr = _KEY.unpack(raw)
    if family == FAMILY_IPV4:
        return ipaddress.IPv4Network((addr[:4], prefixlen - _STATIC_BITS), strict=False), cluster_id
    if family == FAMILY_IPV6:
        return ipaddress.IPv6Network((addr, prefixlen - _STATIC_BITS), strict=False), cluster_id
    raise ValueError(f"ipcache key of unknown family {family}")


def address_of_key(raw: bytes) -> Address | None:
    """Return the address of a full-length key with cluster id 0; None for every other key."""
    prefixlen, cluster_id, _, family, addr = _KEY.unpack(raw)
    if cluster_id == 0 and family == FAMILY_IPV4 and prefixlen == _STATIC_BITS + 32:
        return bytes(addr[:4])
    if cluster_id == 0 and family == FAMILY_IPV6 and prefixlen == _STATIC_BITS + 128:
        return bytes(addr)
    return None


def pack_entry(entry: Entry, tag: int = 0) -> bytes:
    """Return the v2 value (24 bytes) of an entry; the tag goes into its padding."""
    return _ENTRY.pack(entry.identity, entry.tunnel_endpoint or b"", tag, entry.encrypt_key, entry.flags)


def pack_entry_v1(entry: Entry, tag: int = 0) -> bytes:
    """Return the v1 value (12 bytes): no bits about tunnels, and no IPv6 endpoint (cilium-formats 1.3)."""
    endpoint = entry.tunnel_endpoint if len(entry.tunnel_endpoint or b"") == 4 else b""
    return _ENTRY_V1.pack(
        entry.identity, endpoint, tag, entry.encrypt_key, entry.flags & EntryFlag.SKIP_TUNNEL
    )


def tag_of_entry(raw: bytes) -> int:
    """Return the padding of a v1 or v2 value."""
    layout = _ENTRY_V1 if len(raw) == _ENTRY_V1.size else _ENTRY
    return int(layout.unpack(raw)[2])


def unpack_entry(raw: bytes) -> Entry:
    """Return the entry in a v1 (12 bytes) or v2 (24 bytes) value."""
    if len(raw) == _ENTRY_V1.size:
        identity, endpoint, _, encrypt_key, flags = _ENTRY_V1.unpack(raw)
    else:
        identity, endpoint, _, encrypt_key, flags = _ENTRY.unpack(raw)
        if not flags & EntryFlag.IPV6_TUNNEL_EP:
            endpoint = endpoint[:4]
    return Entry(identity, endpoint if any(endpoint) else None, encrypt_key, flags)


class OwnedEntry(Struct, frozen=True):
    """A line of the journal: the entry that we wrote, and our previous one."""

    entry: Entry
    previous: Entry
    cluster_id: int


def pack_owned(owned: OwnedEntry) -> bytes:
    """Return the journal's value."""
    return _OWNED.pack(pack_entry(owned.entry), pack_entry(owned.previous), owned.cluster_id, 0, 0)


@lru_cache(maxsize=64)  # pods of one node come together, and with equal entries
def pack_owned_new(entry: Entry, cluster_id: int) -> bytes:
    """Return the journal's value for an entry that replaces none."""
    packed = pack_entry(entry)
    return _OWNED.pack(packed, packed, cluster_id, 0, 0)


def pack_installs(addresses: Sequence[Address], entry: Entry, cluster_id: int) -> bytes:
    """Return the lines of new entries for lm_install: key, entry and cluster id of each."""
    rest = _INSTALL.pack(pack_entry(entry), cluster_id, 0, _UNTOUCHED)
    if set(map(len, addresses)) == {4}:  # then what stands between two addresses is always the same
        head, tail = _KEY_HEAD, _KEY_TAIL + rest
        return head + (tail + head).join(addresses) + tail
    return b"".join([pack_address_key(address) + rest for address in addresses])


def pack_install_runs(lines: bytes) -> Iterator[bytes]:
    """Yield the packets that lm_install is run over, INSTALL_MOST lines each."""
    for at in range(0, len(lines), _RUN):
        yield bytes(INSTALL_HEAD) + lines[at : at + _RUN]


def unpack_installed(raw: bytes) -> list[int]:
    """Return the result of each line: 0, or a negative errno."""
    return memoryview(raw).cast("i")[_FIRST_ERROR :: _LINE // 4].tolist()


def unpack_owned(raw: bytes) -> OwnedEntry:
    """Return the line in a journal's value."""
    entry, previous, cluster_id, _, _ = _OWNED.unpack(raw)
    return OwnedEntry(unpack_entry(entry), unpack_entry(previous), cluster_id)


class Signals(Struct, frozen=True):
    """Some SIGNAL_IPCACHE_MISS, as far as user space needs them; each has the same index in all lists."""

    addresses: list[Address]
    ktimes_ns: list[int]
    inward: int
    """How many are of incoming packets."""


def unpack_signals(records: Sequence[bytes]) -> Signals:
    """Return the misses in perf records, which may be padded at the end; anything else is left out.

    Takes half the time for many that are all of IPv4 packets.
    """
    if len(records) > 8 and set(map(len, records)) == {_PADDED_IPV4_MISS.size}:
        columns = zip(*_PADDED_IPV4_MISS.iter_unpack(b"".join(records)), strict=True)
        numbers, families, directions, four_bytes, times = columns
        if set(numbers) == {SIGNAL_IPCACHE_MISS} and set(families) == {FAMILY_IPV4} and max(directions) < 2:
            return Signals(list(four_bytes), list(times), sum(directions))
    addresses, ktimes_ns, inward = [], [], 0
    for raw in records:
        if len(raw) < _MISS.size:
            continue
        number, family, direction, addr, ktime_ns = _MISS.unpack_from(raw)
        if number != SIGNAL_IPCACHE_MISS or family not in _FAMILIES or direction > 1:
            continue
        addresses.append(addr[:4] if family == FAMILY_IPV4 else addr)
        ktimes_ns.append(ktime_ns)
        inward += direction
    return Signals(addresses, ktimes_ns, inward)


def pack_dedup_key(address: Address) -> bytes:
    """Return the key of an address in maps other than LPM tries."""
    family = FAMILY_IPV4 if len(address) == 4 else FAMILY_IPV6
    return _DEDUP_KEY.pack(address, family)


def address_of_dedup_key(raw: bytes) -> Address:
    """Return the address in a key from pack_dedup_key."""
    addr, family = _DEDUP_KEY.unpack(raw)
    return bytes(addr[:4]) if family == FAMILY_IPV4 else bytes(addr)


def pack_policy_key(direction: Direction, identity: int) -> bytes:
    """Return the policy map's key."""
    return bytes(PolicyKey(identity=identity, direction=direction))


def pack_mesh_cidr(cluster_id: int) -> bytes:
    """Return the mesh CIDR map's value; 0 means that more than one cluster claims the CIDR."""
    return bytes(MeshCidr(cluster_id=cluster_id))
