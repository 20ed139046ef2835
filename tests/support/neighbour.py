"""More clusters for a lab: an etcd of its own on node a, or several, with whatever records a test gives it."""

from __future__ import annotations

import base64
import ipaddress
import json
from typing import TYPE_CHECKING, Any, Self

from tests.support.etcd import EtcdCluster, EtcdServer, EtcdSettings, free_port
from tests.support.lab import NODE_B

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.lab import Lab


class Neighbour:
    """One more cluster, not joined until told so.

    cached: the etcd is a kvstoremesh's copy of it. etcd: instead of a plain one of its own, not entered yet. access:
    further lines of the client configuration, such as certificates.
    """

    def __init__(
        self,
        lab: Lab,
        name: str,
        cluster_id: int,
        *,
        cached: bool = False,
        etcd: EtcdServer | EtcdCluster | None = None,
        access: str = "",
    ) -> None:
        self.name, self.cluster_id, self.cached = name, cluster_id, cached
        self._lab = lab
        self._access = access
        self.etcd = etcd or EtcdServer(
            EtcdSettings(command_prefix=tuple(lab.node_a.command())), port=free_port()
        )

    def __enter__(self) -> Self:
        self.etcd.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()
        self.etcd.close()

    def describe(self, **changes: Any) -> None:
        """Write the cluster's description of itself, with some fields or capabilities changed."""
        capabilities = {"syncedCanaries": True, "maxConnectedClusters": 255, "cached": self.cached}
        config = {"id": changes.pop("id", self.cluster_id), "capabilities": capabilities | changes}
        self.etcd.put(f"cilium/cluster-config/{self.name}", json.dumps(config))

    def complete(self, what: Iterable[str] = ("nodes", "services", "identities", "ip")) -> None:
        """Write canaries: everything of these kinds is there."""
        for kind in what:
            self.etcd.put(f"cilium/synced/{self.name}/cilium/{self._tree}/{kind}/v1", "2026-01-01T00:00:00Z")

    def fill(self, *, cidrs: Iterable[str] = (), identities: Iterable[int] = ()) -> None:
        """Write all there is to a small cluster: one node with pod CIDRs, identities of servers."""
        self.publish_node(*cidrs)
        for number in identities:
            self.publish_identity(number)
        self.complete()
        self.describe()

    def publish_node(self, *cidrs: str, name: str = "n1", host: str = "192.168.100.2") -> None:
        """Write a node with these pod CIDRs, at most one of each family."""
        node: dict[str, Any] = {
            "Name": name,
            "Cluster": self.name,
            "ClusterID": self.cluster_id,
            "IPAddresses": [{"Type": "InternalIP", "IP": host}],
        }
        for cidr in cidrs:
            network = ipaddress.ip_network(cidr)
            mask = base64.b64encode(network.netmask.packed).decode()
            node[f"IPv{network.version}AllocCIDR"] = {"IP": str(network.network_address), "Mask": mask}
        self.etcd.put(self.node_key(name), json.dumps(node))

    def publish_identity(self, number: int, app: str = "server") -> None:
        """Write an identity with one label that policies look at."""
        labels = f"k8s:app={app};k8s:io.cilium.k8s.policy.cluster={self.name};"
        self.etcd.put(self.identity_key(number), labels)

    def publish(self, ip: str, identity: int) -> None:
        """Write a pod's record."""
        pair = {"IP": ip, "Mask": None, "HostIP": "192.168.100.2", "ID": identity, "Key": 0, "Metadata": ""}
        self.etcd.put(self.ip_key(ip), json.dumps(pair))

    def node_key(self, name: str = "n1") -> str:
        """Return the key of a node."""
        return f"cilium/{self._tree}/nodes/v1/{self.name}/{name}"

    def identity_key(self, number: int) -> str:
        """Return the key of an identity."""
        middle = f"{self.name}/id" if self.cached else "id"
        return f"cilium/{self._tree}/identities/v1/{middle}/{number}"

    def ip_key(self, ip: str) -> str:
        """Return the key of a pushed or mirrored record."""
        return f"cilium/{self._tree}/ip/v1/{self.name if self.cached else 'default'}/{ip}"

    def withdraw(self, ip: str) -> None:
        """Delete a pod's record."""
        self.etcd.delete(self.ip_key(ip))

    def connect(self, cidr: str) -> None:
        """Let pods with addresses of this CIDR be reached, and answer."""
        self._lab.node_a.ip([f"route add {cidr} via {NODE_B[':' in cidr]}"])
        self._lab.node_b.ip([f"route add local {cidr} dev lo"])

    def join(self, *urls: str) -> None:
        """Write its clustermesh config file, whole or not at all; urls: instead of its etcd's own."""
        fresh = self._lab.directory / f"fresh-{self.name}"
        text = f"endpoints: {json.dumps(urls or self.etcd.urls)}\n{self._access}"
        fresh.write_text(text, encoding="ascii")
        fresh.rename(self._lab.config / self.name)

    def leave(self) -> None:
        """Remove the file."""
        (self._lab.config / self.name).unlink(missing_ok=True)

    @property
    def _tree(self) -> str:
        return "cache" if self.cached else "state"
