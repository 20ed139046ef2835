"""The resolver: what to read, install, watch and evict, decided from one event at a time.

The heart of demand paging. A miss becomes a read of the owner's keys, the answer is judged, a good record
becomes an entry, and a watch on the keys keeps it true; everything else is what happens when one of these
steps goes wrong, comes late or comes twice. One rule decides in doubt: a wrong identity is a security hole,
a lost known peer is an outage, a slow unknown peer is neither.

Left to others: I/O, clock and randomness to the shell (roles), which calls :meth:`Resolver.step` and carries out
each command as it comes; how one address moves to ``moves``; whether a record is believed to ``judge``;
what is sent when to ``backlog``; what happens to whole clusters to ``lifecycle``; which cluster owns an address to
``clusters``. The shell answers every Read by one Answered or ReadFailed, and every Install by an InstallsEnded,
which may answer several.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lazymesh.core import events as ev
from lazymesh.core.model import Reason
from lazymesh.core.records import decode_pair, decode_pairs
from lazymesh.core.resolver.admission import Admission
from lazymesh.core.resolver.backlog import Backlog
from lazymesh.core.resolver.breaker import Breaker, BreakerState
from lazymesh.core.resolver.ledger import Ledger
from lazymesh.core.resolver.lifecycle import Lifecycle
from lazymesh.core.resolver.moves import Moves
from lazymesh.core.resolver.negatives import Negatives
from lazymesh.core.resolver.tracked import ABSENT, IDLE, INSTALLED, READING, RESOLVING, LinkState, Tracked

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.core.clusters import ClusterInfo
    from lazymesh.core.model import Address, Entry, Space
    from lazymesh.core.records import Record
    from lazymesh.core.resolver.judge import Judge
    from lazymesh.core.resolver.limits import Limits
    from lazymesh.core.resolver.tracked import Link, Sent


_APART: frozenset[ev.ReadFailure] = frozenset({"exhausted", "permission"})
"""Failures of reading a /24 whole that may not hold for its addresses alone."""

_WELL: frozenset[ev.ReadFailure] = frozenset({"permission", "owner"})
"""Failures while the followed store is well: our certificate is not, or the owner's own store behind a cache."""


def _no_jitter() -> float:
    return 1.0


class Known(NamedTuple):
    """What the resolver knows of one address."""

    cluster: str | None
    """None: no cluster, or more than one, owns the address."""
    entry: Entry | None


class ClusterReads(NamedTuple):
    """How the reads of one cluster are doing."""

    breaker: str
    """``closed``, ``open`` or ``half-open``."""
    in_flight: int
    """Transactions sent and not answered."""


