"""The metrics that are read from the running parts at each scrape, as two tables: counters and gauges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from lazymesh.core.model import Direction
from lazymesh.kvstore.certificate import end_of_certificate
from lazymesh.metrics import Sample
from lazymesh.roles import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazymesh.core.audit import AuditLog
    from lazymesh.metrics import Metrics
    from lazymesh.roles.control import ControlServer
    from lazymesh.roles.link import ClusterLink
    from lazymesh.roles.status import Parts, Status

Reading = float | Mapping[str, float] | Iterable[Sample]
"""One value; one for each value of the only label; or samples."""


class Sources(NamedTuple):
    """What the metrics are read from."""

    status: Status
    control: ControlServer
    audit: AuditLog

    @property
    def parts(self) -> Parts:
        """The running parts of the agent."""
        return self.status.parts

    @property
    def links(self) -> Mapping[str, ClusterLink]:
        """The links to the clusters, by name."""
        return self.status.parts.mesh.links


class _Metric(NamedTuple):
    name: str
    text: str
    read: Callable[[Sources], Reading]
    labels: tuple[str, ...] = ()


def export(metrics: Metrics, sources: Sources) -> None:
    """Register everything that is read at scrape time."""
    counters = _COUNTERS if sources.parts.shadow is None else (*_COUNTERS, _SHADOW_CHANGES)
    for collect, rows in ((metrics.collect_counter, counters), (metrics.collect_gauge, _GAUGES)):
        for row in rows:
            collect(row.name, row.text, row.labels, _reader(row, sources))


def _reader(row: _Metric, sources: Sources) -> Callable[[], Iterable[Sample]]:
    def read() -> Iterable[Sample]:
        reading = row.read(sources)
        if isinstance(reading, (int, float)):
            return [((), reading)]
        return [((label,), n) for label, n in reading.items()] if isinstance(reading, Mapping) else reading

    return read


def _packets(prefix: str, values: tuple[str, ...]) -> Callable[[Sources], Iterator[Sample]]:
    """Return what reads these counters of both directions; the label is a counter's name without the prefix."""

    def read(sources: Sources) -> Iterator[Sample]:
        for direction in Direction:
            counters = sources.status.packets(direction)
            for value in values:
                yield (direction.name.lower(), value), counters[prefix + value]

    return read


def certificates_of(links: Mapping[str, ClusterLink]) -> Iterator[Sample]:
    """Yield when each certificate file expires, once for each file: behind a cache all clusters share one."""
    stores = {store for link in links.values() for store in link.config.stores}
    ends = {end_of_certificate(store) for store in stores}
    for path, not_after in (end for end in ends if end is not None):
        yield (path,), not_after.timestamp()


def _ready(sources: Sources) -> Iterator[Sample]:
    links = sources.links
    for name in sorted({*links, *sources.parts.mesh.file_errors}):
        # A cluster whose file was refused from the start has no link.
        yield (name,), float(name in links and links[name].state == "ready")


def _owners_ready(sources: Sources) -> Iterator[Sample]:
    for name, link in sources.links.items():
        if link.config.names_owner:
            yield (name,), float(link.owner.problem is None)


def _refused(sources: Sources) -> Iterator[Sample]:
    for name, link in sources.links.items():
        for kind, count in link.refused_total.items():
            yield (name, kind), count


