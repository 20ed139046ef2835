"""The etcd key schema of Cilium Cluster Mesh, plus our pull-only address space beside it.

Keys are bytes, as etcd takes and gives them. Taken from the reference's table of keys (cilium-formats 4):
``ip`` and ``identities`` keys name no cluster under ``cilium/state``, but do under ``cilium/cache``, where a
kvstoremesh mirrors the stores of all clusters. What the values mean is left to records.py, who may read which
key to the kvstore.
"""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import TYPE_CHECKING

from lazymesh.core.model import Space, parse_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.core.model import Address

HEARTBEAT = b"cilium/.heartbeat"
"""Rewritten every 60 s, the first time 60 s after the store's start: a reader's proof of life."""

_PUSHED = b"cilium/state/ip/v1/default/"
_PULL_ONLY = b"cilium/state/ip/v1/ondemand/"
_SPACES = {_PUSHED: Space.PUSHED, _PULL_ONLY: Space.PULL_ONLY}
_MAX_IDENTITY_DIGITS = 10


def address_text(address: Address) -> str:
    """Return what ``model.format_address`` returns, five times faster for IPv4: this is on the miss path."""
    if len(address) == 4:
        a, b, c, d = address
        return f"{a}.{b}.{c}.{d}"
    return str(IPv6Address(address))


def ip_key(space: Space, address: Address, cluster: str) -> bytes:
    """Return the key of the address's record; ``cluster`` only matters in the cache."""
    text = address_text(address).encode()
    if space is Space.PUSHED:
        return _PUSHED + text
    if space is Space.PULL_ONLY:
        return _PULL_ONLY + text
    return b"cilium/cache/ip/v1/%b/%b" % (cluster.encode(), text)


def ip_keys(spaces: Sequence[Space], addresses: Sequence[Address], cluster: str) -> list[bytes]:
    """Return what ``ip_key`` returns for each address in each of the spaces, address by address."""
    if Space.CACHED in spaces:
        return [ip_key(space, address, cluster) for address in addresses for space in spaces]
    prefixes = [_PUSHED if space is Space.PUSHED else _PULL_ONLY for space in spaces]
    texts = [address_text(address).encode() for address in addresses]
    return [prefix + text for text in texts for prefix in prefixes]


def address_of_key(key: bytes) -> tuple[Space, Address]:
    """Return what ``ip_key`` was given, of a key that it returned."""
    prefix, _, text = key.rpartition(b"/")
    space = _SPACES.get(prefix + b"/", Space.CACHED)
    return space, parse_address(text.decode())


def nodes_prefix(cached: bool, cluster: str) -> bytes:
    """Return the prefix of the cluster's node records."""
    return f"cilium/{_tree(cached)}/nodes/v1/{cluster}/".encode()


def identities_prefix(cached: bool, cluster: str) -> bytes:
    """Return the prefix of the cluster's identities, each key ending in the decimal number."""
    if cached:
        return f"cilium/cache/identities/v1/{cluster}/id/".encode()
    return b"cilium/state/identities/v1/id/"


def cluster_config_key(cluster: str) -> bytes:
    """Return the key of the cluster's own description of itself; in the local cache it is the same."""
    return f"cilium/cluster-config/{cluster}".encode()


def canary_key(resource: str, cached: bool, cluster: str) -> bytes:
    """Return the key that appears once all of ``nodes``, ``identities`` or ``ip`` has been written.

    It names the registered prefix: no ``/id``, ``/default`` or cluster at its end (cilium-formats 4).
    """
    return f"cilium/synced/{cluster}/cilium/{_tree(cached)}/{resource}/v1".encode()


def identity_of_key(key: bytes, prefix: bytes) -> int | None:
    """Return the identity that a key under :func:`identities_prefix` names; None if it is no such key."""
    digits = _rest(key, prefix)
    if not digits.isdigit() or len(digits) > _MAX_IDENTITY_DIGITS or digits[:1] == b"0":
        return None
    return int(digits)


def node_of_key(key: bytes, prefix: bytes) -> str | None:
    """Return the node name of a key under :func:`nodes_prefix`; None if it is no such key."""
    name = _rest(key, prefix)
    if not name or b"/" in name or not name.isascii():
        return None
    return name.decode("ascii")


def _tree(cached: bool) -> str:
    return "cache" if cached else "state"


def _rest(key: bytes, prefix: bytes) -> bytes:
    return key[len(prefix) :] if key.startswith(prefix) else b""
