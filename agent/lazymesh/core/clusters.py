"""Whose pod is this address? The clusters of the mesh and the pod CIDRs that they claim.

A cluster claims the pod CIDRs of its node records, and those that the operator gives it with ``--mesh-cidr``
(for platforms whose nodes have none); what the operator gives to a cluster is that cluster's, whatever nodes of
others claim. Else an address has exactly one owner if every CIDR around it is claimed by the same cluster; if two
clusters claim it, at whatever prefix lengths, it is ambiguous and nobody is asked: a wrong owner would mean a wrong
identity, so the longer prefix gets no benefit of the doubt (requirements R17).

:class:`MeshState` follows the node records one by one; :class:`ClusterTable` is what it looks like at one
moment, immutable, for the resolver. Decoding records is left to records.py, reading them and writing the
kernel's map of mesh CIDRs to the shells.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from lazymesh.core.identities import IdentityRange
    from lazymesh.core.model import Address, Network, Space
    from lazymesh.core.records import NodeRecord

    _Length = tuple[int, int]
    """Bytes of the address (4 or 16), bits of the prefix."""
    _Prefix = tuple[_Length, int]
    """A prefix: its length, and its leading bits as a number."""
    _Levels = dict[_Length, dict[int, tuple[str, ...]]]
    """Prefixes by length, each with the sorted names of its clusters."""

MOST_CIDRS = 20_000
"""Of one cluster's nodes: Kubernetes ends at 5,000 nodes, and the kernel's map of all clusters at 131,072."""
_WIDEST = {4: 8, 6: 32}
"""Bits. No node has more addresses for its pods; one that says so would make everybody's ambiguous."""

AMBIGUOUS = 0
"""Cluster id that stands for "claimed by several"; no cluster of a mesh has it."""


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """A cluster that is part of the mesh."""

    name: str
    cluster_id: int
    identities: IdentityRange
    spaces: tuple[tuple[Space, ...], ...]
    """Groups of spaces to read one after the other, each group in one transaction; for example
    ``((CACHED,), (PUSHED, PULL_ONLY))``."""


@dataclass(frozen=True, slots=True)
class CidrChanges:
    """What to do to a map of mesh CIDRs to bring it from one table to another."""

    written: tuple[tuple[Network, int], ...]
    """New or changed CIDRs with their cluster ids."""
    deleted: tuple[Network, ...]


class ClusterTable:
    """The clusters and what they claim, at one moment; made by :meth:`MeshState.table`."""

    __slots__ = ("_by_id", "_clusters", "_levels", "_regions", "_search")

    def __init__(
        self,
        clusters: Mapping[str, ClusterInfo],
        levels: _Levels,
        regions: Mapping[Address, tuple[str, ...]],
    ) -> None:
        self._clusters = clusters
        self._by_id = {info.cluster_id: info for info in clusters.values()}
        self._levels = levels
        self._regions = regions
        self._search = {
            size: [
                (8 * size - length, prefixes)
                for (of, length), prefixes in sorted(levels.items(), reverse=True)
                if of == size
            ]
            for size in (4, 16)
        }

    def owners(self, address: Address) -> tuple[str, ...]:
        """Return the names of the clusters that claim the address: none, one, or several if ambiguous."""
        value = int.from_bytes(address)
        for shift, prefixes in self._search[len(address)]:
            names = prefixes.get(value >> shift)
            if names:
                return names
        return ()

    def cluster(self, name: str) -> ClusterInfo | None:
        """Return the cluster of this name; every name that ``owners`` returns has one."""
        return self._clusters.get(name)

    def by_id(self, cluster_id: int) -> ClusterInfo | None:
        """Return the cluster with this id."""
        return self._by_id.get(cluster_id)

    def region_of(self, host_ip: Address) -> str | None:
        """Return the region of the node with this address; None if unknown, or if nodes disagree."""
        regions = self._regions.get(host_ip, ())
        return regions[0] if regions and regions[0] == regions[-1] else None

    def mesh_cidrs(self) -> Iterator[tuple[Network, int]]:
        """Yield every claimed CIDR with its cluster id, or AMBIGUOUS.

        A longest-prefix match over them answers as ``owners`` does.
        """
        for length, prefixes in self._levels.items():
            for value, names in prefixes.items():
                yield _network(length, value), self._id_of(names)

    def changes_since(self, older: ClusterTable) -> CidrChanges:
        """Return how the CIDRs of this table differ from those of an older one."""
        written: list[tuple[Network, int]] = []
        deleted: list[Network] = []
        for length in self._levels.keys() | older._levels.keys():
            new, old = self._levels.get(length, {}), older._levels.get(length, {})
            for value, names in new.items():
                before = old.get(value)
                if before is None or self._id_of(names) != older._id_of(before):
                    written.append((_network(length, value), self._id_of(names)))
            deleted += [_network(length, value) for value in old.keys() - new.keys()]
        return CidrChanges(tuple(written), tuple(deleted))

    def _id_of(self, names: tuple[str, ...]) -> int:
        return self._clusters[names[0]].cluster_id if len(names) == 1 else AMBIGUOUS


