"""What etcd holds, decoded and distrusted: pairs, nodes, identities and cluster configurations.

The bytes come from other clusters, so nothing here trusts them and, whatever they are, nothing raises anything but
:class:`RecordError`. Formats are those of cilium-formats 4.1 to 4.5, with the corrections of cilium-live 4. Field
names are matched exactly as Go writes them: Go's reader also accepts any other case, but no writer produces one,
except ``SyncScope``, which CFP-44921 spells in two ways. Unknown fields are skipped. Whether an identity belongs to
its cluster is left to identities.py, which cluster owns an address to clusters.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import msgspec

from lazymesh.core.keys import address_text, address_texts, dotted_address
from lazymesh.core.model import Entry, Reason, with_tunnel_flags

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from lazymesh.core.model import Address, Network

MAX_VALUE = 64 * 1024
"""Bytes; a pair has about 200, a large node record a few thousand. Longer values are refused undecoded."""

REGIONAL = "regional"
"""The only scope with an effect; the CFP treats every other text as global."""

REGION_LABEL = "topology.kubernetes.io/region"

_MAX_LABELS = 1024
"""For one identity, which has a few dozen: code that looks at them all does so without a pause."""
_MAX_CIDRS = 512
"""For one node. Most have one for each family; with pools that give each pod a CIDR, a few hundred."""
_MAX_ADDRESSES = 8
"""For one node: three kinds in two families, first the one that its pods' records name. Further ones are skipped: their
region is unknown then."""
_MAX_REGION = 63
"""Characters, Kubernetes' limit for every label."""
_MAX_CACHED = 128
"""Characters of a label; a longer one is rare and is not cached."""
_MAX_SCOPE = 16
"""Characters of a scope that are kept: more than those that mean something have."""
_MAX_ADDRESS_TEXT = 45  # an IPv6 address with its last 32 bits in dotted form

Labels = dict[str, str]
"""``source:key`` to value, for example ``k8s:app`` to ``web``; never empty."""


class RecordError(Exception):
    """The bytes are not a record to act on; ``detail`` is a few words for a log."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


class BadRecord(msgspec.Struct, frozen=True, gc=False):
    """What was found in place of a record."""

    reason: Reason
    detail: str


class IpRecord(msgspec.Struct, frozen=True, gc=False):
    """One address's record, an IPIdentityPair."""

    identity: int
    host_ip: Address
    """The node that hosts the pod; an IPv4-mapped address as IPv4, as Go understands it."""
    encrypt_key: int
    scope: str
    """``regional``, ``global``, or "" for global; of other texts the beginning."""


Record = IpRecord | BadRecord
"""What is found under the key of an address."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One node of a cluster, as far as it says which cluster owns an address."""

    name: str
    cluster: str
    cluster_id: int
    node_ips: tuple[Address, ...]
    pod_cidrs: tuple[Network, ...]
    region: str | None


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What a cluster says about itself."""

    cluster_id: int
    max_connected_clusters: int
    cached: bool
    """Whether this is a kvstoremesh's copy: the records are under ``cilium/cache``."""
    synced_canaries: bool
    """Whether listings are complete only once the canary of their prefix is there."""


_T = TypeVar("_T")

_U8 = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
_U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]


class _Pair(msgspec.Struct, gc=False):
    IP: str
    ID: _U32
    HostIP: str = ""
    Mask: str | None = None
    Key: _U8 = 0
    SyncScope: str = ""
    syncScope: str = ""  # noqa: N815 - the other spelling


class _NodeAddress(msgspec.Struct):
    IP: str = ""


class _Cidr(msgspec.Struct):
    IP: str
    Mask: bytes


class _Node(msgspec.Struct):
    Name: str
    Cluster: str
    IPAddresses: list[_NodeAddress] | None = None
    IPv4AllocCIDR: _Cidr | None = None
    IPv4SecondaryAllocCIDRs: list[_Cidr] | None = None
    IPv6AllocCIDR: _Cidr | None = None
    IPv6SecondaryAllocCIDRs: list[_Cidr] | None = None
    ClusterID: _U32 = 0
    Labels: dict[str, str] | None = None


class _Capabilities(msgspec.Struct, rename="camel"):
    synced_canaries: bool = False
    cached: bool = False
    max_connected_clusters: int = 255


