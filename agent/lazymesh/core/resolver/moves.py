"""The moves of one address: begin, read, settle, install, refuse, drop, forget.

``resolver`` and ``lifecycle`` decide on which event which address makes which move. Here a move is carried
through, so that all books agree when it is over: phase, queue, ledger, negative cache, watches, and the
commands that tell the shell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazymesh.core.events import Command, Evict, Install, Report, Unwatch
from lazymesh.core.model import Reason
from lazymesh.core.records import entry_of
from lazymesh.core.resolver.judge import Judge, Refusal
from lazymesh.core.resolver.link import VOID, LinkState
from lazymesh.core.resolver.tracked import Fetch, Phase, Tracked

if TYPE_CHECKING:
    from lazymesh.core.clusters import ClusterInfo
    from lazymesh.core.model import Address, Entry, Space
    from lazymesh.core.resolver.admission import Admission
    from lazymesh.core.resolver.backlog import Backlog
    from lazymesh.core.resolver.ledger import Ledger
    from lazymesh.core.resolver.link import Link
    from lazymesh.core.resolver.negatives import Negatives

_OUTCOMES = {
    Reason.READ_FAILED: "failed",
    Reason.MAP_FULL: "failed",
    Reason.INSTALL_FAILED: "failed",
    Reason.SHED: "shed",
}
"""How a Report calls an absence that is no answer; all others are ``absent``."""
_UNANSWERED = frozenset({Reason.READ_FAILED, Reason.CLUSTER_DOWN, Reason.SHED})
"""Ends that tell nothing about how long an answer takes."""


class Moves:
    """All tracked addresses, and what can be done to one of them."""

    def __init__(
        self, judge: Judge, backlog: Backlog, ledger: Ledger, negatives: Negatives, admission: Admission
    ) -> None:
        self.tracked: dict[Address, Tracked] = {}
        self.out: list[Command] = []
        """The commands of the step in hand; the resolver exchanges the list at each step."""
        self.now = 0.0
        """The time of the step in hand."""
        self.admission = admission
        self._judge = judge
        self._backlog = backlog
        self._ledger = ledger
        self._negatives = negatives

    def begin(
        self, address: Address, owners: tuple[str, ...], link: Link | None, missed_at: float | None = None
    ) -> Tracked:
        """Track one more address."""
        tracked = self.tracked[address] = Tracked(address, owners, link, missed_at)
        if link is not None:
            link.members[address] = tracked
        return tracked

    def forget(self, tracked: Tracked) -> None:
        """Stop tracking an address that has no entry of ours."""
        link = tracked.link
        if link is not None:
            if tracked.fetch is Fetch.QUEUED:
                self._backlog.remove(tracked, link)
            elif tracked.fetch is Fetch.READING:
                # Who misses the address again must not be given what is older than what we forget here.
                link.reading[tracked.address] = VOID
            if tracked.watched:
                self.out.append(Unwatch(link.name, tracked.address))
            del link.members[tracked.address]
            link.unproven.discard(tracked.address)
            # Whoever still holds the object further up the stack must find nothing to act upon.
            tracked.link = None
        if tracked.phase is Phase.ABSENT:
            self._negatives.remove(tracked)
        self._ledger.name(tracked, 0)
        del self.tracked[tracked.address]

    def drop(self, tracked: Tracked, why: str, reason: Reason | None) -> None:
        """Evict the entry if there is one, tell whoever waits, and forget the address."""
        if tracked.entry is not None:
            self._evict(tracked, why)
            self.report(tracked, "evicted", None, why)
        elif tracked.missed_at is not None:
            self.report(tracked, "absent", reason)
        self.forget(tracked)

    def read(self, tracked: Tracked, spaces: tuple[Space, ...]) -> None:
        """Queue a read of the address."""
        if tracked.link is not None:
            self._backlog.put(tracked, tracked.link, spaces, urgent=tracked.waiting)

    def give_up(self, tracked: Tracked, reason: Reason, now: float) -> None:
        """End the read that a miss waits for.

        If it is in flight already it may still come back, and is welcome then.
        """
        if tracked.fetch is Fetch.QUEUED and tracked.link is not None:
            self._backlog.remove(tracked, tracked.link)
        if tracked.waiting:
            self.refuse(tracked, reason, "", now)

    def settle(self, tracked: Tracked, now: float) -> None:
        """Bring the map in line with what the address's keys say."""
        cluster = self._cluster(tracked)
        if cluster is not None and tracked.spaces:
            self.settle_in(tracked, cluster, now)

    def settle_in(self, tracked: Tracked, cluster: ClusterInfo, now: float) -> None:
        """Do the same, by its cluster; some group has answered."""
        tracked.withdrawn = False
        value = tracked.newest()
        if value is None:
            self._settle_without_record(tracked, cluster, now)
            return
        verdict = self._judge.verdict(value, tracked.address, cluster)
        if isinstance(verdict, Refusal):
            self._ledger.name(tracked, verdict.identity)
            self.refuse(tracked, verdict.reason, verdict.detail, now)
        elif tracked.address in self._ledger.unanswered:
            tracked.again = True
        elif tracked.entry != (entry := entry_of(verdict, self._judge.here)):
            self._ledger.name(tracked, verdict.identity)
            self._install(tracked, entry, cluster, now)

    def _settle_without_record(self, tracked: Tracked, cluster: ClusterInfo, now: float) -> None:
        following = _group_after(cluster.spaces, tracked.spaces)
        if following is None:
            self._ledger.name(tracked, 0)
            self.refuse(tracked, Reason.NOT_FOUND, "", now)
        elif tracked.fetch is Fetch.IDLE:
            self.read(tracked, following)

    def install(self, tracked: Tracked, entry: Entry, now: float) -> None:
        """Send an Install; room in the budget is made first."""
        cluster = self._cluster(tracked)
        if cluster is not None:
            self._install(tracked, entry, cluster, now)

    def _install(self, tracked: Tracked, entry: Entry, cluster: ClusterInfo, now: float) -> None:
        if tracked.phase is Phase.ABSENT:
            self._negatives.remove(tracked)
            tracked.move(Phase.RESOLVING)
        if tracked.entry is None:
            self.make_room()
        self._ledger.own(tracked, entry)
        if tracked.link is not None and tracked.link.state is not LinkState.READY:
            self._ledger.doubt(tracked, now)
        tracked.installed_at = now
        self._ledger.unanswered.add(tracked.address)
        self.out.append(Install(tracked.address, entry, cluster.cluster_id))

    def make_room(self) -> None:
        """Evict what must go before one more entry may come."""
        while (victim := self._ledger.surplus()) is not None:
            self.drop(victim, "budget", None)

    def install_ended(self, address: Address, error: Reason | None, now: float) -> None:
        """Take the outcome of an Install, and then whatever came while it was unanswered."""
        self._ledger.unanswered.discard(address)
        tracked = self.tracked.get(address)
        if tracked is None:
            return
        # Without an entry it was evicted behind the Install's back: the outcome has no meaning any more.
        if tracked.entry is not None:
            if error is None:
                self._installed(tracked)
            elif error is Reason.TAKEN:
                self.report(tracked, "installed", None, "by the map's owner")
                self.give_away(tracked)
                return
            else:
                self.refuse(tracked, error, "", now)
        if tracked.again:
            tracked.again = False
            self.settle(tracked, now)

    def _installed(self, tracked: Tracked) -> None:
        if tracked.phase is Phase.RESOLVING:
            tracked.move(Phase.INSTALLED)
            self.report(tracked, "installed", None)
        elif tracked.missed_at is None:
            self.report(tracked, "updated", None)
        else:
            self.report(tracked, "installed", None, "the entry had vanished")

    def refuse(self, tracked: Tracked, reason: Reason, detail: str, now: float) -> None:
        """Let the address have no entry, for this reason."""
        tracked.withdrawn = False
        if tracked.entry is not None:
            self._evict(tracked, "deleted" if reason is Reason.NOT_FOUND else reason.value)
        if tracked.phase is Phase.INSTALLED:
            self.report(tracked, "evicted", reason, detail)
        elif tracked.missed_at is not None:
            self.report(tracked, _OUTCOMES.get(reason, "absent"), reason, detail)
        if tracked.phase is Phase.ABSENT:
            self._negatives.remove(tracked)
        else:
            tracked.move(Phase.ABSENT)
        self._negatives.add(tracked, reason, now)
        oldest = self._negatives.overflow()
        if oldest is not None:
            self.forget(oldest)

    def give_away(self, tracked: Tracked) -> None:
        """Forget an address whose entry is somebody else's by now: nothing is left of ours to be evicted."""
        self._ledger.disown(tracked)
        self.forget(tracked)

    def report(
        self, tracked: Tracked, outcome: str, reason: Reason | None, detail: str = "", *, cached: bool = False
    ) -> None:
        """Tell how it ended; the miss that waited for it, if any, is answered by this."""
        link = tracked.link
        cluster = link.name if link is not None else None
        if link is not None and tracked.missed_at is not None and not cached and reason not in _UNANSWERED:
            self.admission.took(link.name, self.now - max(tracked.missed_at, link.ready_at))
        self.out.append(Report(tracked.address, cluster, outcome, reason, detail, tracked.missed_at, cached))
        tracked.missed_at = None

    def _evict(self, tracked: Tracked, why: str) -> None:
        # A first Install that is answered by an error left nothing of ours in the map.
        if tracked.phase is Phase.INSTALLED or tracked.address in self._ledger.unanswered:
            self.out.append(Evict(tracked.address, why))
        self._ledger.disown(tracked)

    def _cluster(self, tracked: Tracked) -> ClusterInfo | None:
        return None if tracked.link is None else self._judge.table.cluster(tracked.link.name)


def _group_after(groups: tuple[tuple[Space, ...], ...], group: tuple[Space, ...]) -> tuple[Space, ...] | None:
    """Return the read group to try next; the first one if the cluster is no longer read in such a group."""
    index = groups.index(group) + 1 if group in groups else 0
    return groups[index] if index < len(groups) else None
