"""The nouns that everything else uses: address, direction, entry, space, reason.

An *address* is its 4 or 16 bytes in network order: the form that the kernel signals and the maps hold, and a cheap
dictionary key. Text form exists only at the edges (etcd keys, CLI, logs), through :func:`format_address`.
"""

from __future__ import annotations

import enum
import ipaddress

from msgspec import Struct

Address = bytes
"""4 (IPv4) or 16 (IPv6) bytes in network order."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def format_address(address: Address) -> str:
    """Return the canonical text that Cilium uses in etcd keys (dotted quad, or RFC 5952)."""
    return str(ipaddress.ip_address(address))


def parse_address(text: str) -> Address:
    """Return the bytes of a textual address; raise ValueError if it is not one."""
    return ipaddress.ip_address(text).packed


class Direction(enum.IntEnum):
    """Which address missed: a pod's destination (egress) or a network peer's source (ingress)."""

    EGRESS = 0
    INGRESS = 1


class EntryFlag(enum.IntFlag):
    """Bits of the last byte of an ipcache value (cilium-formats 1.3); other bits are left alone and never set."""

    SKIP_TUNNEL = 1
    HAS_TUNNEL_EP = 2
    IPV6_TUNNEL_EP = 4
    REMOTE_CLUSTER = 8


class Entry(Struct, frozen=True, gc=False):
    """What the ipcache map says about one prefix.

    identity: the security identity number.
    tunnel_endpoint: address of the node that hosts the peer, or None.
    encrypt_key: encryption key index, 0 for none.
    flags: all eight flag bits as found, :class:`EntryFlag` names the known ones.
    """

    identity: int
    tunnel_endpoint: Address | None = None
    encrypt_key: int = 0
    flags: int = 0


_TUNNEL_FLAGS = int(EntryFlag.HAS_TUNNEL_EP | EntryFlag.IPV6_TUNNEL_EP)
_HAS_ENDPOINT = {4: int(EntryFlag.HAS_TUNNEL_EP), 16: _TUNNEL_FLAGS}
"""By the address's length; numbers, because arithmetic with enum flags takes twenty times as long."""


def with_tunnel_flags(entry: Entry) -> Entry:
    """Return the entry with the bits that follow from its endpoint, as Cilium's writer derives them."""
    flags = int(entry.flags) & ~_TUNNEL_FLAGS
    if entry.tunnel_endpoint is not None:
        flags |= _HAS_ENDPOINT[len(entry.tunnel_endpoint)]
    return Entry(entry.identity, entry.tunnel_endpoint, entry.encrypt_key, flags)


class Space(enum.Enum):
    """Which etcd keys a record came from; the value is the keyword used in logs and the journal."""

    PUSHED = "default"
    """``cilium/state/ip/v1/default/<ip>`` in the owner's store: every consumer watches it."""
    PULL_ONLY = "ondemand"
    """``cilium/state/ip/v1/ondemand/<ip>`` in the owner's store: read only on a miss."""
    CACHED = "cache"
    """``cilium/cache/ip/v1/<cluster>/<ip>`` in the local kvstoremesh store."""

    # Members are singletons; enum's own hash is that of the name, a Python call for each dictionary lookup.
    __hash__ = object.__hash__


class Reason(enum.Enum):
    """Why an address has no entry, or why it lost the one it had."""

    NOT_FOUND = "not-found"
    OUT_OF_SCOPE = "out-of-scope"
    UNKNOWN_IDENTITY = "unknown-identity"
    FORGED = "forged"
    MALFORMED = "malformed"
    AMBIGUOUS = "ambiguous"
    NO_CLUSTER = "no-cluster"
    CLUSTER_DOWN = "cluster-down"
    READ_FAILED = "read-failed"
    NOT_OURS = "not-ours"
    TAKEN = "taken"
    """The map's owner has its own entry there, from which programs know the peer."""
    MAP_FULL = "map-full"
    INSTALL_FAILED = "install-failed"
    SHED = "shed"

    __hash__ = object.__hash__
