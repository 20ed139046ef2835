"""What people and Prometheus are told of a running agent: read from the parts at the moment of asking."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lazymesh import __version__
from lazymesh.core.model import Direction, Reason
from lazymesh.datapath.maps import OnMiss
from lazymesh.errors import LazymeshError
from lazymesh.kvstore.certificate import end_of_certificate
from lazymesh.roles import logs
from lazymesh.roles.announce import is_marked

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator
    from pathlib import Path

    from lazymesh.core.audit import AuditLog
    from lazymesh.core.resolver import Limits, Resolver
    from lazymesh.datapath.holdmaps import HoldCounterMap
    from lazymesh.datapath.interfaces import InterfaceFollower
    from lazymesh.datapath.program import Datapath
    from lazymesh.datapath.signals import SignalReader
    from lazymesh.metrics import Metrics, Sample
    from lazymesh.roles.control import ControlServer
    from lazymesh.roles.driver import Driver, Shadow
    from lazymesh.roles.holding import Holding
    from lazymesh.roles.ipcaches import NodeIpcaches
    from lazymesh.roles.link import ClusterLink
    from lazymesh.roles.mesh import Mesh
    from lazymesh.settings import AgentSettings


@dataclass(frozen=True, slots=True)
class Parts:
    """The running parts of an agent."""

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
    attached: asyncio.Event
    """Set once the programs are on the interfaces that were there at start."""
    started: float


class Starting:
    """What is told of an agent that has no parts to look at yet."""

    def __init__(self, settings: AgentSettings, started: float) -> None:
        self._settings = settings
        self._started = started
        self._waits_for = "programs are not attached yet"
        self._wrong: list[str] = []

    def wait_for_cilium(self, directory: Path) -> None:
        """Say that Cilium has to come first."""
        self._waits_for = f"waiting for Cilium to pin its ipcache in {directory}"
        self._wrong.append(
            "nothing is resolved before Cilium has pinned its ipcache: does its agent start on this node, with the BPF"
            " file system of --bpffs?"
        )

    def not_ready(self) -> str:
        """Return what readiness waits for."""
        return self._waits_for

    def describe(self) -> dict[str, Any]:
        """Return what there is by now of ``lazymesh status``."""
        return _head(self._settings, self._started, self._waits_for) | {"wrong": self._wrong}

    def refuse(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Answer what only the parts could."""
        return {"error": f"the agent is still starting: {self._waits_for}"}


