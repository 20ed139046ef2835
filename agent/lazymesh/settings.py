"""What a user can set, as frozen values: the command line makes them, the roles read them, nothing below knows them.

Every option exists as a flag, as ``LAZYMESH_<OPTION>`` in the environment and as a key of the YAML file given by
``--config``; click resolves the three in that order. Here stand only the values, checked once.
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
"""Below /run, so that it is gone with the kernel that it was compiled for."""
DEFAULT_CLUSTERMESH_CONFIG = Path("/var/lib/cilium/clustermesh")

_CLUSTER_NAME = re.compile(r"([a-z0-9][-a-z0-9]*)?[a-z0-9]")


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """Who we are in the mesh, and where the others' stores are described."""

    cluster_name: str
    cluster_id: int
    max_connected_clusters: int = 255
    """255 or 511, the same in the whole mesh: it decides which identities belong to which cluster."""
    clustermesh_config: Path = DEFAULT_CLUSTERMESH_CONFIG
    """Cilium's own directory: one etcd client file per cluster, named as the cluster."""
    remote_config: Path | None = None
    """The same for direct access to the owners' stores, where clustermesh_config leads to a local cache."""
    mesh_cidrs: tuple[tuple[str, Network], ...] = ()
    """Pod CIDRs given by hand, for platforms whose node records have none."""
    etcd_transport: str = "native"
    """What carries the etcd client's calls: our own HTTP/2, or grpcio."""
    region: str | None = None
    """Our region, to honour records of scope ``regional``; None accepts every scope."""

    def __post_init__(self) -> None:
        """Refuse what Cilium would refuse (cilium-formats 2.3)."""
        if not _CLUSTER_NAME.fullmatch(self.cluster_name) or len(self.cluster_name) > 32:
            raise SettingsError(
                f"--cluster-name {self.cluster_name!r}: at most 32 lower-case letters, digits and dashes"
            )
        if not 0 <= self.cluster_id <= self.max_connected_clusters:
            raise SettingsError(
                f"--cluster-id {self.cluster_id}: must lie in 1..{self.max_connected_clusters}"
            )
        # What they are when nobody gives them: another cluster with our id would not be refused then, nor a file that
        # describes our own cluster be passed over.
        if self.cluster_name == "default" or self.cluster_id == 0:
            raise SettingsError(
                "--cluster-name and --cluster-id: no cluster of a mesh is called default or has the id 0; give what"
                " Cilium's ConfigMap, cilium-config, has as cluster-name and cluster-id"
            )
        owners: dict[Network, str] = {}
        for name, network in self.mesh_cidrs:
            if owners.setdefault(network, name) != name:
                raise SettingsError(f"--mesh-cidr {network}: given to both {owners[network]} and {name}")


IPCACHE_SIZE = 512_000
"""Cilium's own."""
CILIUM_INTERFACES = ("lxc+",)
"""What Cilium calls its pods' host-side interfaces."""


@dataclass(frozen=True, slots=True)
class DatapathSettings:
    """What is attached where."""

    bpffs: Path = DEFAULT_BPFFS
    interfaces: tuple[str, ...] = ()
    """Pods' host-side interfaces; ``lxc+`` matches a prefix."""
    uplinks: tuple[str, ...] = ()
    attach: str = "auto"
    """tcx, clsact, or auto for the better one that the kernel has."""
    on_miss: str = "hold"
    """What becomes of a missed packet: hold, pass or drop."""
    hold_limit_s: float = 0.25
    """A held packet whose address is not answered by then is let go."""
    drop_on_timeout: bool = False
    """Let go means dropped, instead of passed on as world."""
    signal_rate: int = 250
    """New addresses per second that one pod may have resolved, after the first thousand; four times as many through
    an uplink, ten times from all. More of a scanning pod's would take the agent's time from the others' first packets
    (measured with etcd on the same two cores: at 250 their p99 doubles, at 1,000 it grows tenfold)."""
    ipcache_size: int = IPCACHE_SIZE
    """Entries of an ipcache of our own; Cilium's has the size that Cilium gave it."""
    program_cache: Path | None = DEFAULT_PROGRAM_CACHE
    """Keeps what BCC compiled for the next start."""
    mode: str = "standalone"
    """Where entries go: ``standalone``, into an ipcache of our own; ``cilium``, into that of the Cilium agent here;
    ``auto``, into Cilium's if there is one."""

    def __post_init__(self) -> None:
        """There must be something to attach to; beside Cilium it is known what its pods' interfaces are called."""
        if self.mode == "standalone" and not self.interfaces and not self.uplinks:
            raise SettingsError("nothing to attach to: give --interface (for example 'lxc+') or --uplink")


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Everything that ``lazymesh agent`` was told."""

    mesh: MeshSettings
    datapath: DatapathSettings
    policy: Path | None = None
    shadow: bool = False
    """Resolve and report; write nothing into the ipcache, enforce nothing, drop nothing."""
    stale_limit_s: float = 600.0
    """An entry that its cluster has not confirmed for so long, because it is silent, is taken out."""
    cleanup: bool = False
    """Leave no pin, filter or entry behind when stopped."""
    uninstall_mark: Path | None = None
    """While it is there and does not say ``false`` the agent is not ready, and stopped it does as ``cleanup``."""
    socket: Path = DEFAULT_SOCKET
    metrics_address: tuple[str, int] | None = field(default=None)


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