class _Node(NamedTuple):
    """What a node contributed, to be taken back when it goes; kept small, a mesh has 30,000."""

    prefixes: tuple[_Prefix, ...]
    ips: tuple[Address, ...]
    region: str | None


class MeshState:
    """The clusters and their nodes as they come and go; the end state does not depend on the order of events.

    ``local_id`` is this node's own cluster id, ``explicit`` the CIDRs of ``--mesh-cidr``: each counts as long
    as its cluster is joined, since nothing can be asked of a cluster whose id is not known.
    """

    def __init__(self, local_id: int = 0, explicit: Iterable[tuple[str, Network]] = ()) -> None:
        self._local_id = local_id
        self._explicit = tuple((cluster, _prefix(network)) for cluster, network in explicit)
        self._clusters: dict[str, ClusterInfo] = {}
        self._nodes: dict[str, dict[str, _Node]] = {}
        self._counts: dict[str, int] = {}
        """Of pod CIDRs, by cluster."""
        self._claims: _Levels = defaultdict(dict)
        self._owners: _Levels = defaultdict(dict)
        self._regions: dict[Address, tuple[str, ...]] = {}
        self._touched: dict[_Length, set[int]] = defaultdict(set)
        self._table: ClusterTable | None = None

    def join(self, info: ClusterInfo) -> str | None:
        """Take the cluster in, or take its new description; return why not, if it is refused.

        Under another id than before it starts anew: nodes learned under the old one are forgotten. A refused
        cluster is out, whatever it was before.
        """
        known = self._clusters.get(info.name)
        if known and known.cluster_id != info.cluster_id:
            self.leave(info.name)
            known = None
        taken = self._holder_of(info.cluster_id, but=info.name)
        if taken:
            return f"cluster id {info.cluster_id} is that of {taken}"
        if not known:
            self._nodes[info.name] = {}
            self._claim_all(info.name, self._explicit_of(info.name))
        self._clusters[info.name] = info
        self._table = None
        return None

    def leave(self, cluster: str) -> None:
        """Forget the cluster, its nodes and its CIDRs."""
        if self._clusters.pop(cluster, None):
            for node in self._nodes.pop(cluster).values():
                self._forget(cluster, node)
            self._unclaim_all(cluster, self._explicit_of(cluster))
            self._table = None

    def upsert_node(self, node: NodeRecord) -> str | None:
        """Take a node's record, new or changed; return why not, if it is refused and forgotten."""
        cluster = self._clusters.get(node.cluster)
        if cluster is None:
            return f"cluster {node.cluster} is not joined"
        if node.cluster_id != cluster.cluster_id:
            self.delete_node(node.cluster, node.name)
            return f"node {node.name} says cluster id {node.cluster_id}, its cluster {cluster.cluster_id}"
        known = self._nodes[node.cluster].get(node.name)
        count = self._counts.get(node.cluster, 0) + len(node.pod_cidrs) - len(known.prefixes if known else ())
        refusal = next(filter(None, map(_why_none, node.pod_cidrs)), None)
        if count > MOST_CIDRS:
            refusal = f"more than {MOST_CIDRS} pod CIDRs in one cluster"
        if refusal:
            self.delete_node(node.cluster, node.name)
            return refusal
        new = _Node(tuple(map(_prefix, node.pod_cidrs)), node.node_ips, node.region)
        if new == known:  # a restarted kvstoremesh writes every record anew
            return None
        self._nodes[node.cluster][node.name] = new
        self._counts[node.cluster] = self._counts.get(node.cluster, 0) + len(new.prefixes)
        self._claim_all(node.cluster, new.prefixes)
        if new.region:
            for address in new.ips:
                _add(self._regions, address, new.region)
        if known:
            self._forget(node.cluster, known)
        self._table = None
        return None

    def delete_node(self, cluster: str, name: str) -> None:
        """Forget a node; nothing happens if it is not known."""
        node = self._nodes.get(cluster, {}).pop(name, None)
        if node:
            self._forget(cluster, node)
            self._table = None

    def node_names(self, cluster: str) -> set[str]:
        """Return the names of the cluster's nodes."""
        return set(self._nodes.get(cluster, ()))

    def table(self) -> ClusterTable:
        """Return the present state; the same object as last time if nothing was changed since."""
        if self._table is None:
            self._settle()
            levels = {length: dict(prefixes) for length, prefixes in self._owners.items()}
            self._table = ClusterTable(dict(self._clusters), levels, dict(self._regions))
        return self._table

    def _explicit_of(self, cluster: str) -> Iterator[_Prefix]:
        return (prefix for name, prefix in self._explicit if name == cluster)

    def _holder_of(self, cluster_id: int, but: str) -> str | None:
        if cluster_id == self._local_id:
            return "this cluster"
        for info in self._clusters.values():
            if info.cluster_id == cluster_id and info.name != but:
                return info.name
        return None

    def _forget(self, cluster: str, node: _Node) -> None:
        self._counts[cluster] -= len(node.prefixes)
        self._unclaim_all(cluster, node.prefixes)
        if node.region:
            for address in node.ips:
                _remove(self._regions, address, node.region)

    def _claim_all(self, cluster: str, prefixes: Iterable[_Prefix]) -> None:
        for length, value in prefixes:
            _add(self._claims[length], value, cluster)
            self._touched[length].add(value)

    def _unclaim_all(self, cluster: str, prefixes: Iterable[_Prefix]) -> None:
        for length, value in prefixes:
            _remove(self._claims[length], value, cluster)
            self._touched[length].add(value)

    def _settle(self) -> None:
        """Work out anew who owns the touched prefixes and all that lie inside one of them."""
        for length, claimed in self._claims.items():
            touched, owners = self._touched.get(length, set()), self._owners[length]
            for value in touched - claimed.keys():
                owners.pop(value, None)
            for value in (touched & claimed.keys()) | self._inside_touched(length):
                owners[value] = self._claimants(length, value)
        self._touched.clear()

    def _inside_touched(self, length: _Length) -> set[int]:
        around = [
            (length[1] - bits, values)
            for (size, bits), values in self._touched.items()
            if size == length[0] and bits < length[1]
        ]
        if not around:  # the usual case: all nodes have prefixes of one length
            return set()
        return {value for value in self._claims[length] if any(value >> n in values for n, values in around)}

    def _claimants(self, length: _Length, value: int) -> tuple[str, ...]:
        names = {
            name
            for name, ((size, bits), first) in self._explicit
            if size == length[0] and bits <= length[1] and value >> length[1] - bits == first
        } & self._clusters.keys()
        if names:  # the operator's word, which no record of another cluster makes ambiguous
            return tuple(sorted(names))
        for (size, bits), claimed in self._claims.items():
            if size == length[0] and bits <= length[1]:
                names.update(claimed.get(value >> length[1] - bits, ()))
        return tuple(sorted(names))


_K = TypeVar("_K", bound="Hashable")


def _add(claims: dict[_K, tuple[str, ...]], key: _K, name: str) -> None:
    # Two nodes may claim the same thing for a while (a node re-created under another name): count both.
    claims[key] = tuple(sorted((*claims.get(key, ()), name)))


def _remove(claims: dict[_K, tuple[str, ...]], key: _K, name: str) -> None:
    names = list(claims[key])
    names.remove(name)
    if names:
        claims[key] = tuple(names)
    else:
        del claims[key]


def _why_none(network: Network) -> str | None:
    """Return why this cannot be a node's pod CIDR; None if it may be."""
    if network.prefixlen < _WIDEST[network.version]:
        return f"pod CIDR {network} is too wide for a node"
    if network.is_loopback or network.is_link_local or network.is_multicast:
        return f"pod CIDR {network} is for no pods"
    return None


def _prefix(network: Network) -> _Prefix:
    bits = network.max_prefixlen
    return (bits // 8, network.prefixlen), int(network.network_address) >> bits - network.prefixlen


def _network(length: _Length, value: int) -> Network:
    size, bits = length
    first = value << 8 * size - bits
    return IPv4Network((first, bits)) if size == 4 else IPv6Network((first, bits))
