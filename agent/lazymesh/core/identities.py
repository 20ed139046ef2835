"""Security identities as numbers: which cluster owns them, and which ones must never be installed.

An identity has 24 bits, the cluster id on top (cilium-formats 2.3). A peer that publishes an identity outside
its own range, a reserved number or one that only means something on its own node is either broken or lying:
stock Cilium accepts numbers below 256, and live meshes do carry identity 0 and 2 in pairs (cilium-live 3), so
lazymesh checks for itself. What an identity's labels allow is left to policy.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

WORLD = 2
WORLD_IDENTITIES = frozenset({WORLD, 9, 10})
"""World in single stack, and per family in dual stack: what the default route and pod CIDR entries carry."""

SCOPE_LOCAL = 0x01
"""Top byte of identities that only mean something on one node: those of CIDR and FQDN policies."""

FIRST_ALLOCATED = 256
"""Everything below is reserved, well-known or fixed by one cluster's user."""

_CLUSTER = "io.cilium.k8s.policy.cluster"
CLUSTER_LABEL = f"k8s:{_CLUSTER}"

_BITS = 24
_CLUSTER_BITS = {255: 8, 511: 9}


@dataclass(frozen=True, slots=True)
class IdentityRange:
    """The numbers, both ends included, from which a cluster allocates its identities."""

    first: int
    last: int

    def __contains__(self, identity: int) -> bool:
        return self.first <= identity <= self.last


def identity_range(cluster_id: int, max_connected_clusters: int) -> IdentityRange:
    """Return the cluster's range; ``max_connected_clusters`` is 255 or 511, the same throughout the mesh."""
    if not 0 <= cluster_id <= max_connected_clusters:
        raise ValueError(f"cluster id {cluster_id} is not in 0..{max_connected_clusters}")
    shift = _shift(max_connected_clusters)
    first = cluster_id << shift
    return IdentityRange(max(first, FIRST_ALLOCATED), first + (1 << shift) - 1)


def is_peer(identity: int) -> bool:
    """Return whether an ipcache entry with this identity is an answer, as defined in bpf/lazymesh.c (miss_of)."""
    return identity not in WORLD_IDENTITIES and identity >> _BITS != SCOPE_LOCAL


def check_identity(identity: int, of: IdentityRange) -> str | None:
    """Return why the identity must never be installed for a pod of the cluster ``of``; None if it may be."""
    if of.first <= identity <= of.last and FIRST_ALLOCATED <= identity < 1 << _BITS:
        return None
    if identity == 0:
        return "identity 0"
    if identity >> _BITS:
        return f"identity {identity} is local to a node"
    if identity < FIRST_ALLOCATED:
        return f"identity {identity} is reserved"
    return f"identity {identity} is not in the cluster's range {of.first}..{of.last}"


def check_labels(labels: Mapping[str, str], cluster: str) -> str | None:
    """Return why these labels must not be believed for an identity of the cluster; None if they may be.

    Cilium demands the cluster's own name in them: without it a peer could pose as another cluster's pod. So it could
    with the same label from a second source, since a selector without a source looks at all of them.
    """
    claimed = labels.get(CLUSTER_LABEL)
    if claimed is None:
        return "no cluster label"
    if claimed != cluster:
        return f"labels of cluster {claimed[:64]!r}"
    # Mostly one label has such a name, and one look at all of them is enough to see that.
    if (
        "\0".join(labels).count(_CLUSTER) > 1
        and sum([key.partition(":")[2] == _CLUSTER for key in labels]) > 1
    ):
        return "a second cluster label"
    return None


def _shift(max_connected_clusters: int) -> int:
    if max_connected_clusters not in _CLUSTER_BITS:
        raise ValueError(f"max-connected-clusters is {max_connected_clusters}, not 255 or 511")
    return _BITS - _CLUSTER_BITS[max_connected_clusters]
