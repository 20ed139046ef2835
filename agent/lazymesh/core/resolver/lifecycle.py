"""Clusters come, fall silent, are replaced and go: what each event means for their addresses.

Entries outlive silence: a peer that was well a moment ago most likely still is, and cutting it off would turn
an etcd outage into a network outage. They are in doubt meanwhile, and read again before they are trusted. What happens
to one address in all this is left to ``moves``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazymesh.core.events import Unwatch
from lazymesh.core.model import Reason
from lazymesh.core.resolver.tracked import IDLE, Link, LinkState

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.core.events import AllListed, ClusterGone, ClusterReady, ClusterSilent, StoreReset
    from lazymesh.core.resolver.backlog import Backlog
    from lazymesh.core.resolver.breaker import Breaker
    from lazymesh.core.resolver.judge import Judge
    from lazymesh.core.resolver.ledger import Ledger
    from lazymesh.core.resolver.moves import Moves


class Lifecycle:
    """The links to all clusters ever heard of, and what happens to them."""

    def __init__(
        self, breaker: Callable[[], Breaker], judge: Judge, backlog: Backlog, ledger: Ledger, moves: Moves
    ) -> None:
        """``breaker`` makes a new breaker for each cluster."""
        self.links: dict[str, Link] = {}
        self._unjoined: dict[int, Link] = {}
        """By the id in the journal: clusters that have adopted entries and have not joined so far."""
        self._breaker = breaker
        self._judge = judge
        self._backlog = backlog
        self._ledger = ledger
        self._moves = moves

    def link(self, name: str) -> Link:
        """Return the cluster's link; it is made when the cluster is first heard of."""
        link = self.links.get(name)
        if link is None:
            link = self.links[name] = Link(name, self._breaker())
        return link

    def link_of_id(self, cluster_id: int) -> Link:
        """Return the link of the cluster with this id, or what stands in for it until it joins."""
        cluster = self._judge.table.by_id(cluster_id)
        if cluster is not None:
            return self.link(cluster.name)
        if cluster_id not in self._unjoined:
            self._unjoined[cluster_id] = Link(f"id {cluster_id}", self._breaker(), unjoined_id=cluster_id)
        return self._unjoined[cluster_id]

    def introduce(self) -> None:
        """Give clusters that have joined the entries that were adopted under their ids."""
        for cluster_id, unjoined in list(self._unjoined.items()):
            if (cluster := self._judge.table.by_id(cluster_id)) is not None:
                link = self.link(cluster.name)
                for tracked in unjoined.members.values():
                    tracked.link = link
                link.members |= unjoined.members
                link.adopted |= unjoined.adopted
                del self._unjoined[cluster_id]

    def all_listed(self, _event: AllListed, _now: float) -> None:
        """Evict the entries of clusters that will not join any more."""
        for unjoined in self._unjoined.values():
            for tracked in list(unjoined.members.values()):
                self._moves.drop(tracked, "cluster-gone", Reason.NO_CLUSTER)
        self._unjoined.clear()

    def ready(self, event: ClusterReady, now: float) -> None:
        """Release what waited for the cluster, and read its known addresses again; do nothing more if repeated."""
        link = self.link(event.cluster)
        link.breaker.succeeded()
        if link.state is not LinkState.READY:
            if link.state is LinkState.SILENT:
                link.checks_after = now + link.breaker.spread()
            link.state, link.ready_at = LinkState.READY, now
            self._backlog.unpark(link)
            self._read_again(link)

    def silent(self, event: ClusterSilent, now: float) -> None:
        """Keep what is installed, in doubt; report to misses that wait for an answer that none will come."""
        link = self.link(event.cluster)
        link.state = LinkState.SILENT
        self._backlog.park(link)
        self.give_up(link, now)
        self._doubt_all(link, now)

    def reset(self, event: StoreReset, now: float) -> None:
        """Forget all revisions, and the watches that started from them."""
        link = self.link(event.cluster)
        link.void_reads()
        for tracked in list(link.members.values()):
            if tracked.withdrawn:
                self._moves.refuse(tracked, Reason.NOT_FOUND, "", now)
            if tracked.link is not link:
                continue  # there was no room to remember it: it is forgotten, and unwatched
            if tracked.watched:
                self._moves.carry_out(Unwatch(link.name, tracked.address))
            tracked.forget_states()
        self._doubt_all(link, now)
        if link.state is LinkState.READY:
            self._read_again(link)

    def gone(self, event: ClusterGone, _now: float) -> None:
        """Evict and forget everything of the cluster's."""
        link = self.link(event.cluster)
        for tracked in list(link.members.values()):
            self._moves.drop(tracked, "cluster-gone", Reason.NO_CLUSTER)
        link.state = LinkState.CONNECTING
        self._backlog.park(link)
        link.void_reads()
        # Reads in flight are remembered, lest a cluster that returns under this name takes them for its own.
        if not link.sent:
            del self.links[event.cluster]
        self._moves.admission.forget(event.cluster)

    def give_up(self, link: Link, now: float) -> None:
        """Report to all misses that wait for the cluster that it is down."""
        for tracked in list(link.members.values()):
            if tracked.waiting:
                self._moves.give_up(tracked, Reason.CLUSTER_DOWN, now)
            elif tracked.withdrawn:
                self._moves.refuse(tracked, Reason.NOT_FOUND, "", now)

    def _doubt_all(self, link: Link, now: float) -> None:
        self._ledger.doubt([each for each in link.members.values() if each.entry is not None], now)

    def _read_again(self, link: Link) -> None:
        cluster = self._judge.table.cluster(link.name)
        if cluster is None:
            return
        for tracked in list(link.members.values()):
            if tracked.fetch is IDLE:
                # Read the group that was judged last: a lagging cache must not overrule the owner.
                known = tracked.spaces in cluster.spaces
                self._moves.read(tracked, tracked.spaces if known else cluster.spaces[0])
