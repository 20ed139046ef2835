"""The moves of one address: begin, read, settle, install, refuse, drop, forget.

``machine`` and ``lifecycle`` decide on which event which address makes which move. Here a move is carried
through, so that all books agree when it is over: phase, queue, ledger, negative cache, watches, and the
commands to the shell.
"""

from __future__ import annotations

from itertools import groupby, repeat
from operator import attrgetter
from typing import TYPE_CHECKING

from lazymesh.core.events import Command, Evict, Install, Outcome, Report, Unwatch
from lazymesh.core.model import Reason
from lazymesh.core.records import entry_of
from lazymesh.core.resolver.judge import Judge, Refusal
from lazymesh.core.resolver.tracked import (
    ABSENT,
    IDLE,
    INSTALLED,
    QUEUED,
    READING,
    RESOLVING,
    LinkState,
    Tracked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazymesh.core.clusters import ClusterInfo
    from lazymesh.core.model import Address, Entry, Space
    from lazymesh.core.records import Record
    from lazymesh.core.resolver.admission import Admission
    from lazymesh.core.resolver.backlog import Backlog
    from lazymesh.core.resolver.ledger import Ledger
    from lazymesh.core.resolver.negatives import Negatives
    from lazymesh.core.resolver.tracked import Link

_OUTCOMES: dict[Reason, Outcome] = {
    Reason.READ_FAILED: "failed",
    Reason.MAP_FULL: "failed",
    Reason.INSTALL_FAILED: "failed",
    Reason.SHED: "shed",
}
"""What a Report calls an absence that is not an answer; all others are ``absent``."""
_UNANSWERED = frozenset({Reason.READ_FAILED, Reason.CLUSTER_DOWN, Reason.SHED})
"""Reasons that say nothing about how long an answer takes."""


class Moves:
    """All tracked addresses, and what can be done to one of them."""

    def __init__(
        self, judge: Judge, backlog: Backlog, ledger: Ledger, negatives: Negatives, admission: Admission
    ) -> None:
        self.tracked: dict[Address, Tracked] = {}
        self.carry_out: Callable[[Command], None] = _nobody
        """Carries out a command of the current step; the resolver replaces it at each step."""
        self.now = 0.0
        """The time of the current step."""
        self.admission = admission
        self._judge = judge
        self._backlog = backlog
        self._ledger = ledger
        self._negatives = negatives

    def begin(
        self,
        addresses: Sequence[Address],
        missed_at: Sequence[float | None],
        owners: tuple[str, ...],
        link: Link | None,
    ) -> list[Tracked]:
        """Track more addresses, given with the time at which each missed."""
        begun = list(map(Tracked, addresses, repeat(owners), repeat(link), missed_at))
        self.tracked.update(zip(addresses, begun, strict=True))
        if link is not None:
            link.members.update(zip(addresses, begun, strict=True))
        return begun

    def forget(self, tracked: Tracked) -> None:
        """Stop tracking an address for which we have no entry."""
        link = tracked.link
        if link is not None:
            if tracked.fetch is QUEUED:
                self._backlog.remove(tracked, link)
            elif tracked.fetch is READING:
                # A new miss of the address must not be answered by what is older than what we forget here.
                link.orphans.add(tracked.address)
            if tracked.watched:
                self.carry_out(Unwatch(link.name, tracked.address))
            del link.members[tracked.address]
            link.adopted.discard(tracked.address)
            # Callers further up the stack that still hold the object must find nothing to act upon.
            tracked.link = None
        if tracked.phase is ABSENT:
            self._negatives.remove(tracked)
        self._ledger.name(tracked, 0)
        del self.tracked[tracked.address]

    def drop(self, tracked: Tracked, why: str, reason: Reason | None) -> None:
        """Evict the entry if there is one, answer a waiting miss, and forget the address."""
        if tracked.entry is not None:
            self._evict(tracked, why)
            self.report(tracked, "evicted", None, why)
        elif tracked.missed_at is not None:
            self.report(tracked, "absent", reason)
        self.forget(tracked)

    def read(self, tracked: Tracked, spaces: tuple[Space, ...]) -> None:
        """Queue a read of the address."""
        if tracked.link is not None:
            self._backlog.put((tracked,), tracked.link, spaces, urgent=tracked.waiting)

    def give_up(self, tracked: Tracked, reason: Reason, now: float) -> None:
        """Stop waiting for the read that a miss waits for.

        If it is already in flight it may still be answered, and is then used.
        """
        if tracked.fetch is QUEUED and tracked.link is not None:
            self._backlog.remove(tracked, tracked.link)
        if tracked.waiting:
            self.refuse(tracked, reason, "", now)

    def settle(self, tracked: Tracked, now: float) -> None:
        """Bring the map in line with what the address's keys say."""
        link, cluster = tracked.link, self._cluster(tracked)
        if link is not None and cluster is not None and tracked.spaces:
            self.settle_all((tracked,), link, cluster, now)

    def settle_all(self, some: Sequence[Tracked], link: Link, cluster: ClusterInfo, now: float) -> None:
        """Do the same for addresses of one cluster, for each of which a group has answered."""
        # Pods of one node come together, and their records are mostly one: by its id, unique while it lives.
        published: dict[int, tuple[Record, list[Tracked]]] = {}
        for tracked in some:
            tracked.withdrawn = False
            record = tracked.newest()
            if record is not None:
                known = published.get(id(record))
                if known is None:
                    published[id(record)] = record, [tracked]
                else:
                    known[1].append(tracked)
            elif tracked.link is link:  # else another of these addresses has pushed it out of memory
                self._settle_without_record(tracked, cluster, now)
        wanted: list[tuple[Entry, list[Tracked]]] = []
        for record, alike in published.values():
            verdict = self._judge.verdict(record, cluster)
            if not isinstance(verdict, Refusal):
                entry = entry_of(verdict, self._judge.here)
                wanted.append((entry, self._wanting(alike, entry)))
                continue
            for tracked in alike:
                if tracked.link is link:  # as above
                    self._ledger.name(tracked, verdict.identity)
                    self.refuse(tracked, verdict.reason, verdict.detail, now)
        # After all that is refused: what that takes out of the map makes room.
        for entry, wanting in wanted:
            self._install(wanting, entry, cluster.cluster_id, now)

    def _wanting(self, some: list[Tracked], entry: Entry) -> list[Tracked]:
        """Return the addresses whose record says this entry, and that do not have it."""
        unanswered = self._ledger.unanswered
        if unanswered and not unanswered.keys().isdisjoint([tracked.address for tracked in some]):
            for tracked in some:
                tracked.again |= tracked.address in unanswered
            some = [tracked for tracked in some if tracked.address not in unanswered]
        wanting: list[Tracked] = []
        for tracked in some:
            if tracked.link is None or tracked.entry == entry:
                continue
            wanting.append(tracked)
            if tracked.phase is ABSENT:
                self._negatives.remove(tracked)
                tracked.move(RESOLVING)
        return wanting

    def _settle_without_record(self, tracked: Tracked, cluster: ClusterInfo, now: float) -> None:
        following = _group_after(cluster.spaces, tracked.spaces)
        if following is None:
            self._ledger.name(tracked, 0)
            self.refuse(tracked, Reason.NOT_FOUND, "", now)
        elif tracked.fetch is IDLE:
            self.read(tracked, following)

    def install(self, tracked: Tracked, entry: Entry, now: float) -> None:
        """Send an Install; make room in the budget first."""
        link, cluster = tracked.link, self._cluster(tracked)
        if cluster is not None:
            self._install([tracked], entry, cluster.cluster_id, now)
        elif link is not None and link.unjoined_id:
            self._install([tracked], entry, link.unjoined_id, now)

    def _install(self, some: list[Tracked], entry: Entry, cluster_id: int, now: float) -> None:
        """Do the same for addresses of one cluster; those without a link were given up since they were chosen."""
        ledger = self._ledger
        if len(some) > max(1, ledger.room):
            for tracked in some:
                self._install([tracked], entry, cluster_id, now)
            return
        alive: dict[Address, Tracked] = {}
        for tracked in some:
            if tracked.link is not None:
                tracked.installed_at = now
                alive[tracked.address] = one = tracked
        if not alive:
            return
        if one.entry is None and ledger.room <= 0:
            self.make_room()
        self.carry_out(Install(list(alive), entry, cluster_id))
        # Books come after what packets wait for.
        ledger.own(alive.values(), entry)
        if one.link is not None and one.link.state is not LinkState.READY:
            ledger.doubt(alive.values(), now)
        ledger.unanswered.update(alive)

    def make_room(self) -> None:
        """Evict what must go before one more entry may be installed."""
        ledger = self._ledger
        while ledger.room <= 0 and (victim := ledger.oldest()) is not None:
            self.drop(victim, "budget", None)

    def installs_ended(
        self, addresses: Sequence[Address], errors: Sequence[Reason | None], now: float
    ) -> None:
        """Take the outcomes of Installs, then whatever came while they were unanswered."""
        arrived: list[Tracked] = []
        again: list[Tracked] = []
        ended = map(self._ledger.unanswered.pop, addresses, repeat(None))
        for asked, error in zip(ended, errors, strict=True):
            # If it was forgotten meanwhile, it may have missed again.
            tracked = asked if asked is None or asked.link is not None else self.tracked.get(asked.address)
            if tracked is None:
                continue
            if tracked.again:
                tracked.again = False
                again.append(tracked)
            # Without an entry it was evicted while the Install was under way: the outcome no longer matters.
            if tracked.entry is None:
                continue
            if error is None and tracked.phase is RESOLVING:
                tracked.phase = INSTALLED
                arrived.append(tracked)
            elif error is None:
                self._installed_again(tracked)
            elif error is Reason.TAKEN:
                self.report(tracked, "installed", None, "by the map's owner")
                self.give_away(tracked)
            else:
                self.refuse(tracked, error, "", now)
        for _, some in groupby(arrived, attrgetter("link")):
            self._report(list(some), "installed", None)
        # Report their arrival before what has become of them since.
        for tracked in again:
            self.settle(tracked, now)

    def _installed_again(self, tracked: Tracked) -> None:
        if tracked.missed_at is None:
            self.report(tracked, "updated", None)
        else:
            self.report(tracked, "installed", None, "the entry had vanished")

    def refuse(self, tracked: Tracked, reason: Reason, detail: str, now: float) -> None:
        """Leave the address without an entry, for this reason."""
        tracked.withdrawn = False
        if tracked.entry is not None:
            self._evict(tracked, "deleted" if reason is Reason.NOT_FOUND else reason.value)
        if tracked.phase is INSTALLED:
            self.report(tracked, "evicted", reason, detail)
        elif tracked.missed_at is not None:
            self.report(tracked, _OUTCOMES.get(reason, "absent"), reason, detail)
        if tracked.phase is ABSENT:
            self._negatives.remove(tracked)
        else:
            tracked.move(ABSENT)
        self._negatives.add(tracked, reason, now)
        oldest = self._negatives.overflow()
        if oldest is not None:
            self.forget(oldest)

    def give_away(self, tracked: Tracked) -> None:
        """Forget an address whose entry is no longer ours: there is nothing to evict."""
        self._ledger.disown(tracked)
        self.forget(tracked)

    def report(
        self,
        tracked: Tracked,
        outcome: Outcome,
        reason: Reason | None,
        detail: str = "",
        *,
        cached: bool = False,
    ) -> None:
        """Report how it ended, which answers the miss that waited for it, if any."""
        self._report((tracked,), outcome, reason, detail, cached=cached)

    def _report(
        self,
        some: Sequence[Tracked],
        outcome: Outcome,
        reason: Reason | None,
        detail: str = "",
        *,
        cached: bool = False,
    ) -> None:
        """Report the same for one or more addresses of one cluster."""
        link = some[0].link
        missed_at = [tracked.missed_at for tracked in some]
        if link is not None and not cached and reason not in _UNANSWERED:
            now, most = self.now, self.now - link.ready_at
            took = [now - at for at in missed_at if at is not None]
            if took and max(took) > most:  # they missed before there could be an answer
                took = [min(each, most) for each in took]
            self.admission.took(link.name, took)
        cluster = link.name if link is not None else None
        self.carry_out(
            Report([each.address for each in some], cluster, outcome, reason, detail, missed_at, cached)
        )
        for tracked in some:
            tracked.missed_at = None

    def _evict(self, tracked: Tracked, why: str) -> None:
        # A first Install that ended in an error left no entry in the map.
        if tracked.phase is INSTALLED or tracked.address in self._ledger.unanswered:
            self.carry_out(Evict(tracked.address, why))
        self._ledger.disown(tracked)

    def _cluster(self, tracked: Tracked) -> ClusterInfo | None:
        return None if tracked.link is None else self._judge.table.cluster(tracked.link.name)


def _nobody(command: Command) -> None:
    raise RuntimeError(f"{command} outside a step")


def _group_after(groups: tuple[tuple[Space, ...], ...], group: tuple[Space, ...]) -> tuple[Space, ...] | None:
    """Return the read group to try next; the first one if the cluster is no longer read in such a group."""
    index = groups.index(group) + 1 if group in groups else 0
    return groups[index] if index < len(groups) else None
