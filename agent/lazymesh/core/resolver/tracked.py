"""What is remembered about one address, and about the cluster that it is resolved with.

Two things run side by side. The *phase* is what people ask about: resolving, installed, absent. The *fetch*
is whether a read is due or under way: an installed entry keeps serving while it is read again. What moves an
address from one to the other, and why, is left to ``moves``; here is only what may follow what.

Each cluster has its own lanes, in-flight window and breaker, so that a dead or slow one costs the others nothing.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Struct

from lazymesh.core.model import Reason

if TYPE_CHECKING:
    from lazymesh.core.model import Address, Entry, Space
    from lazymesh.core.records import Record
    from lazymesh.core.resolver.breaker import Breaker
    from lazymesh.core.resolver.waiting import Lane


class Phase(enum.Enum):
    """The state of an address; the value is the word in status and metrics."""

    RESOLVING = "resolving"
    """A read for a miss is due or under way, or the first install is not answered yet."""
    INSTALLED = "installed"
    """Our entry is in the map, as far as we know."""
    ABSENT = "absent"
    """No entry, for a reason that holds until it expires."""

    __hash__ = object.__hash__  # as in model.Space


RESOLVING, INSTALLED, ABSENT = Phase
"""Looking up a member of an enum takes three times as long as comparing or assigning it, for each of many addresses."""
ALLOWED = {
    RESOLVING: {INSTALLED, ABSENT},
    INSTALLED: {ABSENT},
    ABSENT: {RESOLVING},
}
"""An absent address whose record is published is resolving until the entry is in the map."""


class Fetch(enum.Enum):
    """Whether a read of the address is due (queued) or under way (reading)."""

    IDLE = enum.auto()
    QUEUED = enum.auto()
    READING = enum.auto()


IDLE, QUEUED, READING = Fetch  # as above


class Tracked(Struct, eq=False, gc=False):
    """One address that missed, or whose entry was adopted.

    The garbage collector has nothing to do with it, as there may be tens of thousands: it goes when it is forgotten.
    """

    address: Address
    owners: tuple[str, ...]
    """What the cluster table said when it was last asked."""
    link: Link | None = None
    """The cluster that it is resolved with; None: no cluster, or more than one, owns it."""
    missed_at: float | None = None
    """When the packet that waits for an answer missed; None: none waits."""
    phase: Phase = RESOLVING
    fetch: Fetch = IDLE
    wants: tuple[Space, ...] = ()
    """The read group that is queued or being read."""
    spaces: tuple[Space, ...] = ()
    """The read group that answered last: only it is judged. Later groups are nearer to the record's owner,
    and a cache that lags behind must not overrule the owner."""
    keys: tuple[Space, ...] = ()
    """The keys of which a state was seen, those of one group in its order; at most three."""
    records: tuple[Record | None, ...] = ()
    """What each key held by its newest state; None: it does not exist."""
    revisions: tuple[int, ...] = ()
    """The store revision at which that was true. (Like ``keys`` one object for all addresses of an answer.)"""
    watched: tuple[Space, ...] = ()
    entry: Entry | None = None
    """Our entry in the map once every command sent so far is carried out."""
    installed_at: float = -math.inf
    """When the last Install was sent."""
    withdrawn: bool = False
    """The record under the entry was deleted. It may have moved to the group's other key, whose watch may lag behind,
    so one more read decides, and nothing else."""
    again: bool = False
    """A newer state came while an Install was unanswered: judge again when it ends."""
    identity: int = 0
    """The identity that the entry, or the record that was refused, names; 0: none."""
    reason: Reason = Reason.NOT_FOUND
    expires: float = 0.0
    """Reason and end of an absence; meaningless in other phases."""
    fleeting: bool = False
    """The absence is not watched, and therefore short."""

    def move(self, phase: Phase) -> None:
        """Enter another phase.

        A move outside the table is a bug. Raising ends the agent, which costs less than a wrong identity: pinned
        programs go on passing traffic without it.
        """
        if phase not in ALLOWED[self.phase]:
            raise RuntimeError(f"address {self.address.hex()} cannot go from {self.phase} to {phase}")
        self.phase = phase

    @property
    def waiting(self) -> bool:
        """Whether a miss has no answer yet and none is on its way into the map."""
        return self.phase is RESOLVING and self.entry is None

    def learn(self, space: Space, record: Record | None, as_of: int) -> bool:
        """Remember a key's state; return False if it is older than what is known, or the same."""
        at = self.keys.index(space) if space in self.keys else len(self.keys)
        if at < len(self.keys) and as_of <= self.revisions[at]:
            return False
        self.keys = (*self.keys[:at], space, *self.keys[at + 1 :])
        self.records = (*self.records[:at], record, *self.records[at + 1 :])
        self.revisions = (*self.revisions[:at], as_of, *self.revisions[at + 1 :])
        return True

    def knows_later(self, spaces: tuple[Space, ...], as_of: int) -> bool:
        """Return whether a later state than this is known of any of these keys."""
        return any(
            revision > as_of and key in spaces
            for key, revision in zip(self.keys, self.revisions, strict=True)
        )

    def newest(self) -> Record | None:
        """Return the record that counts: the newest in the group that is judged; None if there is none.

        While a publisher moves the record, both keys may be read at one revision: the first space of the group
        wins the tie, and the removal of the other key settles it.
        """
        if self.keys is self.spaces:  # as they were read, all at one revision: else it is another tuple
            for record in self.records:
                if record is not None:
                    return record
            return None
        best, at = None, -1
        for space, record, as_of in zip(self.keys, self.records, self.revisions, strict=True):
            if record is not None and as_of > at and space in self.spaces:
                best, at = record, as_of
        return best

    def forget_states(self) -> None:
        """Forget what the keys said: the revisions are those of a store that no longer exists."""
        self.keys = self.records = self.revisions = ()
        self.watched = ()
        self.spaces = ()
        self.again = self.withdrawn = False


