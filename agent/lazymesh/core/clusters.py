"""Which cluster owns an address: the clusters of the mesh and the pod CIDRs that they claim.

A cluster claims the pod CIDRs of its node records, and those that the operator gives it with ``--mesh-cidr``
(for platforms whose nodes have none). What the operator gives to a cluster is that cluster's, whatever nodes of
others claim, and no cluster is asked while it is not joined. Otherwise an address has exactly one owner if every CIDR
around it is claimed by the same cluster; if two clusters claim it, at whatever prefix lengths, it is ambiguous and
neither is asked: a wrong owner would mean a wrong identity, so the longer prefix gets no benefit of the doubt
(requirements R17).

:class:`MeshState` follows the node records one by one; :class:`ClusterTable` is an immutable snapshot of it for the
resolver. Decoding records is left to records.py, reading them and writing the kernel's map of mesh CIDRs to the
shells.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from lazymesh.core.identities import IdentityRange
    from lazymesh.core.model import Address, Network, Space
    from lazymesh.core.records import NodeRecord

    _Length = tuple[int, int]
    """Bytes of the address (4 or 16), bits of the prefix."""
    _Prefix = tuple[_Length, int]
    """A prefix: its length, and its leading bits as a number."""
    _Level = dict[int, tuple[str, ...]]
    """Prefixes of one length, each with the sorted names of its clusters."""
    _Levels = dict[_Length, _Level]

MOST_CIDRS = 20_000
"""For one cluster's nodes: Kubernetes stops at 5,000 nodes, and the kernel's map of all clusters at 131,072 CIDRs."""
MOST_LENGTHS = 32
"""Prefix lengths of one cluster's nodes, both families together: a cluster has one or two for each of its pools, and
IPv4 alone cannot have more than 25. Each makes the lookup of an IPv6 address dearer."""
MOST_ADDRESSES = 40_000
"""For one cluster's nodes, in any region: 5,000 nodes with the eight addresses that count for each."""
_WIDEST = {4: 8, 6: 32}
"""Bits. No node has more addresses for its pods; one that claimed more would make other clusters' ambiguous."""

NO_OWNER = 0
"""Cluster id of CIDRs without an owner to ask: claimed by several clusters, or given to one that is not joined. No
cluster of a mesh has it."""


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """A cluster that is part of the mesh."""

    name: str
    cluster_id: int
    identities: IdentityRange
    spaces: tuple[tuple[Space, ...], ...]
    """Groups of spaces to read one after another, each group in one transaction; for example
    ``((CACHED,), (PUSHED, PULL_ONLY))``."""


@dataclass(frozen=True, slots=True)
class CidrChanges:
    """How to bring a map of mesh CIDRs from one table to another."""

    written: tuple[tuple[Network, int], ...]
    """New or changed CIDRs with their cluster ids."""
    deleted: tuple[Network, ...]


