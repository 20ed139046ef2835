"""What happens to the resolver (events) and what it asks for (commands): plain frozen values, no behaviour.

The shell turns the outside world into events, calls ``Resolver.step(event, now)`` and carries out the commands in the
order in which they come back. Times are seconds of the shell's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazymesh.core.clusters import ClusterTable
    from lazymesh.core.model import Address, Direction, Entry, Reason, Space

# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Miss:
    """The kernel signalled a packet whose peer has no entry."""

    address: Address
    direction: Direction
    ifindex: int
    at: float
    """When the packet missed (the kernel's timestamp); latencies count from here."""


@dataclass(frozen=True, slots=True)
class Misses:
    """What was signalled at one moment: resolved together, so that reads of many addresses share a transaction."""

    misses: tuple[Miss, ...]


@dataclass(frozen=True, slots=True)
class KeyState:
    """One etcd key as seen at one moment: by a read, or by a watch."""

    address: Address
    space: Space
    value: bytes | None
    """The record's bytes; None: the key does not exist."""
    as_of: int
    """Store revision at which this was true: the read's header revision, or the event's mod_revision."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A batch of reads came back; ``states`` has one element for each key of each address that was asked for."""

    cluster: str
    states: tuple[KeyState, ...]


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """A batch of reads did not come back."""

    cluster: str
    addresses: tuple[Address, ...]
    kind: str
    """KvstoreError.kind: unavailable, timeout, permission, certificate, protocol."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A watched key was written or deleted."""

    cluster: str
    state: KeyState


@dataclass(frozen=True, slots=True)
class StoreReset:
    """Revisions seen so far mean nothing: everything of this cluster is to be read again.

    Its store was replaced (other etcd cluster id, or its revision went back), or watches were lost past repair.
    ClusterReady follows as soon as its addresses can be judged again.
    """

    cluster: str


@dataclass(frozen=True, slots=True)
class ClusterReady:
    """Nodes and identities of the cluster are listed: its addresses can be judged. Repeated after each reconnect."""

    cluster: str


@dataclass(frozen=True, slots=True)
class ClusterSilent:
    """The cluster's store cannot be reached."""

    cluster: str


@dataclass(frozen=True, slots=True)
class ClusterGone:
    """The cluster left the mesh (its configuration file went away, or its id changed)."""

    cluster: str


@dataclass(frozen=True, slots=True)
class TableChanged:
    """Another table of clusters and pod CIDRs is in force from now on."""

    table: ClusterTable


@dataclass(frozen=True, slots=True)
class IdentityKnown:
    """The identity's labels are known here, and the policy map has been brought up to date with it."""

    identity: int


@dataclass(frozen=True, slots=True)
class IdentityGone:
    """The identity was withdrawn by its cluster."""

    identity: int


@dataclass(frozen=True, slots=True)
class InstallResult:
    """The outcome of one Install command."""

    address: Address
    entry: Entry
    error: Reason | None
    """None: it stands in the map. Else TAKEN, NOT_OURS, MAP_FULL or INSTALL_FAILED."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """An entry that an earlier life of this agent installed, found in the journal and in the map."""

    address: Address
    entry: Entry
    cluster: str | None
    """None: no configured cluster has the journal's cluster id."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Entries of ours are not ours any more: the map's owner has written over them, or somebody has removed them."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Used:
    """The node talks to these addresses: their entries, where we have them, are the last to be given up."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Shrink:
    """The map has no room to spare: so many of our entries are to go, the least recently used first."""

    entries: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: expire negative answers, retry, half-open breakers. Sent about every 100 ms."""


Event = (
    Miss
    | Misses
    | Answered
    | ReadFailed
    | Changed
    | StoreReset
    | ClusterReady
    | ClusterSilent
    | ClusterGone
    | TableChanged
    | IdentityKnown
    | IdentityGone
    | InstallResult
    | Adopted
    | Lost
    | Used
    | Shrink
    | Tick
)

# --- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """Read the keys of these addresses in one transaction: all of ``spaces`` for each address."""

    cluster: str
    spaces: tuple[Space, ...]
    """Either (CACHED,) or (PUSHED, PULL_ONLY): never both kinds, one refused read fails a whole transaction."""
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Watch:
    """Watch the address's key in this space, from the revision after ``after``."""

    cluster: str
    space: Space
    address: Address
    after: int


@dataclass(frozen=True, slots=True)
class Unwatch:
    """Stop watching every key of the address in this cluster."""

    cluster: str
    address: Address


@dataclass(frozen=True, slots=True)
class Install:
    """Put the entry into the map, unless somebody else's entry stands there; answered by InstallResult.

    Also replaces an entry of ours by a newer one.
    """

    address: Address
    entry: Entry
    cluster_id: int


@dataclass(frozen=True, slots=True)
class Evict:
    """Remove the entry from the map, if it is ours and still what we wrote."""

    address: Address
    why: str
    """``deleted``, ``budget``, ``expired``, ``crowded``, ``cluster-gone``, or a Reason's value: the metric's label."""


@dataclass(frozen=True, slots=True)
class Report:
    """Tell people and metrics how a miss, or a change of an installed address, ended."""

    address: Address
    cluster: str | None
    outcome: str
    """``installed``, ``updated``, ``absent``, ``failed``, ``shed``, ``evicted``, ``taken-over``."""
    reason: Reason | None
    detail: str
    """A few words for the log, empty when the reason says it all."""
    missed_at: float | None
    """When the packet missed; None when no packet waits for this (a watch event, an adoption)."""
    cached: bool = False
    """True when no read was needed: the answer came from the negative cache, or the entry stood already."""


@dataclass(frozen=True, slots=True)
class Mute:
    """Raise (True) or lower (False) the kernel's mute flag."""

    on: bool


@dataclass(frozen=True, slots=True)
class Admit:
    """Let the kernel signal so many misses of what the settings allow: a share, at most 1."""

    share: float


Command = Read | Watch | Unwatch | Install | Evict | Report | Mute | Admit
