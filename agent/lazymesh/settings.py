"""What a user can set, as frozen values: made by the command line, read by the roles, unknown below them.

Every option exists as a flag, as ``LAZYMESH_<OPTION>`` in the environment and as a key of the YAML file given by
``--config``; click looks for it in that order. This module has only the values, checked once.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lazymesh.errors import SettingsError

if TYPE_CHECKING:
    from lazymesh.core.model import Network

DEFAULT_BPFFS = Path("/sys/fs/bpf")
DEFAULT_SOCKET = Path("/run/lazymesh/agent.sock")
DEFAULT_PROGRAM_CACHE = Path("/run/lazymesh/programs.json")
"""Below /run, so that it goes with the kernel that it was compiled for."""
DEFAULT_CLUSTERMESH_CONFIG = Path("/var/lib/cilium/clustermesh")

_CLUSTER_NAME = re.compile(r"([a-z0-9][-a-z0-9]*)?[a-z0-9]")


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """Which cluster this is, and where the files about the others' stores are."""

    cluster_name: str
    cluster_id: int
    max_connected_clusters: int = 255
    """255 or 511, the same in the whole mesh: it decides which identities belong to which cluster."""
    clustermesh_config: Path = DEFAULT_CLUSTERMESH_CONFIG
    """Cilium's own directory: one etcd client file per cluster, named after the cluster."""
    remote_config: Path | None = None
    """The same for direct access to the clusters' own stores, where clustermesh_config leads to a local cache."""
    mesh_cidrs: tuple[tuple[str, Network], ...] = ()
    """Pod CIDRs assigned by the operator, for instance where node records have none."""
    etcd_transport: str = "native"
    """What carries the etcd client's calls: our own HTTP/2, or grpcio."""
    region: str | None = None
    """Our region, for records of scope ``regional``; None accepts every scope."""

    def __post_init__(self) -> None:
        """Refuse what Cilium would refuse (cilium-formats 2.3)."""
        if not _CLUSTER_NAME.fullmatch(self.cluster_name) or len(self.cluster_name) > 32:
            raise SettingsError(
                f"--cluster-name {self.cluster_name!r}: use at most 32 lower-case letters, digits and dashes"
            )
        if not 0 <= self.cluster_id <= self.max_connected_clusters:
            raise SettingsError(
                f"--cluster-id {self.cluster_id}: must be in 1..{self.max_connected_clusters}"
            )
        # The defaults, which are Cilium's outside of a mesh. With them, another cluster with our id would not be
        # refused, nor a file about our own cluster skipped.
        if self.cluster_name == "default" or self.cluster_id == 0:
            raise SettingsError(
                "--cluster-name and --cluster-id: no cluster of a mesh is called default or has the id 0; give what"
                " Cilium's ConfigMap, cilium-config, has as cluster-name and cluster-id"
            )
        owners: dict[Network, str] = {}
        for name, network in self.mesh_cidrs:
            if owners.setdefault(network, name) != name:
                raise SettingsError(
                    f"--mesh-cidr {network}: assigned to both {owners[network]} and {name}; keep one"
                )


IPCACHE_SIZE = 512_000
"""Cilium's own default."""
CILIUM_INTERFACES = ("lxc+",)
"""Cilium's names for the host-side interfaces of pods."""


@dataclass(frozen=True, slots=True)
class DatapathSettings:
    """What is attached where, and what the programs do."""

    bpffs: Path = DEFAULT_BPFFS
    interfaces: tuple[str, ...] = ()
    """Host-side interfaces of pods; ``lxc+`` matches a prefix."""
    uplinks: tuple[str, ...] = ()
    attach: str = "auto"
    """tcx, clsact, or auto for the better of those that the kernel has."""
    on_miss: str = "hold"
    """What to do with a missed packet: hold, pass or drop."""
    hold_limit_s: float = 0.25
    """How long a packet is held without an answer."""
    drop_on_timeout: bool = False
    """Drop such a packet, instead of passing it as world."""
    signal_rate: int = 250
    """New addresses per second that are resolved for one pod, after the first thousand; four times as many for an
    uplink, ten times for the node. With more of them a scanning pod would delay the first packets of the others
    (measured with etcd on the same two cores: at 250 their p99 doubles, at 1,000 it grows tenfold)."""
    ipcache_size: int = IPCACHE_SIZE
    """Entries of an ipcache of our own; Cilium sets the size of its own."""
    program_cache: Path | None = DEFAULT_PROGRAM_CACHE
    """Where what BCC compiled is kept for the next start; None keeps nothing."""
    mode: str = "standalone"
    """Where entries go: ``standalone``, into an ipcache of our own; ``cilium``, into that of the Cilium agent here;
    ``auto``, into Cilium's if there is one."""

    def __post_init__(self) -> None:
        """Refuse having nothing to attach to; beside Cilium the names of the pods' interfaces are known."""
        if self.mode == "standalone" and not self.interfaces and not self.uplinks:
            raise SettingsError("nothing to attach to: give --interface (for example 'lxc+') or --uplink")


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """All settings of ``lazymesh agent``."""

    mesh: MeshSettings
    datapath: DatapathSettings
    policy: Path | None = None
    shadow: bool = False
    """Resolve and report only: write nothing to the ipcache, enforce nothing, hold and drop nothing."""
    stale_limit_s: float = 600.0
    """How long an entry is kept that its cluster does not confirm because it cannot be reached."""
    cleanup: bool = False
    """When stopped, remove all pins, programs and entries."""
    uninstall_mark: Path | None = None
    """While this file exists, unless it is empty or says ``false``: as ``cleanup``, and the agent is not ready."""
    socket: Path = DEFAULT_SOCKET
    metrics_address: tuple[str, int] | None = field(default=None)

    @property
    def holds(self) -> bool:
        """Whether missed packets are held from the start."""
        return self.datapath.on_miss == "hold" and not self.shadow


def parse_mesh_cidr(text: str) -> tuple[str, Network]:
    """Read ``CLUSTER=CIDR``."""
    cluster, equals, cidr = text.partition("=")
    try:
        if not equals or not cluster:
            raise ValueError("no cluster")
        return cluster, ipaddress.ip_network(cidr)
    except ValueError as exc:
        raise SettingsError(
            f"--mesh-cidr {text}: write CLUSTER=CIDR, for example b=10.2.0.0/16 ({exc})"
        ) from exc


def parse_host_port(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT``, IPv6 hosts in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"--metrics-address {text}: write HOST:PORT, for example 127.0.0.1:9968")
    return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104 (an empty host means all, as everywhere)