_COUNTERS = (
    # Packets, as the programs count them (bpf/include/lazymesh_abi.h).
    _Metric(
        "lazymesh_packets",
        "Packets, by the result of the lookup (struct lm_counters)",
        _packets("", ("hit", "not_mesh", "not_parsed", "missed", "missed_again")),
        ("direction", "verdict"),
    ),
    _Metric(
        "lazymesh_missed_packets",
        "Packets that missed, by what became of their signal (struct lm_counters)",
        _packets("", ("signalled", "suppressed_dedup", "suppressed_rate", "muted", "lost")),
        ("direction", "outcome"),
    ),
    _Metric(
        "lazymesh_missed_packets_dropped",
        "Packets dropped because --on-miss is drop",
        lambda of: {d.name.lower(): of.status.packets(d)["missed_drop"] for d in Direction},
        ("direction",),
    ),
    _Metric(
        "lazymesh_policy_packets",
        "Mesh packets, by the verdict of lazymesh's policy (struct lm_counters)",
        _packets("policy_", ("allow", "reply", "fragment", "deny")),
        ("direction", "verdict"),
    ),
    _Metric(
        "lazymesh_held_packets",
        "Packets to be parked, by what became of them (struct lm_hold_counters)",
        lambda of: of.parts.hold_counters.kernel(),
        ("outcome",),
    ),
    _Metric(
        "lazymesh_released_packets",
        "Packets that the holder gave back, by cause (struct lm_holder_stats)",
        lambda of: of.parts.hold_counters.holder(),
        ("reason",),
    ),
    _Metric("lazymesh_open_windows", "Open windows closed so far", lambda of: of.audit.windows_total),
    _Metric(
        "lazymesh_open_windows_forgotten",
        "Open windows that made room for others",
        lambda of: of.audit.forgotten_total,
    ),
    _Metric(
        "lazymesh_open_window_packets",
        "Packets that went through as world",
        lambda of: of.audit.packets_total,
    ),
    _Metric(
        "lazymesh_open_window_seconds",
        "Time that addresses were open as world",
        lambda of: of.audit.seconds_total,
    ),
    # The agent and its holder.
    _Metric("lazymesh_holder_restarts", "Holder processes that died", lambda of: of.parts.holding.restarts),
    _Metric(
        "lazymesh_hold_answers_dropped",
        "Answers that never reached the holder because it was not reading",
        lambda of: of.parts.holding.answers_dropped,
    ),
    _Metric(
        "lazymesh_signals_invalid",
        "Perf records that were not a miss signal",
        lambda of: of.parts.reader.invalid,
    ),
    _Metric(
        "lazymesh_admission_cuts",
        "Times the admitted share was halved, by cause: slow answers, or a full queue",
        lambda of: of.parts.resolver.admission.cuts,
        ("reason",),
    ),
    _Metric(
        "lazymesh_interface_attach_errors",
        "Failed attempts to attach to an interface",
        lambda of: of.parts.follower.stats.attach_errors_total,
    ),
    _Metric(
        "lazymesh_programs_displaced",
        "Times our program was removed from an interface, or lost its first place, and was attached again",
        lambda of: of.parts.follower.stats.displaced_total,
    ),
    _Metric(
        "lazymesh_log_lines_lost",
        "Log lines that could not be written: disk full, or nothing reads the pipe",
        lambda _: logs.stderr.lost,
    ),
    _Metric(
        "lazymesh_stream_lines_dropped",
        "Lines not sent to a `lazymesh misses` that reads too slowly",
        lambda of: of.control.dropped,
    ),
    # Clusters.
    _Metric(
        "lazymesh_store_reconnects",
        "Reconnects to a cluster's store",
        lambda of: {name: link.client.info.reconnects for name, link in of.links.items()},
        ("target_cluster",),
    ),
    _Metric(
        "lazymesh_cluster_link_crashes",
        "Links to clusters that ended unexpectedly and were started again",
        lambda of: of.parts.mesh.crashes,
        ("target_cluster",),
    ),
    _Metric(
        "lazymesh_records_refused",
        "Node, identity and cluster-config records refused",
        _refused,
        ("target_cluster", "kind"),
    ),
)

_SHADOW_CHANGES = _Metric(
    "lazymesh_shadow_changes",
    "Entries not written that would have changed a peer's identity",
    lambda of: of.parts.shadow.changes_total if of.parts.shadow else 0,
)
"""A counter only in shadow mode."""

_GAUGES = (
    _Metric(
        "lazymesh_addresses",
        "Addresses the resolver knows, by state",
        lambda of: of.parts.resolver.counts,
        ("state",),
    ),
    _Metric(
        "lazymesh_queue_addresses",
        "Missed addresses that wait for a read",
        lambda of: of.parts.resolver.queued,
    ),
    _Metric(
        "lazymesh_entries_owned",
        "Entries in the ipcache map that lazymesh owns",
        lambda of: of.parts.resolver.owned,
    ),
    _Metric(
        "lazymesh_entries_stale",
        "Entries that are still used although their cluster does not confirm them now",
        lambda of: of.parts.resolver.stale,
        ("target_cluster",),
    ),
    _Metric(
        "lazymesh_admitted_ratio",
        "Misses that may be signalled, as a share of what --signal-rate allows",
        lambda of: of.parts.resolver.admission.share,
    ),
    _Metric(
        "lazymesh_datapath_muted",
        "1 while the kernel is told not to signal misses",
        lambda of: float(of.parts.reader.crowded),
    ),
    _Metric(
        "lazymesh_parked_packets",
        "Packets parked or on their way back",
        lambda of: of.parts.hold_counters.outstanding()[0],
    ),
    _Metric(
        "lazymesh_parked_bytes",
        "Bytes parked or on their way back",
        lambda of: of.parts.hold_counters.outstanding()[1],
    ),
    _Metric(
        "lazymesh_interfaces_attached",
        "Interfaces that carry our program",
        lambda of: len(of.parts.follower.attached),
    ),
    _Metric(
        "lazymesh_problems",
        "Lines of `lazymesh status` that say what is wrong",
        lambda of: of.status.problems(),
    ),
    _Metric("lazymesh_clusters", "Clusters that are followed", lambda of: len(of.links)),
    _Metric(
        "lazymesh_cluster_ready",
        "1 while the cluster's nodes and identities are listed and followed",
        _ready,
        ("target_cluster",),
    ),
    _Metric(
        "lazymesh_owner_ready",
        "1 while the cluster's own store, behind a cache, is followed",
        _owners_ready,
        ("target_cluster",),
    ),
    _Metric(
        "lazymesh_certificate_expiration_timestamp_seconds",
        "When a client certificate for etcd expires",
        lambda of: certificates_of(of.links),
        ("file",),
    ),
)
