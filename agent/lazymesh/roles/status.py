"""What ``lazymesh status`` and the probes report of a running agent, read from its parts at the moment of asking."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lazymesh import __version__
from lazymesh.core.model import Direction, Reason
from lazymesh.datapath.settingsmap import OnMiss
from lazymesh.errors import LazymeshError
from lazymesh.roles.announce import is_marked

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from pathlib import Path

    from lazymesh.core.resolver import Limits, Resolver
    from lazymesh.datapath.holdmaps import HoldCounterMap
    from lazymesh.datapath.interfaces import InterfaceFollower
    from lazymesh.datapath.program import Datapath
    from lazymesh.datapath.signals import SignalReader
    from lazymesh.roles.driver import Driver, Shadow
    from lazymesh.roles.holding import Holding
    from lazymesh.roles.ipcaches import NodeIpcaches
    from lazymesh.roles.link import ClusterLink
    from lazymesh.roles.mesh import Mesh
    from lazymesh.settings import AgentSettings


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a running agent."""

    settings: AgentSettings
    datapath: Datapath
    ipcaches: NodeIpcaches
    mesh: Mesh
    resolver: Resolver
    driver: Driver
    shadow: Shadow | None
    follower: InterfaceFollower
    holding: Holding
    hold_counters: HoldCounterMap
    reader: SignalReader
    limits: Limits
    attached: threading.Event
    """Set once the programs are on the interfaces that were there at the start."""
    started: float


