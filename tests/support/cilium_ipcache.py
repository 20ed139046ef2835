"""The ipcache as cilium-agent keeps it: the map's two layouts, and the writer between user space and map.

Bytes are spelled out from cilium-formats.md sections 1 and 2, not taken from lazymesh's own packing. A writer is one
agent's life: what it knows in user space, what it writes of that into the map, and what it never looks at again.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lazymesh.datapath.libbpf import MAP_TYPE_LPM_TRIE, Map, MapLayout

if TYPE_CHECKING:
    from collections.abc import Iterable

HOST, WORLD, REMOTE_NODE, WORLD_IPV4, WORLD_IPV6 = 1, 2, 6, 9, 10
SKIP_TUNNEL, HAS_TUNNEL_EP, IPV6_TUNNEL_EP, REMOTE_CLUSTER = 1, 2, 4, 8
MAX_ENTRIES = 512_000
_CLUSTER_SHIFT = 16
"""max-connected-clusters 255: a cluster's identities are 16 bits wide."""
_STATIC_BITS = 32
_CHUNK = 4096
_KEY = struct.Struct("=IHBB16s")


@dataclass(frozen=True)
class Layout:
    """One of the two forms of the map; the pin and the map have the same name (which the kernel cuts)."""

    name: str
    value: struct.Struct
    map_flags: int

    def create(self, max_entries: int = MAX_ENTRIES, map_flags: int | None = None) -> Map:
        """Make an empty map."""
        flags = self.map_flags if map_flags is None else map_flags
        return Map.create(
            self.name, MapLayout(MAP_TYPE_LPM_TRIE, _KEY.size, self.value.size, max_entries, flags)
        )


V1 = Layout("cilium_ipcache", struct.Struct("=I4sHBB"), 1)
"""Cilium up to 1.17."""
V2 = Layout("cilium_ipcache_v2", struct.Struct("=I16sHBB"), 129)
"""Since 1.18; the flags are those of 1.19 and 1.20, where programs may only read it (1.18: 1)."""
LAYOUTS = {"v1": V1, "v2": V2}


class Record(NamedTuple):
    """What the agent knows of one prefix. Two that differ in a pod's name only are not identical."""

    identity: int
    host_ip: str = ""
    key: int = 0
    pod: str = ""
    namespace: str = ""
    metadata_flags: int = 0
    """skip_tunnel and remote_cluster: the bits that do not follow from the endpoint."""


class Entry(NamedTuple):
    """What the map says of one prefix."""

    identity: int
    tunnel_endpoint: str | None
    key: int
    flags: int


def canonical(prefix: str) -> str:
    """Return a prefix without the length of a whole address, and without host bits."""
    if "/" not in prefix:
        return prefix
    network = ipaddress.ip_network(prefix, strict=False)
    full = network.prefixlen == network.max_prefixlen
    return str(network.network_address) if full else str(network)


def pack_key(prefix: str) -> bytes:
    """Return the map's key of a canonical prefix; cluster id 0, as in every standard mesh."""
    address, _, length = prefix.partition("/")
    family, code, bits = (socket.AF_INET6, 2, 128) if ":" in address else (socket.AF_INET, 1, 32)
    return _KEY.pack(_STATIC_BITS + int(length or bits), 0, 0, code, socket.inet_pton(family, address))


def unpack_key(raw: bytes) -> str:
    """Return the canonical prefix of a key; ``@7`` behind it is a cluster id."""
    length, cluster_id, _, code, address = _KEY.unpack(raw)
    network = ipaddress.ip_network(
        (address if code == 2 else address[:4], length - _STATIC_BITS), strict=False
    )
    return canonical(str(network)) + (f"@{cluster_id}" if cluster_id else "")


def pack_value(layout: Layout, record: Record, node_ips: tuple[str, ...]) -> bytes:
    """Return the value that the agent's writer derives: no endpoint for what lives on this very node."""
    host = "" if record.host_ip in node_ips else record.host_ip
    endpoint = ipaddress.ip_address(host).packed if host else b""
    if layout is V1:
        legacy = endpoint if len(endpoint) == 4 else b""
        return V1.value.pack(record.identity, legacy, 0, record.key, record.metadata_flags & SKIP_TUNNEL)
    flags = record.metadata_flags & (SKIP_TUNNEL | REMOTE_CLUSTER)
    flags |= (HAS_TUNNEL_EP if endpoint else 0) | (IPV6_TUNNEL_EP if len(endpoint) == 16 else 0)
    return V2.value.pack(record.identity, endpoint, 0, record.key, flags)


def unpack_value(raw: bytes) -> Entry:
    """Return what a value of either layout says."""
    layout = V1 if len(raw) == V1.value.size else V2
    identity, endpoint, _, key, flags = layout.value.unpack(raw)
    if not any(endpoint):
        return Entry(identity, None, key, flags)
    length = 16 if flags & IPV6_TUNNEL_EP else 4
    return Entry(identity, str(ipaddress.ip_address(endpoint[:length])), key, flags)


def world_of(prefix: str, dual_stack: bool) -> int:
    """Return the identity of the world: one for each family, but only where there are two."""
    return (WORLD_IPV6 if ":" in prefix else WORLD_IPV4) if dual_stack else WORLD


def belongs_to(identity: int, cluster_id: int) -> bool:
    """Tell whether a peer may say this identity: one of its range, or any below 256 (0 and 2 among them)."""
    return identity < 256 or identity >> _CLUSTER_SHIFT == cluster_id


class Writer:
    """One agent's user-space ipcache and its writes into the map that it made."""

    def __init__(self, layout: Layout, node_ips: tuple[str, ...], log: list[str]) -> None:
        self._layout, self._node_ips, self._log = layout, node_ips, log
        self._map: Map | None = None
        self.known: dict[str, Record] = {}
        """What this agent believes to own: it never asks the map."""

    def use(self, bpf_map: Map) -> None:
        """Write into this map from now on."""
        self._map = bpf_map

    def upsert(self, prefix: str, record: Record) -> bool:
        """Learn a prefix, and write it whatever stands there; False for what is known already: no write then."""
        if self.known.get(prefix) == record:
            return False
        self.known[prefix] = record
        try:
            self._require_map().update(pack_key(prefix), pack_value(self._layout, record, self._node_ips))
        except OSError as exc:
            self._complain("update", prefix, exc)
        return True

    def upsert_many(self, records: Iterable[tuple[str, Record]]) -> int:
        """Learn many prefixes with few system calls; returns how many were written."""
        fresh = [(prefix, record) for prefix, record in records if self.known.get(prefix) != record]
        for start in range(0, len(fresh), _CHUNK):
            part = fresh[start : start + _CHUNK]
            raw = [(pack_key(p), pack_value(self._layout, r, self._node_ips)) for p, r in part]
            try:
                self._require_map().update_many(raw)
            except OSError:  # full, most likely: one at a time says which
                for prefix, record in part:
                    self.upsert(prefix, record)
            else:
                self.known.update(part)
        return len(fresh)

    def delete(self, prefix: str) -> bool:
        """Forget a prefix, and delete it if this agent ever learnt it, whoever wrote last; False if it did not."""
        if self.known.pop(prefix, None) is None:
            return False
        if not self._require_map().delete(pack_key(prefix)):
            self._complain("delete from", prefix, OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
        return True

    def _complain(self, what: str, prefix: str, exc: OSError) -> None:
        # It does not try again before the next change of this prefix.
        self._log.append(f"unable to {what} bpf map: {prefix}: {exc.strerror}")

    def _require_map(self) -> Map:
        assert self._map is not None, "the agent has not made its map yet"
        return self._map