# msgspec's own would keep the interpreter from its fast way to set a slot, three times as fast, a dozen times for each
# address. It does more only for structs that the garbage collector knows.
Tracked.__setattr__ = object.__setattr__  # type: ignore[method-assign]
Tracked.__delattr__ = object.__delattr__  # type: ignore[method-assign]


class Sent(Struct, eq=False):
    """A read in flight, and whom it was sent for."""

    link: Link
    asking: list[Tracked]
    """Some may have been forgotten since."""
    void: bool = False
    """The answer is worthless: the store that it was sent to no longer exists."""


class LinkState(enum.Enum):
    """Whether the cluster's addresses can be judged; the value is the word in status and metrics."""

    CONNECTING = "connecting"
    READY = "ready"
    SILENT = "silent"


@dataclass(slots=True, eq=False)
class Link:
    """The resolver's side of one cluster."""

    name: str
    breaker: Breaker
    unjoined_id: int = 0
    """The id of a cluster that has not joined in this life and whose name is unknown; 0: it is known by its name."""
    state: LinkState = LinkState.CONNECTING
    members: dict[Address, Tracked] = field(default_factory=dict)
    """Every tracked address that is resolved with this cluster."""
    sent: dict[tuple[Address, ...], Sent] = field(default_factory=dict)
    """The reads in flight, by their addresses: no address is in two of them."""
    orphans: set[Address] = field(default_factory=set)
    """Addresses in flight that were forgotten. If one misses again it waits for the answer, lest its read be doubled;
    as that may be older than what was forgotten, the address is then read once more."""
    lanes: dict[tuple[Space, ...], Lane[Tracked]] = field(default_factory=dict)
    adopted: set[Address] = field(default_factory=set)
    """Addresses with an adopted entry for which no read has ended yet."""
    checks_after: float = -math.inf
    """No checks are sent before this: the last one failed, or all nodes would ask at once."""
    ready_at: float = -math.inf
    """Since when it has been ready: no answer could come before."""
    whole_after: float = -math.inf
    """No /24 is read whole before this: the last one could not be."""
    missed: int = 0
    """How many missed addresses wait for a read, in all lanes; kept by ``backlog``."""

    def void_reads(self) -> None:
        """Make the answers of all reads in flight worthless: they may carry revisions of a replaced store."""
        for sent in self.sent.values():
            sent.void = True