class _Config(msgspec.Struct):
    id: int
    capabilities: _Capabilities = msgspec.field(default_factory=_Capabilities)


_PAIR = msgspec.json.Decoder(_Pair)
_NODE = msgspec.json.Decoder(_Node)
_CONFIG = msgspec.json.Decoder(_Config)


def decode_pair(value: bytes, address: Address) -> Record:
    """Return the record found under the address's key, or why it is none.

    The record must name that very address in canonical form and no mask, as Cilium's reader demands:
    anything else was written under another record's key.
    """
    try:
        pair = _decode(_PAIR, value)
        if address_text(address) != pair.IP:
            _refuse(f"wrong key form: IP is {pair.IP[:64]!r}")
        if pair.Mask is not None:
            _refuse("wrong key form: Mask under the key of a single address")
        return _record_of(pair)
    except RecordError as error:
        return BadRecord(error.reason, error.detail)


def decode_pairs(values: Sequence[bytes | None], addresses: Sequence[Address]) -> list[Record | None]:
    """Return for each value what ``decode_pair`` returns, and None for None.

    Faster if all are good, as they mostly are.
    """
    there = [value for value in values if value is not None]
    if not there:  # in one of its two spaces an address has no record
        return [None] * len(values)
    if len(there) == len(values):
        return [*_decode_all(there, addresses)]
    records: list[Record | None] = [None] * len(values)
    at = [index for index, value in enumerate(values) if value is not None]
    for index, record in zip(at, _decode_all(there, [addresses[index] for index in at]), strict=True):
        records[index] = record
    return records


def _decode_all(values: Sequence[bytes], addresses: Sequence[Address]) -> list[Record]:
    if max(map(len, values)) <= MAX_VALUE:
        try:
            pairs = list(map(_PAIR.decode, values))
            unmasked = all([pair.Mask is None for pair in pairs])  # noqa: C419 - a generator takes three times as long
            if unmasked and [pair.IP for pair in pairs] == address_texts(addresses):
                return list(map(_record_of, pairs))
        except (RecordError, ValueError, RecursionError):
            pass  # one of them is bad (contextlib.suppress would be three calls more, on the miss path)
    return list(map(decode_pair, values, addresses))


def _record_of(pair: _Pair) -> IpRecord:
    # Neither the cache nor what is kept of an address must keep another cluster's long texts alive.
    return _record(pair.ID, pair.HostIP, pair.Key, (pair.SyncScope or pair.syncScope)[:_MAX_SCOPE])


@lru_cache(maxsize=4096)  # pods of one identity on one node have equal records; what is refused is not cached
def _record(identity: int, host_ip: str, encrypt_key: int, scope: str) -> IpRecord:
    host = _host_address(host_ip)
    if host is None:
        _refuse(f"HostIP is {host_ip[:64]!r}")
    return IpRecord(identity, host, encrypt_key, scope)


def entry_of(record: IpRecord, here: Container[Address] = ()) -> Entry:
    """Return the entry as Cilium writes it on a node with these addresses: no tunnel to itself."""
    return _entry(record.identity, None if record.host_ip in here else record.host_ip, record.encrypt_key)


@lru_cache(maxsize=4096)
def _entry(identity: int, endpoint: Address | None, encrypt_key: int) -> Entry:
    return with_tunnel_flags(Entry(identity, endpoint, encrypt_key))


def decode_node(value: bytes, cluster: str) -> NodeRecord:
    """Return the node; FORGED if it names a cluster other than the one whose store it was found in."""
    node = _decode(_NODE, value)
    if node.Cluster != cluster:
        raise RecordError(Reason.FORGED, f"node of cluster {node.Cluster[:64]!r}")
    if not node.Name:
        _refuse("node without a name")
    addresses = [_host_address(entry.IP) for entry in (node.IPAddresses or ())[:_MAX_ADDRESSES]]
    region = (node.Labels or {}).get(REGION_LABEL) or None
    if region and len(region) > _MAX_REGION:
        _refuse(f"region {region[:64]!r} is too long")
    return NodeRecord(
        name=node.Name,
        cluster=cluster,
        cluster_id=node.ClusterID,
        node_ips=tuple(address for address in addresses if address),
        pod_cidrs=_pod_cidrs(node),
        region=region,
    )


