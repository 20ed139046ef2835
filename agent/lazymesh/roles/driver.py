"""Drives the resolver: feeds it events, carries its commands out through links and installer, and counts the outcomes.

One thread, the event loop's, owns the resolver. Effects that answer at once (an install) go back in as events before
anything else. An exception here is a bug, or a kernel that refuses what it never refuses: ``fail`` is called, nothing
more is counted, and the agent ends. The source of the event (an etcd watch, the perf ring) never sees the exception.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import chain, repeat
from operator import truediv
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from lazymesh.core import events
from lazymesh.core.hold import Cause
from lazymesh.core.identities import is_peer
from lazymesh.core.model import Direction, Reason, format_address
from lazymesh.roles.logs import OncePer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lazymesh.core.model import Address
    from lazymesh.core.resolver import Resolver
    from lazymesh.datapath.abi import Signals
    from lazymesh.datapath.ipcachemaps import IpcacheMap
    from lazymesh.metrics import Metrics
    from lazymesh.roles.link import ClusterLink

log = structlog.get_logger()

QUIET_S = 60.0
"""The same refusal of the same address is logged once in this time."""
_GOOD: frozenset[events.Outcome] = frozenset({"installed", "updated"})
_REFUSALS = frozenset({Reason.FORGED, Reason.MALFORMED, Reason.AMBIGUOUS, Reason.NOT_OURS, Reason.MAP_FULL})
"""Outcomes that a person should look into."""


class Installs(Protocol):
    """Takes entries: into the map, or nowhere in shadow mode."""

    def install_many(self, installs: Sequence[events.Install]) -> list[Reason | None]:
        """Install entries; return why not, or None, for each address."""

    def evict(self, address: Address) -> bool:
        """Remove our entry."""


class Throttle(Protocol):
    """Limits incoming misses."""

    def pause(self, on: bool) -> None:
        """Stop them for the moment, or resume."""

    def admit(self, share: float) -> None:
        """Admit this share of what the settings allow."""


class Shadow:
    """Stands in for the installer in shadow mode: everything is decided and reported, nothing is written."""

    def __init__(self, ipcaches: HasMaps) -> None:
        self.changes_total = 0
        """Installs that would have changed a peer's identity for the programs, and so for policy."""
        self._ipcaches = ipcaches

    def install_many(self, installs: Sequence[events.Install]) -> list[Reason | None]:
        """Return success, or TAKEN where the map's owner was first, as the installer would."""
        return [self._install(address) for each in installs for address in each.addresses]

    def _install(self, address: Address) -> Reason | None:
        standing = self._ipcaches.maps[0].lookup(address)
        if standing is not None and is_peer(standing.identity):
            return Reason.TAKEN
        self.changes_total += 1
        return None

    def evict(self, _address: Address) -> bool:
        """Return False: there is nothing to remove."""
        return False


class HasMaps(Protocol):
    """Knows the ipcaches that count."""

    @property
    def maps(self) -> Sequence[IpcacheMap]:
        """The map that is written, then others."""


def _raise(error: Exception) -> None:
    raise error


