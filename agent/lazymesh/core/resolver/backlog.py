"""What waits for a read, over all clusters, and the reads that can be sent now.

Batching without waiting: whatever has piled up while the in-flight window was full goes out in one transaction, and a
lone miss goes out alone at once. Which go together is left to ``waiting``. What does not fit is shed by the resolver,
oldest first; this module says which one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazymesh.core.events import Read
from lazymesh.core.resolver.tracked import IDLE, QUEUED, READING, Link, LinkState, Sent
from lazymesh.core.resolver.waiting import Lane

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.core.model import Address, Space
    from lazymesh.core.resolver.limits import Limits
    from lazymesh.core.resolver.tracked import Tracked


class Backlog:
    """The bounded queue of missed addresses, and beside it the re-reads: at most one per known address."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.missed = 0
        """How many missed addresses wait, for clusters ready or not; read-only for others, who read it at each step."""
        self.busy: dict[str, Link] = {}
        """The ready clusters for which something waits, by name."""
        self._parked: dict[str, Link] = {}
        """The others for which something may wait."""

    def level(self, *, others: bool) -> int:
        """Return how many missed addresses wait for ready clusters: the load that muting the kernel would relieve.

        Those of a cluster that is not ready cause no work, and of any one cluster only a part counts while there are
        others: muting the kernel for its sake would let one slow cluster harm all others.
        """
        waiting = [link.missed for link in self.busy.values()]
        if not others or not any(waiting):
            return sum(waiting)
        return sum(waiting) - max(0, max(waiting) - int(self._limits.queue * self._limits.one_cluster))

    def put(self, some: Sequence[Tracked], link: Link, spaces: tuple[Space, ...], *, urgent: bool) -> None:
        """Queue reads of addresses, or join those in flight; urgent: packets wait for them."""
        lane = link.lanes.get(spaces)
        if lane is None:
            lane = link.lanes[spaces] = Lane()
        before = lane.misses.count
        waiting, orphans = some, link.orphans
        if orphans:
            waiting = [tracked for tracked in some if tracked.address not in orphans]
            for tracked in some:
                if tracked.address in orphans:
                    tracked.fetch = READING
                    tracked.wants = spaces
        for tracked in waiting:
            tracked.fetch = QUEUED
            tracked.wants = spaces
        if urgent:
            lane.misses.add(waiting)
        else:
            lane.adopted.add([each for each in waiting if each.address in link.adopted])
            lane.checks.add([each for each in waiting if each.address not in link.adopted])
        if lane:
            (self.busy if link.state is LinkState.READY else self._parked)[link.name] = link
        link.missed += lane.misses.count - before
        self.missed += lane.misses.count - before

    def may_send(self, some: Sequence[Address], link: Link, spaces: tuple[Space, ...], now: float) -> bool:
        """Return whether a few addresses may be read at once, without queueing them.

        A lone miss mostly goes this way: nothing else waits for its cluster, and fewer reads are under way than may be.
        """
        return not (
            link.name in self.busy
            or link.state is not LinkState.READY
            or len(link.sent) >= self._limits.transactions_in_flight
            or len(some) >= self._limits.whole_at
            or len(some) * len(spaces) > self._limits.keys_per_transaction
            or (link.adopted and self._only_adopted(link, now))
            or not link.orphans.isdisjoint(some)
        )

    def sent_at_once(self, read: Read, some: list[Tracked], link: Link) -> None:
        """Note that a read of addresses that were not queued is under way."""
        for tracked in some:
            tracked.wants = read.spaces
        self._sent(read, some, link)

    def remove(self, tracked: Tracked, link: Link) -> None:
        """Take a queued address out."""
        address = tracked.address
        tracked.fetch = IDLE
        lane = link.lanes[tracked.wants]
        if lane.misses.remove(address):
            link.missed -= 1
            self.missed -= 1
        elif not lane.adopted.remove(address) and not lane.checks.remove(address):
            raise RuntimeError(f"address {address.hex()} is not queued for a read")

    def overflow(self) -> Tracked | None:
        """Return the address to shed next, or None while the bound holds.

        Those of clusters that are not ready go first: they would have waited anyway. Among those clusters, and then
        among the others, the one with the most gives up an old one: it is the one that is too slow.
        """
        if self.missed <= self._limits.queue:
            return None
        parked = [link for link in self._parked.values() if link.missed]
        lanes = max(parked or self.busy.values(), key=lambda link: link.missed).lanes.values()
        return max(lanes, key=lambda lane: lane.misses.count).misses.first()

    def park(self, link: Link) -> None:
        """Hold the cluster's addresses back: it is not ready."""
        if self.busy.pop(link.name, None) is not None and link.missed:
            self._parked[link.name] = link

    def unpark(self, link: Link) -> None:
        """Release the cluster's addresses: it is ready."""
        self._parked.pop(link.name, None)
        self.busy[link.name] = link

    def reads(self, now: float) -> list[Read]:
        """Return all reads that can be sent now, in rounds of one for each cluster, so that each gets its turn."""
        reads: list[Read] = []
        going = list(self.busy.values())
        while going:
            going = [link for link in going if self._read(link, now, reads)]
        return reads

    def _read(self, link: Link, now: float, reads: list[Read]) -> bool:
        """Add one read of the cluster's if one may be sent; return whether there may be another."""
        if len(link.sent) >= self._limits.transactions_in_flight or not link.breaker.admits(now):
            return False
        only_adopted = self._only_adopted(link, now)
        whole_at = self._limits.whole_at if now >= link.whole_after else None
        for spaces, lane in link.lanes.items():
            room = max(1, self._limits.keys_per_transaction // len(spaces))
            before = lane.misses.count
            if only_adopted:
                batch = lane.take_adopted(room, whole_at)
            else:
                batch = lane.take(room, whole_at, with_checks=now >= link.checks_after)
            taken = batch.taken()
            if taken:
                break
        else:
            self._stays_busy(link)
            return False
        if len(link.lanes) > 1:  # to the end of the row: the other lane comes first next time
            link.lanes[spaces] = link.lanes.pop(spaces)
        misses = before - lane.misses.count
        self.missed -= misses
        link.missed -= misses
        addresses = tuple([tracked.address for tracked in taken])
        read = Read(link.name, spaces, addresses, tuple(map(len, batch.whole)))
        self._sent(read, taken, link)
        reads.append(read)
        return self._stays_busy(link)

    @staticmethod
    def _sent(read: Read, some: list[Tracked], link: Link) -> None:
        for tracked in some:
            tracked.fetch = READING
        link.sent[read.addresses] = Sent(link, some)
        link.breaker.sent()

    def _stays_busy(self, link: Link) -> bool:
        """Return whether something still waits for the cluster; if not, it is no longer busy."""
        if any(link.lanes.values()):
            return True
        del self.busy[link.name]
        return False

    def _only_adopted(self, link: Link, now: float) -> bool:
        """Return whether only adopted entries may be read: for a limited time, until all of them are answered."""
        return bool(link.adopted) and now < link.ready_at + self._limits.adopted_first