class ClusterTable:
    """A snapshot of the clusters and what they claim; made by :meth:`MeshState.table`."""

    __slots__ = ("_by_id", "_levels", "_neighbours", "_regions", "_search", "cluster")

    def __init__(
        self,
        clusters: Mapping[str, ClusterInfo],
        levels: _Levels,
        regions: Mapping[Address, tuple[str, ...]],
    ) -> None:
        self.cluster = clusters.get
        """Returns the cluster of this name; None if it is not joined."""
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
        self._neighbours = [
            size - 1 for size, found in self._search.items() if all(bits >= 8 for bits, _ in found)
        ]

    def owners(self, address: Address) -> tuple[str, ...]:
        """Return the names of the clusters that claim the address: none, one, or several if ambiguous.

        A cluster to which the operator gave it need not be joined.
        """
        value = int.from_bytes(address)
        for shift, prefixes in self._search[len(address)]:
            names = prefixes.get(value >> shift)
            if names:
                return names
        return ()

    def by_owners(self, addresses: Iterable[Address]) -> dict[tuple[str, ...], list[Address]]:
        """Return the addresses by their owners, those of one owner in their order."""
        found: defaultdict[tuple[str, ...], list[Address]] = defaultdict(list)
        alike: dict[bytes, list[Address]] = {}
        """By what they begin with: where no CIDR is that small, neighbours have the same owners."""
        for address in addresses:
            common = address[:-1]
            some = alike.get(common)
            if some is None:
                some = found[self.owners(address)]
                if len(common) in self._neighbours:
                    alike[common] = some
            some.append(address)
        return found

    def by_id(self, cluster_id: int) -> ClusterInfo | None:
        """Return the cluster with this id."""
        return self._by_id.get(cluster_id)

    def region_of(self, host_ip: Address) -> str | None:
        """Return the region of the node with this address; None if it is unknown, or if nodes disagree."""
        regions = self._regions.get(host_ip, ())
        return regions[0] if len(regions) == 1 else None

    def mesh_cidrs(self) -> Iterator[tuple[Network, int]]:
        """Yield every claimed CIDR with its cluster id, or NO_OWNER.

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
        cluster = self.cluster(names[0]) if len(names) == 1 else None
        return cluster.cluster_id if cluster else NO_OWNER


class _Node(NamedTuple):
    """What a node contributed, to be taken back when it goes; kept small, as a mesh has 30,000 nodes."""

    prefixes: tuple[_Prefix, ...] = ()
    ips: tuple[Address, ...] = ()
    """Empty if the node has no region: nothing else is looked up by them."""
    region: str = ""


_NOTHING = _Node()
_K = TypeVar("_K", bound="Hashable")


class _Claims(Generic[_K]):
    """Which clusters claim what. Nodes may share a claim for a while (one re-created under a new name): each counts."""

    def __init__(self) -> None:
        self.names: dict[_K, tuple[str, ...]] = {}
        """Each name once, unordered; a tuple rather than a set for each key, as there is mostly one name."""
        self._more: Counter[tuple[_K, str]] = Counter()
        """Repeated claims of a key by the same name, beyond the first; there are hardly any."""

    def add(self, key: _K, name: str) -> None:
        """Count a claim."""
        names = self.names.get(key, ())
        if name in names:
            self._more[key, name] += 1
        else:
            self.names[key] = (*names, name)

    def remove(self, key: _K, name: str) -> None:
        """Take back a claim that was counted."""
        more = self._more.pop((key, name), 0)
        if more > 1:
            self._more[key, name] = more - 1
        elif not more:
            left = tuple([other for other in self.names[key] if other != name])
            if left:
                self.names[key] = left
            else:
                del self.names[key]


class MeshState:
    """The clusters and their nodes as they come and go; the end state does not depend on the order of events.

    ``local_id`` is this node's own cluster id, ``explicit`` the CIDRs of ``--mesh-cidr``, which count whether or not
    their clusters are joined: otherwise a cluster that is down would leave its addresses to any other that claims them.
    """

    def __init__(self, local_id: int = 0, explicit: Iterable[tuple[str, Network]] = ()) -> None:
        self._local_id = local_id
        self._explicit = tuple((cluster, _prefix(network)) for cluster, network in explicit)
        self._clusters: dict[str, ClusterInfo] = {}
        self._nodes: dict[str, dict[str, _Node]] = {}
        self._lengths: dict[str, Counter[_Length]] = defaultdict(Counter)
        """By cluster, how many pod CIDRs of each length its nodes have."""
        self._addresses: Counter[str] = Counter()
        """By cluster, how many addresses its nodes with a region have."""
        self._claims: dict[_Length, _Claims[int]] = defaultdict(_Claims)
        self._owners: _Levels = defaultdict(dict)
        self._regions: _Claims[Address] = _Claims()
        self._touched: dict[_Length, set[int]] = defaultdict(set)
        self._table: ClusterTable | None = None
        for cluster, prefix in self._explicit:
            self._claim_all(cluster, (prefix,))

    def join(self, info: ClusterInfo) -> str | None:
        """Add the cluster, or update its description; return why not, if it is refused.

        Under another id than before it starts over: nodes learned under the old one are forgotten. A refused
        cluster is out, whatever it was before.
        """
        known = self._clusters.get(info.name)
        if known and known.cluster_id != info.cluster_id:
            self.leave(info.name)
            known = None
        taken = self._holder_of(info.cluster_id, but=info.name)
        if taken:
            return f"cluster id {info.cluster_id} is already used by {taken}"
        if not known:
            self._nodes[info.name] = {}
        self._clusters[info.name] = info
        self._table = None
        return None

    def leave(self, cluster: str) -> None:
        """Forget the cluster, its nodes and their CIDRs."""
        if self._clusters.pop(cluster, None):
            for node in self._nodes.pop(cluster).values():
                self._forget(cluster, node)
            self._table = None

    def upsert_node(self, node: NodeRecord) -> str | None:
        """Take a node's record, new or changed; if it is refused, forget the node and return why."""
        cluster = self._clusters.get(node.cluster)
        if cluster is None:
            return f"cluster {node.cluster} is not joined"
        if node.cluster_id != cluster.cluster_id:
            self.delete_node(node.cluster, node.name)
            return f"node {node.name} says cluster id {node.cluster_id}, but its cluster says {cluster.cluster_id}"
        known = self._nodes[node.cluster].get(node.name, _NOTHING)
        new = _Node(tuple(dict.fromkeys(map(_prefix, node.pod_cidrs))))
        if node.region and node.node_ips:
            new = _Node(new.prefixes, tuple(dict.fromkeys(node.node_ips)), node.region)
        if new == known:  # a restarted kvstoremesh rewrites every record
            return None
        refusal = next(filter(None, map(_why_none, node.pod_cidrs)), None) or self._too_much(node, new, known)
        if refusal or new == _NOTHING:
            self.delete_node(node.cluster, node.name)
            return refusal
        self._nodes[node.cluster][node.name] = new
        self._remember(node.cluster, new)
        self._forget(node.cluster, known)
        self._table = None
        return None

    def delete_node(self, cluster: str, name: str) -> None:
        """Forget a node, if it is known."""
        node = self._nodes.get(cluster, {}).pop(name, None)
        if node:
            self._forget(cluster, node)
            self._table = None

    def node_names(self, cluster: str) -> set[str]:
        """Return the names of the cluster's nodes."""
        return set(self._nodes.get(cluster, ()))

    def table(self) -> ClusterTable:
        """Return the present state; the same object as last time if nothing has changed since."""
        if self._table is None:
            self._settle()
            levels = {length: dict(prefixes) for length, prefixes in self._owners.items()}
            self._table = ClusterTable(dict(self._clusters), levels, dict(self._regions.names))
        return self._table

    def _holder_of(self, cluster_id: int, but: str) -> str | None:
        if cluster_id == self._local_id:
            return "this cluster"
        for info in self._clusters.values():
            if info.cluster_id == cluster_id and info.name != but:
                return info.name
        return None

    def _too_much(self, node: NodeRecord, new: _Node, known: _Node) -> str | None:
        """Return why the node must not replace what is known of it; None if it may."""
        lengths = self._lengths[node.cluster]
        if lengths.total() + len(new.prefixes) - len(known.prefixes) > MOST_CIDRS:
            return f"more than {MOST_CIDRS} pod CIDRs in one cluster"
        if len(lengths.keys() | {length for length, _ in new.prefixes}) > MOST_LENGTHS:
            return f"pod CIDRs of more than {MOST_LENGTHS} lengths in one cluster"
        if self._addresses[node.cluster] + len(new.ips) - len(known.ips) > MOST_ADDRESSES:
            return f"more than {MOST_ADDRESSES} node addresses in one cluster"
        return None

    def _remember(self, cluster: str, node: _Node) -> None:
        self._lengths[cluster].update([length for length, _ in node.prefixes])
        self._addresses[cluster] += len(node.ips)
        self._claim_all(cluster, node.prefixes)
        for address in node.ips:
            self._regions.add(address, node.region)

    def _forget(self, cluster: str, node: _Node) -> None:
        if node is _NOTHING:
            return
        self._lengths[cluster] -= Counter([length for length, _ in node.prefixes])  # drops those at zero
        self._addresses[cluster] -= len(node.ips)
        self._unclaim_all(cluster, node.prefixes)
        for address in node.ips:
            self._regions.remove(address, node.region)

    def _claim_all(self, cluster: str, prefixes: Iterable[_Prefix]) -> None:
        for length, value in prefixes:
            self._claims[length].add(value, cluster)
            self._touched[length].add(value)

    def _unclaim_all(self, cluster: str, prefixes: Iterable[_Prefix]) -> None:
        for length, value in prefixes:
            self._claims[length].remove(value, cluster)
            self._touched[length].add(value)

    def _settle(self) -> None:
        """Recompute who owns the touched prefixes, and all prefixes inside one that has changed: the widest first."""
        changed: dict[_Length, set[int]] = {}
        for length in sorted(self._claims):
            claimed, owners = self._claims[length].names, self._owners[length]
            wider, changes = self._wider(length), set[int]()
            for value in self._touched[length] | self._inside(changed, length):
                before = owners.pop(value, ())
                names = self._claimants(length, value, wider) if value in claimed else ()
                if names:
                    owners[value] = names
                if names != before:
                    changes.add(value)
            if changes:
                changed[length] = changes
            if not claimed:  # an unused length must not cost every lookup
                del self._claims[length], self._owners[length]
        self._touched.clear()

    def _inside(self, changed: dict[_Length, set[int]], length: _Length) -> set[int]:
        around = [(length[1] - bits, values) for (size, bits), values in changed.items() if size == length[0]]
        if not around:  # the usual case: all nodes have prefixes of one length
            return set()
        return {
            value for value in self._claims[length].names if any(value >> n in values for n, values in around)
        }

    def _wider(self, length: _Length) -> list[tuple[int, _Level]]:
        """Return the owners of wider prefixes, the longest first, each with how many bits shorter they are."""
        return [
            (length[1] - bits, owners)
            for (size, bits), owners in sorted(self._owners.items(), reverse=True)
            if size == length[0] and bits < length[1]
        ]

    def _claimants(self, length: _Length, value: int, wider: list[tuple[int, _Level]]) -> tuple[str, ...]:
        names = {
            name
            for name, ((size, bits), first) in self._explicit
            if size == length[0] and bits <= length[1] and value >> length[1] - bits == first
        }
        if names:  # the operator has decided: no record of another cluster makes it ambiguous
            return tuple(sorted(names))
        names.update(self._claims[length].names[value])
        for bits, owners in wider:
            around = owners.get(value >> bits)
            if around:  # it includes the claims of all that lie around it in turn
                names.update(around)
                break
        return tuple(sorted(names))


def _why_none(network: Network) -> str | None:
    """Return why this cannot be a node's pod CIDR; None if it may be."""
    if network.prefixlen < _WIDEST[network.version]:
        return f"pod CIDR {network} is too wide for a node"
    if network.is_loopback or network.is_link_local or network.is_multicast:
        return f"pod CIDR {network} cannot be used for pods"
    return None


def _prefix(network: Network) -> _Prefix:
    bits = network.max_prefixlen
    return (bits // 8, network.prefixlen), int(network.network_address) >> bits - network.prefixlen


def _network(length: _Length, value: int) -> Network:
    size, bits = length
    first = value << 8 * size - bits
    return IPv4Network((first, bits)) if size == 4 else IPv6Network((first, bits))