def decode_identity(value: bytes) -> Labels:
    """Return the labels of an identity, whose value is ``source:key=value;`` repeated and not JSON."""
    if len(value) > MAX_VALUE:
        _refuse(f"{len(value)} bytes")
    try:
        text = value.decode()
    except UnicodeDecodeError:
        _refuse("labels are not UTF-8")
    words = text.split(";", _MAX_LABELS)
    if any(words[_MAX_LABELS:]):
        _refuse(f"more than {_MAX_LABELS} labels")
    # The cache must not keep another cluster's long texts alive.
    read = _label if max(map(len, words)) <= _MAX_CACHED else _label.__wrapped__
    pairs = list(map(read, filter(None, words)))
    labels = dict(pairs)
    if len(labels) != len(pairs):
        _refuse("a label twice")
    if not labels:
        _refuse("no labels")
    return labels


@lru_cache(maxsize=8192)  # a mesh has 100,000 identities made of a few thousand distinct words
def _label(label: str) -> tuple[str, str]:
    key, _, value = label.partition("=")
    source, _, name = key.partition(":")
    # In selectors "any" stands for every source; no label comes from it.
    if not source or not name or source == "any":
        _refuse(f"label {label[:64]!r}")
    return key, value


def decode_cluster_config(value: bytes) -> ClusterConfig:
    """Return the configuration; ids and mesh sizes that Cilium itself refuses are MALFORMED."""
    config = _decode(_CONFIG, value)
    limit = config.capabilities.max_connected_clusters or 255
    if limit not in (255, 511):
        _refuse("maxConnectedClusters is not 255 or 511")
    if not 1 <= config.id <= limit:
        _refuse(f"cluster id is not in 1..{limit}")
    return ClusterConfig(config.id, limit, config.capabilities.cached, config.capabilities.synced_canaries)


def _refuse(detail: str) -> NoReturn:
    raise RecordError(Reason.MALFORMED, detail)


def _decode(decoder: msgspec.json.Decoder[_T], value: bytes) -> _T:
    if len(value) > MAX_VALUE:
        _refuse(f"{len(value)} bytes")
    try:
        return decoder.decode(value)
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        raise RecordError(Reason.MALFORMED, str(error)[:200]) from error


def _host_address(text: str) -> Address | None:
    # The cache must not keep another cluster's long texts alive.
    return _parsed(text) if len(text) <= _MAX_ADDRESS_TEXT else None


@lru_cache(maxsize=4096)  # a cluster's pairs name its few hundred nodes over and over
def _parsed(text: str) -> Address | None:
    packed = dotted_address(text)
    if packed is None:
        try:
            address = IPv6Address(text)
        except ValueError:
            return None
        if address.scope_id:  # only means something on one node
            return None
        packed = (address.ipv4_mapped or address).packed
    return packed if any(packed) else None


def _pod_cidrs(node: _Node) -> tuple[Network, ...]:
    cidrs = [cidr for cidr in (node.IPv4AllocCIDR, node.IPv6AllocCIDR) if cidr]
    cidrs += node.IPv4SecondaryAllocCIDRs or ()
    cidrs += node.IPv6SecondaryAllocCIDRs or ()
    if len(cidrs) > _MAX_CIDRS:
        _refuse(f"more than {_MAX_CIDRS} pod CIDRs")
    return tuple(map(_network, cidrs))


def _network(cidr: _Cidr) -> Network:
    mask, bits = int.from_bytes(cidr.Mask), 8 * len(cidr.Mask)
    length = mask.bit_count()
    text = cidr.IP[:_MAX_ADDRESS_TEXT]
    try:
        address = dotted_address(text) or IPv6Address(text).packed
    except ValueError:
        _refuse(f"pod CIDR of {cidr.IP[:64]!r}")
    if len(address) != len(cidr.Mask) or mask != (1 << length) - 1 << bits - length:
        _refuse(f"pod CIDR {cidr.IP[:64]!r} with mask {cidr.Mask[:16].hex()}")
    first = int.from_bytes(address) & mask
    return IPv4Network((first, length)) if bits == 32 else IPv6Network((first, length))
