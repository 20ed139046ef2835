"""The etcd key schema of Cilium Cluster Mesh, plus lazymesh's pull-only address space beside it.

Keys are bytes, as in etcd's API. The schema is the reference's table of keys (cilium-formats 4): ``ip`` and
``identities`` keys name no cluster under ``cilium/state``, but do under ``cilium/cache``, where a kvstoremesh mirrors
the stores of all clusters. What the values mean is left to records.py, which keys a client may read to the kvstore.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv6Address
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from lazymesh.core.model import Space

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lazymesh.core.model import Address

_PUSHED = b"cilium/state/ip/v1/default/"
_PULL_ONLY = b"cilium/state/ip/v1/ondemand/"
_MAX_IDENTITY_DIGITS = 10
_NUMBERS = [str(number) for number in range(256)]
_VALUES = {text: number for number, text in enumerate(_NUMBERS)}
_DOTTED = [f"{number}." for number in range(256)]
_LAST = [b"%d" % number for number in range(256)]


def address_text(address: Address) -> str:
    """Return what ``model.format_address`` returns, ten times faster for IPv4: this is on the miss path."""
    if len(address) == 4:
        a, b, c, d = address
        return f"{_DOTTED[a]}{_DOTTED[b]}{_DOTTED[c]}{_NUMBERS[d]}"
    return str(IPv6Address(address))


def dotted_address(text: str) -> Address | None:
    """Return the IPv4 address that a text names, ten times faster than ``ipaddress``; None if it names none."""
    parts = text.split(".", 4)
    try:
        return bytes([_VALUES[part] for part in parts]) if len(parts) == 4 else None
    except KeyError:
        return None


def address_texts(addresses: Sequence[Address]) -> list[str]:
    """Return the ``address_text`` of each; of IPv4 neighbours, which come together in a storm, what they share once."""
    texts: list[str] = []
    for common, neighbours in groupby(addresses, itemgetter(slice(0, 3))):
        some = list(neighbours)
        if len(some) > 1 and set(map(len, some)) == {4}:
            a, b, c = common
            before = f"{a}.{b}.{c}."
            texts += [before + _NUMBERS[last] for last in b"".join(some)[3::4]]
        else:
            texts += map(address_text, some)
    return texts


def group_of(address: Address) -> bytes:
    """Return what addresses that are watched together have in common: a /24 of IPv4, a /120 of IPv6.

    Nodes have such pod CIDRs by Cilium's defaults. An IPv6 address that ends in a zero group is alone: its text may
    omit that group.
    """
    return address if len(address) == 16 and address.endswith(b"\0\0") else address[:-1]


def neighbours_of(addresses: Iterable[Address]) -> Iterator[tuple[bytes, list[Address]]]:
    """Yield runs of addresses of one group, with the group; a group may come more than once."""
    for _, run in groupby(addresses, itemgetter(slice(0, -1))):
        some = list(run)
        if len(some[0]) == 4:
            yield some[0][:-1], some
        else:
            for group, few in groupby(some, group_of):
                yield group, list(few)


def common_text(address: Address) -> bytes:
    """Return how the texts of all addresses in its group begin."""
    text = address_text(address)
    if len(address) == 4:
        text = text[: text.rindex(".") + 1]
    elif not address.endswith(b"\0\0"):
        # The last eight bits are two digits, unless those before them are zero.
        text = text[: max(text.rindex(":") + 1, len(text) - 2)]
    return text.encode()


def own_texts(addresses: Sequence[Address]) -> list[bytes]:
    """Return what follows the ``common_text`` in the text of each address; IPv4 only."""
    return [_LAST[address[3]] for address in addresses]


def ip_key(space: Space, address: Address, cluster: str) -> bytes:
    """Return the key of the address's record; ``cluster`` only matters in the cache."""
    return ip_prefix(space, cluster) + address_text(address).encode()


def ip_prefix(space: Space, cluster: str) -> bytes:
    """Return what comes before the address in such keys."""
    if space is Space.CACHED:
        return b"cilium/cache/ip/v1/%b/" % cluster.encode()
    return _PUSHED if space is Space.PUSHED else _PULL_ONLY


@lru_cache(maxsize=1_024)  # two for each cluster
def _prefixes(spaces: tuple[Space, ...], cluster: str) -> list[bytes]:
    return [ip_prefix(space, cluster) for space in spaces]


def ip_keys(spaces: tuple[Space, ...], addresses: Sequence[Address], cluster: str) -> list[bytes]:
    """Return what ``ip_key`` returns for each address in each of the spaces, address by address."""
    texts = [address_text(addresses[0])] if len(addresses) == 1 else address_texts(addresses)
    prefixes, keys = _prefixes(spaces, cluster), []
    for text in map(str.encode, texts):
        for prefix in prefixes:
            keys.append(prefix + text)  # noqa: PERF401 (a comprehension is a call, and a lone miss comes here)
    return keys


def nodes_prefix(cached: bool, cluster: str) -> bytes:
    """Return the prefix of the cluster's node records."""
    return f"cilium/{_tree(cached)}/nodes/v1/{cluster}/".encode()


def identities_prefix(cached: bool, cluster: str) -> bytes:
    """Return the prefix of the cluster's identities, each key ending in the decimal number."""
    if cached:
        return f"cilium/cache/identities/v1/{cluster}/id/".encode()
    return b"cilium/state/identities/v1/id/"


def cluster_config_key(cluster: str) -> bytes:
    """Return the key of the cluster's description of itself; it is the same in the local cache."""
    return f"cilium/cluster-config/{cluster}".encode()


def canary_key(resource: str, cached: bool, cluster: str) -> bytes:
    """Return the key that appears once all of ``nodes``, ``identities`` or ``ip`` has been written.

    It names the registered prefix, without ``/id``, ``/default`` or cluster at its end (cilium-formats 4).
    """
    return f"cilium/synced/{cluster}/cilium/{_tree(cached)}/{resource}/v1".encode()


def identity_of_key(key: bytes, prefix: bytes) -> int | None:
    """Return the identity that a key under :func:`identities_prefix` names; None if it is not such a key."""
    digits = _rest(key, prefix)
    if not digits.isdigit() or len(digits) > _MAX_IDENTITY_DIGITS or digits[:1] == b"0":
        return None
    return int(digits)


def node_of_key(key: bytes, prefix: bytes) -> str | None:
    """Return the node name of a key under :func:`nodes_prefix`; None if it is not such a key."""
    name = _rest(key, prefix)
    if not name or b"/" in name or not name.isascii():
        return None
    return name.decode("ascii")


def _tree(cached: bool) -> str:
    return "cache" if cached else "state"


def _rest(key: bytes, prefix: bytes) -> bytes:
    return key[len(prefix) :] if key.startswith(prefix) else b""