class Status:
    """Looks at the parts; owns and changes nothing."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def not_ready(self) -> str | None:
        """Return what readiness still waits for, None when ready."""
        if not self.parts.attached.is_set():
            return "programs are not attached yet"
        if self.parts.holding.state == "starting":
            return "the holder is not up yet"
        if is_marked(self.parts.settings.uninstall_mark):
            return "marked to be uninstalled: stopped, it leaves nothing behind"
        waiting = [name for name, link in self.parts.mesh.links.items() if not link.tried]
        return f"clusters not listed yet: {', '.join(sorted(waiting))}" if waiting else None

    def packets(self, direction: Direction) -> dict[str, int]:
        """Return the kernel's counters of one direction by name."""
        return asdict(self.parts.datapath.counters.read(direction))

    def describe(self) -> dict[str, Any]:
        """Return the one screen of ``lazymesh status`` as an object."""
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
                "holding": self.parts.holding.state,
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
            "problem": (link and (problem_of(link) or link.read_problem))
            or self.parts.mesh.file_errors.get(name),
            "ownerProblem": link.owner_problem if link else None,
            "nodes": nodes,
            "identities": identities,
            "staleEntries": self.parts.resolver.stale.get(name, 0),
            "watchedKeys": link.watched_keys if link else 0,
            "watchedRanges": link.watched_ranges if link else 0,
            "breaker": reads.breaker if reads else "closed",
            "inFlight": reads.in_flight if reads else 0,
            "endpoint": client.endpoint if client else None,
            "etcdClusterId": f"{client.cluster_id:x}" if client and client.cluster_id else None,
            "revision": client.revision if client else None,
            "reconnects": client.reconnects if client else 0,
        }

    def problems(self) -> int:
        """Count what is wrong; what cannot be told counts as one more, for who scrapes must get an answer."""
        count = 0
        try:
            for _ in self._wrong():
                count += 1
        except (OSError, ValueError, LazymeshError):
            count += 1
        return count

    def _wrong(self) -> Iterator[str]:
        wanted, carried = self.parts.settings.datapath, self.parts.follower.attached.values()
        if not carried:
            yield "no interface carries the program: does --interface match any?"
        elif wanted.uplinks and Direction.INGRESS not in carried:
            yield "no uplink carries the program, what comes in is not seen and not judged: does --uplink match any?"
        elif wanted.interfaces and Direction.EGRESS not in carried:
            yield (
                "no pod's interface carries the program, what pods send is not seen and not judged: does --interface"
                " match any?"
            )
        for name, reason in self.parts.follower.failed:
            yield f"cannot attach to {name}: {reason}: its misses are not seen"
        for name in self.parts.follower.behind:
            yield f"another program insists on being ahead of ours on {name}: what it decides we never see"
        yield from self.parts.ipcaches.problems()
        yield from self._about_maps()
        holding = self.parts.holding
        if holding.problem and self.parts.datapath.config.read().on_miss == OnMiss.HOLD:
            yield f"packets are not held, missed ones are passed on: {holding.problem}"
        if self.parts.reader.crowded:
            yield "signals are muted: misses come faster than they can be resolved"
        admission = self.parts.resolver.admission
        if admission.share < 1:
            yield (
                f"only {admission.share:.0%} of --signal-rate is let in: misses came faster than they could be answered"
                f" (99th percentile {admission.p99 * 1000:.0f} ms)"
            )
        if unknown := self.parts.resolver.absent.get(Reason.UNKNOWN_IDENTITY):
            yield (
                f"{unknown} addresses are refused because their clusters do not publish their identities, without which"
                " no policy can select them: `lazymesh misses` names them"
            )
        yield from self._about_clusters()

    def _about_clusters(self) -> Iterator[str]:
        if self.parts.mesh.problem:
            yield f"the pod CIDRs in force are out of date: {self.parts.mesh.problem}"
        if self.parts.mesh.unread:
            yield f"clusters are followed as they were last described: {self.parts.mesh.unread}"
        if self.parts.mesh.nobody:
            yield self.parts.mesh.nobody
        for name in sorted(self.parts.mesh.unknown_owners):
            yield f"--mesh-cidr names cluster {name}, which is not described: nobody can be asked for its addresses"
        for name, link in sorted(self.parts.mesh.links.items()):
            if link.state != "ready":
                stale = self.parts.resolver.stale.get(name, 0)
                kept = f" ({stale} entries are served as they were last known)" if stale else ""
                yield f"cluster {name} is {link.state}{kept}: {problem_of(link) or 'not listed yet'}"
            elif link.read_problem:
                yield f"cluster {name}: the last read failed: {link.read_problem}"
            if owner_problem := link.owner_problem:
                yield f"cluster {name}: its own store is not followed: {owner_problem}"
        for name, error in sorted(self.parts.mesh.file_errors.items()):
            yield f"cluster {name}: {error}"
        for name, count in sorted(self.parts.resolver.stale.items()):
            if name not in self.parts.mesh.links:
                yield (
                    f"{count} entries are served as they were last known: their cluster ({name}) has not joined since"
                    " this agent started"
                )

    def _about_maps(self) -> Iterator[str]:
        if missing := self.parts.datapath.pins.missing(own_ipcache=not self.parts.ipcaches.shared):
            yield (
                f"{len(missing)} pins are gone from {self.parts.datapath.pins.directory}, {missing[0]} among them: this"
                " agent goes on, commands and the next agent find nothing; restart it to make them anew"
            )
        if full := self.parts.resolver.absent.get(Reason.MAP_FULL):
            yield (
                f"{full} addresses have no entry because the ipcache map is full: `lazymesh ipcache list` shows whose"
                " entries those are"
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
    """Return why a cluster is not ready, None when it is; of a store that is gone, why it does not come back."""
    info = link.client.info
    gone = link.state == "silent" and not info.endpoint
    return (info.last_error if gone else None) or link.problem


_PACKETS = (
    (
        "lazymesh_packets", "Packets by what the lookup said", "verdict",
        "", ("hit", "not_mesh", "not_parsed", "missed", "missed_again"),
    ),
    (
        "lazymesh_missed_packets", "Packets that missed by what became of their signal", "outcome",
        "", ("signalled", "suppressed_dedup", "suppressed_rate", "muted", "lost"),
    ),
    (
        "lazymesh_policy_packets", "Packets of the mesh by what our own policy said", "verdict",
        "policy_", ("allow", "reply", "fragment", "deny"),
    ),
)  # fmt: skip
"""Counters of struct lm_counters as metrics that can be summed up: name, text, label, its values behind a prefix."""


def export(metrics: Metrics, status: Status, control: ControlServer, log: AuditLog) -> None:
    """Register everything that is read at scrape time."""
    metrics.collect_counter(
        "lazymesh_held_packets",
        "Parked packets by what became of them (bpf/include/lazymesh_abi.h, struct lm_hold_counters)",
        ("outcome",),
        lambda: [((name,), n) for name, n in status.parts.hold_counters.kernel().items()],
    )
    for unit, index in (("packets", 0), ("bytes", 1)):
        metrics.collect_gauge(
            f"lazymesh_parked_{unit}", "Parked, or on the way back", (),
            lambda index=index: [((), status.parts.hold_counters.outstanding()[index])],  # type: ignore[misc]
        )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_released_packets",
        "Packets that the holder gave back, by cause (struct lm_holder_stats)",
        ("reason",),
        lambda: [((name,), n) for name, n in status.parts.hold_counters.holder().items()],
    )
    metrics.collect_counter(
        "lazymesh_holder_restarts",
        "Holder processes that died",
        (),
        lambda: [((), status.parts.holding.restarts)],
    )
    metrics.collect_counter(
        "lazymesh_hold_answers_dropped",
        "Answers that a holder which does not listen never got",
        (),
        lambda: [((), status.parts.holding.answers_dropped)],
    )
    for name, text, label, prefix, values in _PACKETS:
        metrics.collect_counter(
            name, f"{text} (bpf/include/lazymesh_abi.h)", ("direction", label),
            lambda prefix=prefix, values=values: [  # type: ignore[misc]
                ((d.name.lower(), value), read[prefix + value])
                for d in Direction for read in (status.packets(d),) for value in values
            ],
        )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_missed_packets_dropped", "Packets dropped since --on-miss is drop", ("direction",),
        lambda: [((d.name.lower(),), status.packets(d)["missed_drop"]) for d in Direction],
    )  # fmt: skip
    metrics.collect_gauge(
        "lazymesh_addresses", "Addresses the resolver knows, by state", ("state",),
        lambda: [((state,), n) for state, n in status.parts.resolver.counts.items()],
    )  # fmt: skip
    metrics.collect_gauge(
        "lazymesh_queue_addresses",
        "Missed addresses that wait for a read",
        (),
        lambda: [((), status.parts.resolver.queued)],
    )
    metrics.collect_gauge(
        "lazymesh_entries_owned",
        "Entries of ours in the ipcache map",
        (),
        lambda: [((), status.parts.resolver.owned)],
    )
    metrics.collect_gauge(
        "lazymesh_entries_stale", "Entries of ours that are served although their cluster does not confirm them now",
        ("target_cluster",), lambda: [((name,), n) for name, n in status.parts.resolver.stale.items()],
    )  # fmt: skip
    metrics.collect_gauge(
        "lazymesh_admitted_ratio", "Misses that may be signalled, as a share of what --signal-rate allows", (),
        lambda: [((), status.parts.resolver.admission.share)],
    )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_admission_cuts", "How often that share was halved, by cause: slow answers, or a full queue",
        ("reason",), lambda: [((cause,), n) for cause, n in status.parts.resolver.admission.cuts.items()],
    )  # fmt: skip
    if status.parts.shadow is not None:
        shadow = status.parts.shadow
        metrics.collect_counter(
            "lazymesh_shadow_changes", "Entries not written that would have changed what a peer is taken for", (),
            lambda: [((), shadow.changes_total)],
        )  # fmt: skip
    metrics.collect_gauge(
        "lazymesh_interfaces_attached", "Interfaces that carry our program", (),
        lambda: [((), len(status.parts.follower.attached))],
    )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_interface_attach_errors", "Interfaces that could not be attached to", (),
        lambda: [((), status.parts.follower.stats.attach_errors_total)],
    )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_programs_displaced",
        "How often our program was removed from an interface, or not the first any more, and was attached again", (),
        lambda: [((), status.parts.follower.stats.displaced_total)],
    )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_signals_invalid",
        "Perf records that were no miss signal",
        (),
        lambda: [((), status.parts.reader.invalid)],
    )
    metrics.collect_gauge(
        "lazymesh_datapath_muted", "1 while the kernel is told to signal nothing", (),
        lambda: [((), float(status.parts.reader.crowded))],
    )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_log_lines_lost", "Lines of the log that could not be written: disk full, or nobody reads", (),
        lambda: [((), logs.stderr.lost)],
    )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_stream_lines_dropped", "Lines not sent to a `lazymesh misses` that reads too slowly", (),
        lambda: [((), control.dropped)],
    )  # fmt: skip
    metrics.collect_gauge(
        "lazymesh_problems", "Lines of `lazymesh status` that say what is wrong", (),
        lambda: [((), status.problems())],
    )  # fmt: skip
    metrics.collect_gauge(
        "lazymesh_clusters", "Clusters that are followed", (), lambda: [((), len(status.parts.mesh.links))]
    )
    metrics.collect_gauge(
        "lazymesh_cluster_ready", "1 while the cluster's nodes and identities are listed and followed",
        ("target_cluster",),
        lambda: list(_ready(status)),
    )  # fmt: skip
    metrics.collect_gauge(
        "lazymesh_owner_ready", "1 while the cluster's own store, behind a cache, is followed", ("target_cluster",),
        lambda: [
            ((name,), float(link.owner_problem is None))
            for name, link in status.parts.mesh.links.items()
            if link.config.names_owner
        ],
    )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_store_reconnects", "Reconnects to a cluster's store", ("target_cluster",),
        lambda: [((name,), link.client.info.reconnects) for name, link in status.parts.mesh.links.items()],
    )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_cluster_link_crashes", "Links to clusters that ended by themselves and were started again",
        ("target_cluster",), lambda: [((name,), n) for name, n in status.parts.mesh.crashes.items()],
    )  # fmt: skip
    metrics.collect_counter(
        "lazymesh_records_refused", "Node, identity and cluster-config records refused", ("target_cluster", "kind"),
        lambda: list(_refused(status)),
    )  # fmt: skip
    metrics.collect_gauge(
        "lazymesh_certificate_expiration_timestamp_seconds", "When a client certificate for etcd ends", ("file",),
        lambda: list(certificates_of(status)),
    )  # fmt: skip
    for name, text, read in (
        ("lazymesh_open_windows", "Open windows closed so far", lambda: log.windows_total),
        ("lazymesh_open_windows_forgotten", "Windows that made room for others", lambda: log.forgotten_total),
        ("lazymesh_open_window_packets", "Packets that went through as world", lambda: log.packets_total),
        ("lazymesh_open_window_seconds", "Time that addresses were open as world", lambda: log.seconds_total),
    ):
        metrics.collect_counter(name, text, (), lambda read=read: [((), read())])  # type: ignore[misc]


def certificates_of(status: Status) -> Iterator[Sample]:
    """Yield each file once: behind a cache all clusters have the same."""
    stores = {store for link in status.parts.mesh.links.values() for store in link.config.stores}
    ends = {end_of_certificate(store) for store in stores}
    for path, not_after in (end for end in ends if end is not None):
        yield (path,), not_after.timestamp()


def _ready(status: Status) -> Iterator[Sample]:
    mesh = status.parts.mesh
    for name in sorted({*mesh.links, *mesh.file_errors}):
        # A cluster whose file is refused from the start has no link.
        yield (name,), float(name in mesh.links and mesh.links[name].state == "ready")


def _refused(status: Status) -> Iterator[Sample]:
    for name, link in status.parts.mesh.links.items():
        for kind, count in link.refused_total.items():
            yield (name, kind), count