class Resolver:
    """State machine over addresses; ``events`` is its language."""

    def __init__(self, limits: Limits, judge: Judge, jitter: Callable[[], float] = _no_jitter) -> None:
        """Jitter: numbers from 0 to 1."""
        self._limits = limits
        self._judge = judge
        self._backlog = Backlog(limits)
        self._ledger = Ledger(limits)
        self._negatives = Negatives(limits)
        self.admission = Admission(limits)
        """How many misses are admitted, and why not all; read-only for others."""
        self._moves = Moves(self._judge, self._backlog, self._ledger, self._negatives, self.admission)
        self._lifecycle = Lifecycle(
            lambda: Breaker(limits, jitter), self._judge, self._backlog, self._ledger, self._moves
        )
        self._links = self._lifecycle.links
        self._muted = False
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            ev.Misses: self._misses,
            ev.Answered: self._answered,
            ev.ReadFailed: self._read_failed,
            ev.Changed: self._changed,
            ev.StoreReset: self._lifecycle.reset,
            ev.ClusterReady: self._lifecycle.ready,
            ev.ClusterSilent: self._lifecycle.silent,
            ev.ClusterGone: self._lifecycle.gone,
            ev.TableChanged: self._table_changed,
            ev.IdentitiesKnown: self._identities_known,
            ev.IdentityGone: self._identity_gone,
            ev.InstallsEnded: self._installs_ended,
            ev.Adopted: self._adopted,
            ev.AllListed: self._lifecycle.all_listed,
            ev.Lost: self._lost,
            ev.Used: self._used,
            ev.Shrink: self._shrink,
            ev.Tick: self._tick,
        }

    def step(self, event: ev.Event, now: float, carry_out: Callable[[ev.Command], None]) -> None:
        """Take one event; ``carry_out`` is called with each command as soon as it is decided.

        It must not call back: what comes of a command is another event, after this one. A packet waits for the
        command, but not for the books that are kept after it.
        """
        self._moves.carry_out, self._moves.now = carry_out, now
        self._handlers[type(event)](event, now)
        if self._backlog.busy:
            for read in self._backlog.reads(now):
                carry_out(read)
        # What still waits now has to fit. Mostly nothing waits, and this runs at every event.
        if self._muted or self._backlog.missed:
            self._shed(now)
            self._mute()

    # --- misses ---------------------------------------------------------------------------------------------

    def _misses(self, event: ev.Misses, now: float) -> None:
        if len(event.addresses) == 1 and self._read_alone(event.addresses[0], event.at[0], now):
            return
        fresh: dict[Address, float | None] = dict(zip(event.addresses, event.at, strict=True))
        if len(fresh) < len(event.addresses) or not self._moves.tracked.keys().isdisjoint(fresh):
            fresh = self._unknown(event, now)
        if fresh:
            self._resolve(fresh, now)

    def _read_alone(self, address: Address, at: float, now: float) -> bool:
        """Read a lone new address at once if nothing speaks against it; return whether that was done.

        It is what the rest of ``_misses`` would do, in a third of the calls: a lone miss finds cold caches, where each
        costs microseconds.
        """
        table = self._judge.table
        owners = table.owners(address)
        if len(owners) != 1 or address in self._moves.tracked:
            return False
        link, cluster = self._links.get(owners[0]), table.cluster(owners[0])
        if link is None or cluster is None or not link.breaker.admits(now):
            return False
        spaces = cluster.spaces[0]
        if not self._backlog.may_send((address,), link, spaces, now):
            return False
        read = ev.Read(link.name, spaces, (address,))
        self._moves.carry_out(read)
        self._backlog.sent_at_once(read, self._moves.begin((address,), (at,), owners, link), link)
        return True

    def _unknown(self, event: ev.Misses, now: float) -> dict[Address, float | None]:
        """Answer the misses of addresses that are known; return the others, each with when it missed first."""
        known = self._moves.tracked
        fresh: dict[Address, float | None] = {}
        for address, at in zip(event.addresses, event.at, strict=True):
            if address not in known:
                fresh.setdefault(address, at)
                continue
            tracked = known[address]
            if tracked.phase is ABSENT and tracked.expires <= now:
                self._moves.forget(tracked)
                fresh[address] = at
            else:
                self._missed_again(tracked, at, now)
        return fresh

    def _missed_again(self, tracked: Tracked, at: float, now: float) -> None:
        if tracked.phase is RESOLVING:
            if tracked.missed_at is None:
                tracked.missed_at = at
        elif tracked.phase is INSTALLED:
            self._missed_though_installed(tracked, at, now)
        else:
            tracked.missed_at = at
            self._negatives.renew(tracked, now)
            self._moves.report(tracked, "absent", tracked.reason, cached=True)

    def _resolve(self, missed: dict[Address, float | None], now: float) -> None:
        """Resolve all untracked addresses of one step together, given with when each missed, to share reads."""
        for owners, some in self._judge.table.by_owners(missed).items():
            self._resolve_with(owners, some, [missed[address] for address in some], now)

    def _resolve_with(
        self,
        owners: tuple[str, ...],
        addresses: list[Address],
        missed_at: list[float | None],
        now: float,
    ) -> None:
        cluster = self._asked(owners)
        link = self._lifecycle.link(cluster.name) if cluster is not None else None
        begin = partial(self._moves.begin, addresses, missed_at, owners, link)
        if cluster is None or link is None:
            self._refuse_all(begin(), _unowned(owners), now)
        elif link.state is LinkState.SILENT or not link.breaker.admits(now):
            self._refuse_all(begin(), Reason.CLUSTER_DOWN, now)
        elif self._backlog.may_send(addresses, link, cluster.spaces[0], now):
            read = ev.Read(link.name, cluster.spaces[0], tuple(addresses))
            self._moves.carry_out(read)
            self._backlog.sent_at_once(read, begin(), link)
        else:
            self._backlog.put(begin(), link, cluster.spaces[0], urgent=True)

    def _refuse_all(self, begun: list[Tracked], reason: Reason, now: float) -> None:
        for tracked in begun:
            self._moves.refuse(tracked, reason, "", now)

    def _asked(self, owners: tuple[str, ...]) -> ClusterInfo | None:
        """Return the one cluster that can be asked for an address with these owners."""
        return self._judge.table.cluster(owners[0]) if len(owners) == 1 else None

    def _are(self, owners: tuple[str, ...], link: Link | None) -> bool:
        """Return whether addresses with these owners are resolved with this link; None: with no cluster.

        If the operator gave them to a cluster that has not joined, that may be the one with any unjoined id.
        """
        asked = self._asked(owners)
        if link is None or link.unjoined_id:
            return asked is None and (link is None or len(owners) == 1)
        return asked is not None and asked.name == link.name

    def _missed_though_installed(self, tracked: Tracked, at: float, now: float) -> None:
        self._ledger.touch(tracked)
        if tracked.address in self._ledger.unanswered:
            if tracked.missed_at is None:
                tracked.missed_at = at
            return
        tracked.missed_at = at
        if tracked.entry is not None and at > tracked.installed_at:
            self._moves.install(tracked, tracked.entry, now)
        else:
            # Signalled before the entry was in the map. Its packet may be held, so it too is answered.
            self._moves.report(tracked, "installed", None, cached=True)

    # --- what the stores say --------------------------------------------------------------------------------

    def _answered(self, answer: ev.Answered, now: float) -> None:
        sent = self._ended(answer)
        if sent is None:
            return
        link = sent.link
        link.breaker.succeeded()
        landed = self._learn_alone(sent, answer) or self._learn(sent, answer)
        self._take_answers(landed, link, now)
        self._watch(link, landed, answer.spaces, answer.as_of)

    def _learn_alone(self, sent: Sent, answer: ev.Answered) -> list[Tracked]:
        """Do the same as ``_learn`` for the first answer to a lone address, in fewer calls; empty: it is not one."""
        tracked = sent.asking[0]
        if len(sent.asking) > 1 or tracked.link is not sent.link or sent.void or tracked.keys:
            return []
        tracked.fetch = IDLE
        tracked.keys, tracked.revisions = answer.spaces, (answer.as_of,) * len(answer.spaces)
        records: list[Record | None] = []
        for value in answer.values:
            records.append(None if value is None else decode_pair(value, tracked.address))  # noqa: PERF401 (a call)
        tracked.records = tuple(records)
        return sent.asking

    def _learn(self, sent: Sent, answer: ev.Answered) -> list[Tracked]:
        """Note what the keys of each address say; return the addresses that can be decided with it."""
        landed: list[Tracked] = []
        spaces, as_of, width = answer.spaces, answer.as_of, len(answer.spaces)
        columns = [decode_pairs(answer.values[at::width], answer.addresses) for at in range(width)]
        revisions = (as_of,) * width
        for tracked, records in zip(self._land(sent), zip(*columns, strict=True), strict=True):
            if tracked is None:
                continue
            if not tracked.keys:
                tracked.keys, tracked.records, tracked.revisions = spaces, records, revisions
            elif tracked.withdrawn and tracked.knows_later(spaces, as_of):
                # It was answered before the deletion, so it does not decide.
                self._moves.read(tracked, spaces)
                continue
            else:
                for space, record in zip(spaces, records, strict=True):
                    tracked.learn(space, record, as_of)
            landed.append(tracked)
        return landed

    def _ended(self, read: ev.Answered | ev.ReadFailed) -> Sent | None:
        """Take a read out of those in flight; None: it was not sent."""
        link = self._links.get(read.cluster)
        return None if link is None else link.sent.pop(read.addresses, None)

    def _land(self, sent: Sent) -> list[Tracked | None]:
        """Return for each address of a read that has ended its Tracked if the outcome can be used, else None."""
        landed: list[Tracked | None] = []
        for tracked in sent.asking:
            if tracked.link is sent.link and not sent.void:
                tracked.fetch = IDLE
                landed.append(tracked)
            else:
                self._read_once_more(sent.link, tracked.address)
                landed.append(None)
        return landed

    def _read_once_more(self, link: Link, address: Address) -> None:
        """Read an address again, if it still waits for an answer that turned out to be worthless."""
        link.orphans.discard(address)
        tracked = self._moves.tracked.get(address)
        if tracked is not None and tracked.link is link and tracked.fetch is READING:
            self._moves.read(tracked, tracked.wants)

    def _take_answers(self, landed: list[Tracked], link: Link, now: float) -> None:
        cluster = self._judge.table.cluster(link.name)
        for tracked in landed:
            tracked.spaces = tracked.wants
        if cluster is not None:
            self._moves.settle_all(landed, link, cluster, now)
        believed = link.state is LinkState.READY and self._ledger.in_doubt
        if not link.adopted and not believed:
            return
        for tracked in landed:
            if tracked.fetch is not IDLE:
                continue  # the next group is being asked, and may know more
            link.adopted.discard(tracked.address)
            if believed and tracked.entry is not None:
                self._ledger.trust(tracked)

    def _watch(self, link: Link, landed: list[Tracked], spaces: tuple[Space, ...], as_of: int) -> None:
        # After the installs, which packets wait for: the command names the revision, so no change is lost.
        addresses = []
        for tracked in landed:
            # No link: another address of this same answer has pushed it out of the budget.
            if tracked.link is link and not tracked.fleeting and spaces[0] not in tracked.watched:
                tracked.watched = tracked.watched + spaces if tracked.watched else spaces
                addresses.append(tracked.address)
        if addresses:
            self._moves.carry_out(ev.Watch(link.name, spaces, tuple(addresses), as_of))

    def _installs_ended(self, event: ev.InstallsEnded, now: float) -> None:
        self._moves.installs_ended(event.addresses, event.errors, now)

    def _read_failed(self, failure: ev.ReadFailed, now: float) -> None:
        sent = self._ended(failure)
        if sent is None:
            return
        link = sent.link
        before = link.breaker.state
        if failure.whole and failure.kind in _APART:
            self._read_apart(sent, now)
            return
        if failure.kind in _WELL:
            link.breaker.succeeded()
        else:
            link.breaker.failed(now)
        for tracked in self._land(sent):
            if tracked is None:
                continue
            link.adopted.discard(tracked.address)
            if tracked.withdrawn:
                self._moves.refuse(tracked, Reason.NOT_FOUND, "", now)
            elif tracked.waiting:
                self._moves.refuse(tracked, Reason.READ_FAILED, failure.kind, now)
            elif self._ledger.doubts(tracked):
                link.checks_after = now + self._limits.recheck_pause
                self._moves.read(tracked, tracked.wants)
        if link.breaker.state is BreakerState.OPEN and before is not BreakerState.OPEN:
            self._lifecycle.give_up(link, now)

    def _read_apart(self, sent: Sent, now: float) -> None:
        """Read each address alone for a while: what was too much in its /24 need not be what we need."""
        sent.link.whole_after = now + self._limits.apart_for
        sent.link.breaker.succeeded()
        for tracked in self._land(sent):
            if tracked is not None:
                self._moves.read(tracked, tracked.wants)

    def _changed(self, change: ev.Changed, now: float) -> None:
        state = change.state
        tracked = self._moves.tracked.get(state.address)
        if tracked is None or tracked.link is None or tracked.link.name != change.cluster:
            return
        # An unwatched key's change is from a watch given up meanwhile, perhaps of a store that no longer exists.
        if state.space not in tracked.watched:
            return
        (record,) = decode_pairs((state.value,), (state.address,))
        if not tracked.learn(state.space, record, state.as_of):
            return
        gone = tracked.entry is not None and tracked.newest() is None
        if gone and tracked.phase is INSTALLED and self._may_have_moved(tracked, tracked.link, now):
            tracked.withdrawn = True
            if tracked.fetch is IDLE:
                self._moves.read(tracked, tracked.spaces)
            return
        if gone:
            # Before the next group is asked, if there is one: by now the address may be another's.
            self._moves.refuse(tracked, Reason.NOT_FOUND, "", now)
        self._moves.settle(tracked, now)

    @staticmethod
    def _may_have_moved(tracked: Tracked, link: Link, now: float) -> bool:
        """Return whether a deleted record may be under the group's other key, and whether a read can find out."""
        return len(tracked.spaces) > 1 and link.state is LinkState.READY and link.breaker.admits(now)

    # --- table, identities, adoption, time ------------------------------------------------------------------

    def _table_changed(self, event: ev.TableChanged, now: float) -> None:
        self._judge.table = event.table
        self._lifecycle.introduce()
        missed: dict[Address, float | None] = {}
        for tracked in list(self._moves.tracked.values()):
            owners = event.table.owners(tracked.address)
            # What the operator gave to a cluster is its own before it has joined, and after it has left.
            fits = self._are(owners, tracked.link)
            same = owners == tracked.owners and (fits or not owners)
            if same or self._moves.tracked.get(tracked.address) is not tracked:
                continue  # or another address of this same table has pushed it out of memory
            if tracked.link is not None and fits:
                tracked.owners = owners  # adopted before its cluster's nodes were listed
            elif tracked.waiting:
                missed[tracked.address] = tracked.missed_at
                self._moves.forget(tracked)
            else:
                self._moves.drop(tracked, _unowned(owners).value, _unowned(owners))
        if missed:
            self._resolve(missed, now)

    def _identities_known(self, event: ev.IdentitiesKnown, now: float) -> None:
        for identity in event.identities:
            for tracked in self._ledger.named(identity):
                if tracked.phase is ABSENT and tracked.reason is Reason.UNKNOWN_IDENTITY:
                    self._moves.settle(tracked, now)

    def _identity_gone(self, event: ev.IdentityGone, now: float) -> None:
        for tracked in self._ledger.named(event.identity):
            if tracked.entry is not None and tracked.entry.identity == event.identity:
                self._moves.refuse(tracked, Reason.UNKNOWN_IDENTITY, "", now)

    def _adopted(self, event: ev.Adopted, now: float) -> None:
        owners = self._judge.table.owners(event.address)
        link = self._lifecycle.link_of_id(event.cluster_id)
        if owners and not self._are(owners, link):
            self._disclaim(event, link, _unowned(owners).value)
        elif event.address in self._moves.tracked:
            # Missed before we knew of it: what the miss leads to is newer than what an earlier life believed.
            if self._moves.tracked[event.address].entry is None:
                self._disclaim(event, link, "expired")
        else:
            self._adopt(event, owners, link, now)

    def _adopt(self, event: ev.Adopted, owners: tuple[str, ...], link: Link, now: float) -> None:
        self._moves.make_room()
        (tracked,) = self._moves.begin([event.address], [None], owners, link)
        tracked.move(INSTALLED)
        self._ledger.own([tracked], event.entry)
        self._ledger.doubt([tracked], now)
        link.adopted.add(event.address)
        cluster = self._judge.table.cluster(link.name)
        if link.state is LinkState.READY and cluster is not None:
            self._moves.read(tracked, cluster.spaces[0])

    def _disclaim(self, event: ev.Adopted, link: Link, why: str) -> None:
        self._moves.carry_out(ev.Evict(event.address, why))
        self._moves.carry_out(ev.Report([event.address], link.name, "evicted", None, why, [None]))

    def _lost(self, event: ev.Lost, _now: float) -> None:
        for address in event.addresses:
            tracked = self._moves.tracked.get(address)
            # An Install that is under way will find out for itself.
            if tracked is not None and tracked.entry is not None and address not in self._ledger.unanswered:
                self._moves.report(tracked, "taken-over", None)
                self._moves.give_away(tracked)

    def _used(self, event: ev.Used, _now: float) -> None:
        for address in event.addresses:
            tracked = self._moves.tracked.get(address)
            if tracked is not None and tracked.entry is not None:
                self._ledger.touch(tracked)

    def _shrink(self, event: ev.Shrink, _now: float) -> None:
        for _ in range(event.entries):
            victim = self._ledger.oldest()
            if victim is None:
                return
            self._moves.drop(victim, "crowded", None)

    def _tick(self, _event: ev.Tick, now: float) -> None:
        for tracked in self._negatives.expired(now):
            self._moves.forget(tracked)
        for tracked in self._ledger.stale(now):
            self._moves.drop(tracked, "expired", None)
        if self.admission.look(now):
            self._moves.carry_out(ev.Admit(self.admission.share))

    # --- odds and ends --------------------------------------------------------------------------------------

    def _shed(self, now: float) -> None:
        while (victim := self._backlog.overflow()) is not None:
            self._moves.give_up(victim, Reason.SHED, now)

    def _mute(self) -> None:
        others = sum([link.state is LinkState.READY for link in self._links.values()]) > 1
        level = self._backlog.level(others=others) / self._limits.queue
        if level <= self._limits.mute_low if self._muted else level >= self._limits.mute_high:
            self._muted = not self._muted
            self._moves.carry_out(ev.Mute(self._muted))
            if self._muted and self.admission.overrun():
                self._moves.carry_out(ev.Admit(self.admission.share))

    # --- for status and metrics: read only ------------------------------------------------------------------

    @property
    def counts(self) -> dict[str, int]:
        """How many addresses are in each state; the sum is all that is remembered."""
        tracked, absent = len(self._moves.tracked), len(self._negatives)
        installed = sum(1 for entry in self._ledger if entry.phase is INSTALLED)
        return {"resolving": tracked - absent - installed, "installed": installed, "absent": absent}

    @property
    def absent(self) -> dict[Reason, int]:
        """How many addresses are absent for each reason."""
        return self._negatives.counts()

    @property
    def owned(self) -> int:
        """How many of our entries are in the map, or about to be."""
        return len(self._ledger)

    @property
    def room(self) -> int:
        """How many more entries there is room for before the least recently used has to go."""
        return self._ledger.room

    @property
    def queued(self) -> int:
        """How many missed addresses wait for a read."""
        return self._backlog.missed

    @property
    def stale(self) -> dict[str, int]:
        """How many entries of each cluster are served although they cannot be confirmed now."""
        return self._ledger.doubted()

    def stale_addresses(self) -> list[Address]:
        """Return the addresses of such entries."""
        return [entry.address for entry in self._ledger if self._ledger.doubts(entry)]

    @property
    def clusters(self) -> dict[str, ClusterReads]:
        """The reads of each cluster that was ever heard of, by name."""
        return {
            name: ClusterReads(link.breaker.state.value, len(link.sent)) for name, link in self._links.items()
        }

    def describe(self, address: Address) -> Known | None:
        """Return what is known of one address; None if it is not tracked."""
        tracked = self._moves.tracked.get(address)
        if tracked is None:
            return None
        return Known(None if tracked.link is None else tracked.link.name, tracked.entry)


def _unowned(owners: tuple[str, ...]) -> Reason:
    """Return why no cluster can be asked with these owners; also used for an address that changed hands."""
    return Reason.AMBIGUOUS if len(owners) > 1 else Reason.NO_CLUSTER
