"""The contents of the benchmarks' stores: any number of clusters, nodes, identities and pods in Cilium's formats."""

from __future__ import annotations

import base64
import ipaddress
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

POD_CIDR = "10.64.0.0/10"
"""The benchmarks' pods of cluster ``b``; the lab's own pods are in 10.2.0.0/16."""
IDENTITY, HOST = 131_073, "192.168.100.2"
PUSHED, PULL_ONLY = "cilium/state/ip/v1/default/", "cilium/state/ip/v1/ondemand/"
_FIRST = int(ipaddress.ip_address("10.64.0.5"))

Pair = tuple[bytes, bytes]


def pod_ip(number: int) -> str:
    """Return the address of a pod."""
    return str(ipaddress.IPv4Address(_FIRST + number))


def pods(first: int, count: int) -> Iterator[Pair]:
    """Yield the records of pods, all of one identity and on one node."""
    for number in range(first, first + count):
        ip = pod_ip(number)
        value = (
            f'{{"IP":"{ip}","Mask":null,"HostIP":"{HOST}","ID":{IDENTITY},"Key":0,"Metadata":"","K8sNamespace":"default",'
            f'"K8sPodName":"server-{ip.replace(".", "-")}","K8sServiceAccount":"default"}}'
        )
        yield f"{PUSHED}{ip}".encode(), value.encode()


def cluster_b(nodes: int) -> Iterator[Pair]:
    """Yield the records of the lab's cluster ``b``, whose nodes have the benchmarks' pods."""
    capabilities = {"syncedCanaries": True, "maxConnectedClusters": 255}
    yield _pair("cilium/cluster-config/b", {"id": 2, "capabilities": capabilities})
    for resource in ("nodes", "services", "identities", "ip"):
        yield f"cilium/synced/b/cilium/state/{resource}/v1".encode(), b"2026-01-01T00:00:00Z"
    yield b"cilium/.heartbeat", b"2026-01-01T00:00:00Z"
    yield (
        f"cilium/state/identities/v1/id/{IDENTITY}".encode(),
        b"k8s:app=server;k8s:io.cilium.k8s.policy.cluster=b;",
    )
    address, mask = (
        base64.b64encode(b).decode() if isinstance(b, bytes) else b
        for b in ("10.64.0.0", bytes([255, 192, 0, 0]))
    )
    for number in range(nodes):
        node = {
            "Name": f"b-bench-{number}",
            "Cluster": "b",
            "IPAddresses": [{"Type": "InternalIP", "IP": HOST}],
            "IPv4AllocCIDR": {"IP": address, "Mask": mask},
            "ClusterID": 2,
        }
        yield _pair(f"cilium/state/nodes/v1/b/b-bench-{number}", node)


def mesh(first: int, clusters: int, nodes: int, identities: int) -> Iterator[Pair]:
    """Yield a kvstoremesh's cache of clusters, without their pods."""
    for cluster_id in range(first, first + clusters):
        yield from _cluster(f"cluster-{cluster_id}", cluster_id, nodes, identities)


def mesh_prefixes(first: int, clusters: int) -> list[str]:
    """Return the prefixes under which a reader finds the nodes and identities of these clusters."""
    names = [f"cluster-{number}" for number in range(first, first + clusters)]
    return [
        prefix
        for name in names
        for prefix in (f"cilium/cache/nodes/v1/{name}/", f"cilium/cache/identities/v1/{name}/id/")
    ]


def _cluster(name: str, cluster_id: int, nodes: int, identities: int) -> Iterator[Pair]:
    capabilities = {"syncedCanaries": True, "cached": True, "maxConnectedClusters": 255}
    yield _pair(f"cilium/cluster-config/{name}", {"id": cluster_id, "capabilities": capabilities})
    for resource in ("nodes", "services", "identities", "ip"):
        yield f"cilium/synced/{name}/cilium/cache/{resource}/v1".encode(), b"2026-01-01T00:00:00Z"
    for number in range(nodes):
        yield _node(name, cluster_id, number)
    for number in range(identities):
        labels = {
            "app": f"service-{number}",
            "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": f"team-{number % 40}",
            "io.cilium.k8s.policy.cluster": name,
            "io.cilium.k8s.policy.serviceaccount": "default",
            "io.kubernetes.pod.namespace": f"team-{number % 40}",
        }
        text = "".join(f"k8s:{key}={value};" for key, value in labels.items())
        identity = (cluster_id << 16) + 256 + number
        yield f"cilium/cache/identities/v1/{name}/id/{identity}".encode(), text.encode()


def _node(cluster: str, cluster_id: int, number: int) -> Pair:
    name = f"{cluster}-node-{number}"
    # 172.16.0.0/12 for nodes; each cluster has a /16 of pods, as long as 10.0.0.0/8 has any.
    host = str(ipaddress.IPv4Address(0xAC100000 + (cluster_id << 12) + number + 1))
    pods_v4 = base64.b64encode(bytes([255, 255, 255, 0])).decode()
    record = {
        "Name": name,
        "Cluster": cluster,
        "IPAddresses": [
            {"Type": "InternalIP", "IP": host},
            {"Type": "CiliumInternalIP", "IP": f"10.{cluster_id}.{number}.1"},
        ],
        "IPv4AllocCIDR": {"IP": f"10.{cluster_id}.{number}.0", "Mask": pods_v4},
        "IPv4SecondaryAllocCIDRs": None,
        "IPv6AllocCIDR": None,
        "IPv6SecondaryAllocCIDRs": None,
        "IPv4HealthIP": f"10.{cluster_id}.{number}.2",
        "IPv6HealthIP": "",
        "IPv4IngressIP": "",
        "IPv6IngressIP": "",
        "ClusterID": cluster_id,
        "Source": "custom-resource",
        "EncryptionKey": 0,
        "Labels": {
            "beta.kubernetes.io/arch": "amd64",
            "kubernetes.io/hostname": name,
            "kubernetes.io/os": "linux",
            "node.kubernetes.io/instance-type": "m6i.4xlarge",
            "topology.kubernetes.io/region": f"region-{cluster_id % 5}",
            "topology.kubernetes.io/zone": f"region-{cluster_id % 5}{'abc'[number % 3]}",
        },
        "Annotations": None,
        "NodeIdentity": 0,
        "WireguardPubKey": "",
        "BootID": "5d0f6f2e-3b5c-4c43-9c6a-6d2f3d6c2c11",
    }
    return _pair(f"cilium/cache/nodes/v1/{cluster}/{name}", record)


def _pair(key: str, value: object) -> Pair:
    return key.encode(), json.dumps(value, separators=(",", ":")).encode()
