"""What a stand-in for cilium-agent is, and what it knows of the cluster: settings, nodes, pods.

This is what Kubernetes and the peers' etcds say, whether an agent runs or not: each start lists it anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lazymesh.datapath.kernelfeatures import has_tcx
from tests.support.cilium_ipcache import (
    HOST,
    LAYOUTS,
    MAX_ENTRIES,
    REMOTE_CLUSTER,
    REMOTE_NODE,
    V2,
    Record,
    world_of,
)
from tests.support.lab import NODE_A, NODE_B, REMOTE_CIDRS, SERVER_IDENTITY

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from tests.support.lab import Pod

KINDS = [(layout, attach) for layout in ("v1", "v2") for attach in ("tcx", "clsact")]
"""Each layout, each way to attach."""
ROUTER_A = ("10.1.0.1", "fd00:10:1::1")
"""Of node a's ``cilium_host``, out of its pod CIDRs."""
LINK_LOCAL_A = "fe80::ff:fe01:0"
"""Of its uplink, as its hardware address makes it: the agent takes it for an address of the host."""
LOCAL_IDENTITY = 65_537
"""Of this cluster's pods; in cluster 1's range."""


@dataclass(frozen=True)
class CiliumSettings:
    """What kind of agent it is; the defaults are a dual-stack 1.19 or 1.20, by tcx where the kernel has it."""

    layout: str = "v2"
    map_flags: int | None = None
    """None: the usual ones of the layout (1.17: 1, 1.19 and later: 129). 1.18 has 1 with v2."""
    max_entries: int = MAX_ENTRIES
    dual_stack: bool = True
    upgraded: bool = False
    """A pin of the other layout is left from the version before, with what that knew."""
    allowed: Collection[int] | None = frozenset({SERVER_IDENTITY})
    """Identities that pods may talk to; everything else is denied. None: no egress policy."""
    ingress_allowed: Collection[int] | None = None
    """Identities that may talk to pods; None: no ingress policy."""
    attach: str = field(default_factory=lambda: "tcx" if has_tcx() else "clsact")
    filter_priority: int = 1
    wipes_filters: bool = True


@dataclass(frozen=True)
class RemoteNode:
    """A node of a peer, as its record has it."""

    name: str = "b-1"
    addresses: tuple[str, ...] = NODE_B
    cidrs: tuple[str, ...] = REMOTE_CIDRS
    key: int = 0


@dataclass
class World:
    """All records, by canonical prefix."""

    settings: CiliumSettings
    own: dict[str, Record] = field(default_factory=dict)
    """Reserved entries, this node, its pods, and other nodes: written first."""
    pods: dict[str, Record] = field(default_factory=dict)
    """The peers'."""

    def listing(self) -> list[tuple[str, Record | None]]:
        """Return everything in the order of a start: what needs no peer, then pods as etcd lists them, by text."""
        return [*self.own.items(), *sorted(self.pods.items())]

    def learn_node_a(self, pods: Iterable[Pod]) -> None:
        """Learn what the agent knows by itself: the world, its own node, its pods."""
        dual = self.settings.dual_stack
        self.own = {
            cidr: Record(world_of(cidr, dual)) for cidr in (("0.0.0.0/0", "::/0") if dual else ("0.0.0.0/0",))
        }
        self.own |= {address: Record(HOST) for address in (*NODE_A, *ROUTER_A, LINK_LOCAL_A)}
        for pod in pods:
            place = Record(LOCAL_IDENTITY, NODE_A[0], 0, f"pod{pod.number}", "default")
            self.own |= dict.fromkeys((pod.ipv4, pod.ipv6), place)

    def learn_node(self, node: RemoteNode) -> dict[str, Record]:
        """Learn a node of the peer and return its records: addresses, and since 1.18 its pod CIDRs as a fallback."""
        records = {address: Record(REMOTE_NODE, metadata_flags=REMOTE_CLUSTER) for address in node.addresses}
        if LAYOUTS[self.settings.layout] is V2:
            for cidr in node.cidrs:
                records[cidr] = Record(world_of(cidr, self.settings.dual_stack), node.addresses[0], node.key)
        self.own |= records
        return records


def pod_record(prefix: str, identity: int, more: dict[str, Any]) -> Record:
    """Return a peer's pod; the peer's host is a remote node here."""
    name = "server-" + prefix.replace(":", "-").replace(".", "-").replace("/", "-")
    words = {"host_ip": NODE_B[0], "pod": name, "namespace": "default"} | more
    return Record(REMOTE_NODE if identity == HOST else identity, **words)