class Driver:
    """Connects the resolver with links, installer, holder, metrics and streams of misses."""

    def __init__(
        self,
        resolver: Resolver,
        installer: Installs,
        links: Mapping[str, ClusterLink],
        metrics: Metrics,
        throttle: Throttle,
    ) -> None:
        self._resolver = resolver
        self._installer = installer
        self._links = links
        self._metrics = metrics
        self._throttle = throttle
        self._failed = False
        self._admitted = 1.0
        self._events: deque[events.Event] = deque()
        self._busy = False
        self._reports: list[tuple[events.Report, float]] = []
        """Each with its time; for entries, when they were in the map."""
        self._now = 0.0
        """The time of the present step; of the outcome of installs, when they were done."""
        self._installs: list[events.Install] = []
        """Decided in the present step."""
        self._lone = False
        """The present step is about one address: nothing else can be installed together with it."""
        self._installed_at = 0.0
        """When the last installs were done."""
        self._later: deque[events.Watch | events.Unwatch] = deque()
        """Changes of watches; packets come first, and nothing is missed, as watches start from a known revision."""
        self._said: dict[str | None, OncePer] = {}
        """By cluster: one with many bad records silences only itself."""
        self._directions = [metrics.signals.labels(direction.name.lower()) for direction in Direction]
        self.fail: Callable[[Exception], None] = _raise
        """Called once, with the error that has ended the driver."""
        self.publish: Callable[[dict[str, Any]], None] | None = None
        """Takes one object per outcome while misses are being streamed, else None."""

        self.release: Callable[[Sequence[Address], Cause], None] | None = None
        """Releases packets held for addresses that are answered."""

        self.released: Callable[[], None] = lambda: None
        """Called after the last release of a moment."""

        self.installed: Callable[[Sequence[Address]], None] | None = None
        """Called with addresses that have their entry now."""

    def on_signals(self, signals: Signals) -> None:
        """Take the misses of one wake-up."""
        addresses, inward = signals.addresses, signals.inward
        self.feed(events.Misses(tuple(addresses), tuple(map(truediv, signals.ktimes_ns, repeat(1e9)))))
        for direction, count in ((Direction.EGRESS, len(addresses) - inward), (Direction.INGRESS, inward)):
            if count:
                self._directions[direction].inc(count)

    def feed(self, event: events.Event) -> None:
        """Take one event, now or after those being worked on."""
        self._events.append(event)
        if self._busy or self._failed:
            return
        self._busy = True
        try:
            while self._events:
                while self._events:
                    event = self._events.popleft()
                    if self._later and isinstance(event, (events.StoreReset, events.ClusterGone)):
                        # Resolver and link both forget their watches, so these would belong to nothing.
                        self._later = deque(each for each in self._later if each.cluster != event.cluster)
                    now = time.monotonic()
                    self._now = self._installed_at if isinstance(event, events.InstallsEnded) else now
                    self._lone = isinstance(event, events.Answered) and len(event.addresses) == 1
                    self._resolver.step(event, now, self._carry_out)
                    self._install()
                self._finish()
        except Exception as exc:
            # The resolver may be between two states, so it decides nothing more.
            self._failed = True
            self._events.clear()
            self.fail(exc)
        finally:
            self._busy = False

    def _finish(self) -> None:
        """Release the packets that wait, then do what no packet waits for."""
        reports, self._reports = self._reports, []
        if self.release is not None and reports:
            for report, _ in reports:
                if report.outcome != "evicted":
                    cause = Cause.INSTALLED if report.outcome in _GOOD else Cause.NEGATIVE
                    self.release(report.addresses, cause)
            self.released()
        while self._later:
            self._change_watch(self._later.popleft())
        if self.installed is not None:
            for report, _ in reports:
                if report.outcome in _GOOD and not report.cached:
                    self.installed(report.addresses)
        ends: dict[tuple[str, bool], int] = {}
        for report, at in reports:
            end = report.outcome, report.cached
            ends[end] = ends.get(end, 0) + len(report.addresses)
            self._report(report, at)
        for (outcome, cached), count in ends.items():
            self._metrics.outcomes.labels(outcome, "true" if cached else "false").inc(count)

    def _change_watch(self, command: events.Watch | events.Unwatch) -> None:
        link = self._links.get(command.cluster)
        if link is None:
            return
        if isinstance(command, events.Watch):
            link.watch(command)
        else:
            link.unwatch(command.address)

    def _carry_out(self, command: events.Command) -> None:
        """Carry out a command of the present step; its installs go together, unless something is evicted in between."""
        if isinstance(command, events.Install):
            self._installs.append(command)
            if self._lone:
                self._install()
        elif isinstance(command, events.Read):
            link = self._links.get(command.cluster)
            if link is not None:
                link.read(command)
            else:  # the cluster has left since the decision
                self._events.append(events.ReadFailed(command.cluster, command.addresses, "unavailable"))
        elif isinstance(command, events.Report):
            self._reports.append((command, self._now))
        elif isinstance(command, (events.Watch, events.Unwatch)):
            self._later.append(command)
        elif isinstance(command, events.Evict):
            self._install()
            self._installer.evict(command.address)
            self._metrics.evictions.labels(command.why).inc()
        elif isinstance(command, events.Admit):
            self._admit(command.share)
        else:
            self._throttle.pause(command.on)

    def _install(self) -> None:
        """Install entries; how it went is the resolver's next event."""
        installs = self._installs
        if not installs:
            return
        errors = self._installer.install_many(installs)
        self._installed_at = time.monotonic()
        addresses = tuple(chain.from_iterable([each.addresses for each in installs]))
        self._events.appendleft(events.InstallsEnded(addresses, tuple(errors)))
        installs.clear()

    def _admit(self, share: float) -> None:
        # Recovery takes many steps, so only its end is logged.
        if share < self._admitted or share == 1.0:
            log.warning("miss admission changed", share=round(share, 3))
        self._admitted = share
        self._throttle.admit(share)

    def _report(self, report: events.Report, at: float) -> None:
        if report.reason is not None and report.outcome != "evicted":
            self._metrics.errors.labels(report.reason.value).inc(len(report.addresses))
        waited = [at - missed_at for missed_at in report.missed_at if missed_at is not None]
        if waited and not report.cached:
            self._metrics.duration.observe(report.outcome, waited)
        if self.publish is not None:
            self._publish(report, at, self.publish)
        if report.reason in _REFUSALS:
            self._warn(report, at)

    def _publish(self, report: events.Report, at: float, publish: Callable[[dict[str, Any]], None]) -> None:
        for address, missed_at in zip(report.addresses, report.missed_at, strict=True):
            known = self._resolver.describe(address)
            publish(
                {
                    "address": format_address(address),
                    "cluster": report.cluster,
                    "outcome": report.outcome,
                    "reason": None if report.reason is None else report.reason.value,
                    "identity": known.entry.identity if known and known.entry else None,
                    "latency_ms": None if missed_at is None else round(max(0.0, at - missed_at) * 1000, 3),
                    "cached": report.cached,
                    "detail": report.detail or None,
                }
            )

    def _warn(self, report: events.Report, at: float) -> None:
        said = self._said.setdefault(report.cluster, OncePer(QUIET_S))
        for address in report.addresses:
            if said((address, report.reason), at):
                log.warning(
                    "address refused",
                    address=format_address(address),
                    cluster=report.cluster,
                    reason=report.reason.value if report.reason else None,
                    detail=report.detail,
                )