class Starting:
    """What an agent reports before it has parts to look at."""

    def __init__(self, settings: AgentSettings, started: float) -> None:
        self._settings = settings
        self._started = started
        self._waits_for = "programs are not attached yet"
        self._wrong: list[str] = []

    def wait_for_cilium(self, directory: Path) -> None:
        """Report that Cilium must come first."""
        self._waits_for = f"waiting for Cilium to pin its ipcache in {directory}"
        self._wrong.append(
            "nothing is resolved until Cilium has pinned its ipcache: check that its agent starts on this node, with"
            " the BPF file system of --bpffs"
        )

    def not_ready(self) -> str:
        """Return what readiness waits for."""
        return self._waits_for

    def describe(self) -> dict[str, Any]:
        """Return as much of ``lazymesh status`` as is known by now."""
        return _head(self._settings, self._started, self._waits_for) | {"wrong": self._wrong}

    def refuse(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Refuse a request that only the parts could answer."""
        return {"error": f"the agent is still starting: {self._waits_for}"}


class Status:
    """Looks at the parts; owns and changes nothing."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def not_ready(self) -> str | None:
        """Return what readiness still waits for; None when ready."""
        if not self.parts.attached.is_set():
            return "programs are not attached yet"
        if self.parts.holding.state == "starting":
            return "the holder is not up yet"
        if is_marked(self.parts.settings.uninstall_mark):
            return "marked to be uninstalled: it cleans up when it is stopped"
        waiting = [name for name, link in self.parts.mesh.links.items() if not link.tried]
        return f"clusters not listed yet: {', '.join(sorted(waiting))}" if waiting else None

    def packets(self, direction: Direction) -> dict[str, int]:
        """Return the kernel's counters of one direction by name."""
        return asdict(self.parts.datapath.counters.read(direction))

    def describe(self) -> dict[str, Any]:
        """Return what ``lazymesh status`` shows, as an object."""
        settings, counts = self.parts.settings, self.parts.resolver.counts
        clusters = self.parts.resolver.clusters
        return _head(settings, self.parts.started, self.not_ready()) | {
            "datapath": {
                "mode": self.parts.ipcaches.mode,
                "shadow": settings.shadow,
                "interfaces": {
                    name: d.name.lower() for name, d in sorted(self.parts.follower.attached.items())
                },
                "attach": self.parts.follower.attach,
                "onMiss": OnMiss(self.parts.datapath.config.read().on_miss).name.lower(),
                "holding": self.parts.holding.summary,
                "policy": str(settings.policy) if settings.policy else "none",
                "ipcache": self.parts.ipcaches.describe(),
                "packets": {d.name.lower(): self.packets(d) for d in Direction},
            },
            "entries": {
                "owned": self.parts.resolver.owned,
                "budget": self.parts.limits.owned,
                "stale": sum(self.parts.resolver.stale.values()),
                "mapSize": self.parts.ipcaches.maps[0].max_entries,
                **({"shadowChanges": self.parts.shadow.changes_total} if self.parts.shadow else {}),
            },
            "queue": {
                "waiting": self.parts.resolver.queued,
                "inFlight": sum(reads.in_flight for reads in clusters.values()),
                "negative": counts["absent"],
                "muted": self.parts.reader.crowded,
                "admitted": round(self.parts.resolver.admission.share, 3),
            },
            "clusters": [
                self._cluster(name) for name in sorted({*self.parts.mesh.links, *self.parts.mesh.file_errors})
            ],
            "wrong": list(self._wrong()),
        }

    def _cluster(self, name: str) -> dict[str, Any]:
        link, info, reads = (
            self.parts.mesh.links.get(name),
            self.parts.mesh.table.cluster(name),
            self.parts.resolver.clusters.get(name),
        )
        nodes, identities = link.sizes if link else (0, 0)
        client = link.client.info if link else None
        return {
            "name": name,
            "id": info.cluster_id if info else None,
            "state": link.state if link else "refused",
            "problem": (link and (problem_of(link) or link.addresses.problem))
            or self.parts.mesh.file_errors.get(name),
            "ownerProblem": link.owner.problem if link else None,
            "nodes": nodes,
            "identities": identities,
            "staleEntries": self.parts.resolver.stale.get(name, 0),
            "watchedKeys": link.addresses.watched_keys if link else 0,
            "watchedRanges": link.addresses.watched_ranges if link else 0,
            "breaker": reads.breaker if reads else "closed",
            "inFlight": reads.in_flight if reads else 0,
            "endpoint": client.endpoint if client else None,
            "etcdClusterId": f"{client.cluster_id:x}" if client and client.cluster_id else None,
            "revision": client.revision if client else None,
            "reconnects": client.reconnects if client else 0,
        }

    def problems(self) -> int:
        """Count what is wrong; a check that fails counts as one more, since a scrape must get an answer."""
        count = 0
        try:
            for _ in self._wrong():
                count += 1
        except (OSError, ValueError, LazymeshError):
            count += 1
        return count

    def _wrong(self) -> Iterator[str]:
        """Yield a line for everything that is wrong."""
        for check in (
            self._about_interfaces,
            self.parts.ipcaches.problems,
            self._about_maps,
            self._about_misses,
            self._about_mesh,
            self._about_clusters,
        ):
            yield from check()

    def _about_interfaces(self) -> Iterator[str]:
        wanted, follower = self.parts.settings.datapath, self.parts.follower
        carried = follower.attached.values()
        if not carried:
            yield "not attached to any interface: no miss is seen; check --interface and --uplink"
        elif wanted.uplinks and Direction.INGRESS not in carried:
            yield "not attached to any uplink: incoming traffic is neither resolved nor policed; check --uplink"
        elif wanted.interfaces and Direction.EGRESS not in carried:
            yield "not attached to any pod interface: pods' traffic is neither resolved nor policed; check --interface"
        for name, reason in follower.failed:
            yield f"cannot attach to {name}: {reason}; its misses are not seen"
        for name in follower.behind:
            yield f"another program insists on being ahead of ours on {name}: ours does not see what that one decides"

    def _about_maps(self) -> Iterator[str]:
        pins = self.parts.datapath.pins
        if missing := pins.missing(own_ipcache=not self.parts.ipcaches.shared):
            yield (
                f"{len(missing)} pins are gone from {pins.directory}, {missing[0]} among them: this agent keeps"
                " working, but commands and the next agent find nothing; restart it to pin them again"
            )
        if full := self.parts.resolver.absent.get(Reason.MAP_FULL):
            yield (
                f"{full} addresses have no entry because the ipcache map is full: `lazymesh ipcache list` shows who"
                " owns its entries"
            )

    def _about_misses(self) -> Iterator[str]:
        holding, resolver = self.parts.holding, self.parts.resolver
        if holding.problem and self.parts.datapath.config.read().on_miss == OnMiss.HOLD:
            yield f"packets are not held, and pass when they miss: {holding.problem}"
        if self.parts.reader.crowded:
            yield "signals are muted: misses arrive faster than they can be resolved"
        admission = resolver.admission
        if admission.share < 1:
            yield (
                f"misses are throttled to {admission.share:.0%} of --signal-rate: they arrived faster than they could"
                f" be answered (99th percentile {admission.p99 * 1000:.0f} ms)"
            )
        if unknown := resolver.absent.get(Reason.UNKNOWN_IDENTITY):
            yield (
                f"{unknown} addresses are refused because their clusters do not publish their identities, so"
                " no policy can select them: `lazymesh misses` lists them"
            )

    def _about_mesh(self) -> Iterator[str]:
        mesh = self.parts.mesh
        if mesh.problem:
            yield f"the pod CIDRs in force are out of date: {mesh.problem}"
        if mesh.unread:
            yield f"clusters are followed by their last known configuration: {mesh.unread}"
        if mesh.no_cluster:
            yield mesh.no_cluster
        for name in sorted(mesh.unknown_owners):
            yield f"--mesh-cidr names cluster {name}, which is not configured: its addresses cannot be resolved"

    def _about_clusters(self) -> Iterator[str]:
        mesh, stale = self.parts.mesh, self.parts.resolver.stale
        for name, link in sorted(mesh.links.items()):
            if link.state != "ready":
                kept = f" ({stale[name]} entries are kept as last known)" if name in stale else ""
                yield f"cluster {name} is {link.state}{kept}: {problem_of(link) or 'not listed yet'}"
            elif link.addresses.problem:
                yield f"cluster {name}: the last read failed: {link.addresses.problem}"
            if owner_problem := link.owner.problem:
                yield f"cluster {name}: its own store is not followed: {owner_problem}"
        for name, error in sorted(mesh.file_errors.items()):
            yield f"cluster {name}: {error}"
        for name, count in sorted(stale.items()):
            if name not in mesh.links:
                yield (
                    f"{count} entries are kept as last known: their cluster ({name}) has not joined since this agent"
                    " started"
                )


def _head(settings: AgentSettings, started: float, not_ready: str | None) -> dict[str, Any]:
    return {
        "version": __version__,
        "uptimeSeconds": round(time.monotonic() - started, 3),
        "cluster": settings.mesh.cluster_name,
        "ready": not_ready is None,
        "notReady": not_ready,
    }


def problem_of(link: ClusterLink) -> str | None:
    """Return why a cluster is not ready, None when it is; for a lost store, why it does not come back."""
    info = link.client.info
    gone = link.state == "silent" and not info.endpoint
    return (info.last_error if gone else None) or link.problem
