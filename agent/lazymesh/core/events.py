"""What happens to the resolver (events) and what it asks for (commands): plain frozen values without behaviour.

They are msgspec Structs, because several are made for every miss and a frozen dataclass takes five times as long. Those
with ``gc=False`` refer to nothing that could refer back to them, so the collector need not track them.

The shell turns the outside world into events, calls ``Resolver.step`` and carries out each command as it comes. Times
are seconds of the shell's monotonic clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from lazymesh.errors import KvstoreErrorKind

if TYPE_CHECKING:
    from lazymesh.core.clusters import ClusterTable
    from lazymesh.core.model import Address, Entry, Reason, Space

ReadFailure = KvstoreErrorKind | Literal["owner"]
"""``owner``: the owner's own store, behind a cache, is not followed, which says nothing about the cache."""

Outcome = Literal["installed", "updated", "absent", "failed", "shed", "evicted", "taken-over"]
"""How a miss, or a change of an installed address, ended."""

# --- events ---------------------------------------------------------------------------------------------------------


class Misses(Struct, frozen=True):
    """The kernel signalled packets whose peers have no entry.

    Misses signalled at one moment are resolved together, so that reads of many addresses share a transaction.
    """

    addresses: tuple[Address, ...]
    at: tuple[float, ...]
    """When each packet missed (the kernel's timestamp); latencies count from there."""


class KeyState(Struct, frozen=True, gc=False):
    """One etcd key as seen at one moment: by a read, or by a watch."""

    address: Address
    space: Space
    value: bytes | None
    """The record's bytes; None: the key does not exist."""
    as_of: int
    """Store revision at which this was true: that of the read, or of the change."""


class Answered(Struct, frozen=True):
    """A Read was answered."""

    cluster: str
    spaces: tuple[Space, ...]
    addresses: tuple[Address, ...]
    values: tuple[bytes | None, ...]
    """For each key of each address, address by address and in the order of ``spaces``; None: there is no such key."""
    as_of: int
    """Store revision at which this was true."""


class ReadFailed(Struct, frozen=True):
    """A Read failed."""

    cluster: str
    addresses: tuple[Address, ...]
    kind: ReadFailure
    whole: bool = False
    """Whether some /24 was read whole."""


class Changed(Struct, frozen=True):
    """A watched key was written or deleted."""

    cluster: str
    state: KeyState


class StoreReset(Struct, frozen=True):
    """Revisions seen so far mean nothing any more: everything of this cluster must be read again.

    Its store was replaced (other etcd cluster id, or its revision went back), or watches were lost for good.
    ClusterReady follows as soon as its addresses can be judged again.
    """

    cluster: str


class ClusterReady(Struct, frozen=True):
    """Nodes and identities of the cluster are listed: its addresses can be judged. Repeated after each reconnect."""

    cluster: str


class ClusterSilent(Struct, frozen=True):
    """The cluster's store cannot be reached."""

    cluster: str


class ClusterGone(Struct, frozen=True):
    """The cluster left the mesh (its configuration file went away, or its id changed)."""

    cluster: str


class TableChanged(Struct, frozen=True):
    """Another table of clusters and pod CIDRs is in force from now on."""

    table: ClusterTable


class IdentitiesKnown(Struct, frozen=True):
    """The identities' labels are known here, and the policy map is up to date with them. A listing has thousands."""

    identities: tuple[int, ...]


class IdentityGone(Struct, frozen=True):
    """The identity was withdrawn by its cluster."""

    identity: int


class InstallsEnded(Struct, frozen=True):
    """The outcomes of Install commands that were carried out together."""

    addresses: tuple[Address, ...]
    errors: tuple[Reason | None, ...]
    """None for each entry that is in the map; else TAKEN, NOT_OURS, MAP_FULL or INSTALL_FAILED."""


class Adopted(Struct, frozen=True):
    """An entry of ours that the resolver did not ask for: from an earlier life of the agent, or put into a new map."""

    address: Address
    entry: Entry
    cluster_id: int
    """All that the journal says about the cluster; it may be one that has not joined yet."""


class AllListed(Struct, frozen=True):
    """Every configured cluster has been listed: entries of a cluster that has not joined belong to none."""


class Lost(Struct, frozen=True):
    """Entries are no longer ours: the map's owner has overwritten them, or something has removed them."""

    addresses: tuple[Address, ...]


class Used(Struct, frozen=True):
    """The node talks to these addresses: their entries, where we have them, are the last to be given up."""

    addresses: tuple[Address, ...]


class Shrink(Struct, frozen=True):
    """The map has no room to spare: this many of our entries must go, the least recently used first."""

    entries: int


class Tick(Struct, frozen=True):
    """Time has passed: expire negative answers, retry, half-open breakers. Sent about every 100 ms."""


Event = (
    Misses
    | Answered
    | ReadFailed
    | Changed
    | StoreReset
    | ClusterReady
    | ClusterSilent
    | ClusterGone
    | TableChanged
    | IdentitiesKnown
    | IdentityGone
    | InstallsEnded
    | Adopted
    | AllListed
    | Lost
    | Used
    | Shrink
    | Tick
)

# --- commands -------------------------------------------------------------------------------------------------------


class Read(Struct, frozen=True):
    """Read the keys of these addresses in one transaction: all of ``spaces`` for each address or /24."""

    cluster: str
    spaces: tuple[Space, ...]
    """Either (CACHED,) or (PUSHED, PULL_ONLY): never both kinds, as one refused read fails the whole transaction."""
    addresses: tuple[Address, ...]
    whole: tuple[int, ...] = ()
    """How many addresses, from the first on, share a /24 to read whole, then the next; the rest are read apart."""


class Watch(Struct, frozen=True):
    """Watch these addresses' keys in all of ``spaces``, from the revision after ``after``."""

    cluster: str
    spaces: tuple[Space, ...]
    addresses: tuple[Address, ...]
    after: int


class Unwatch(Struct, frozen=True):
    """Stop watching every key of the address in this cluster."""

    cluster: str
    address: Address


class Install(Struct, frozen=True, gc=False):
    """Put the entry into the map for each address without a foreign entry; answered by InstallsEnded.

    Also replaces our own older entries.
    """

    addresses: list[Address]
    entry: Entry
    cluster_id: int


class Evict(Struct, frozen=True):
    """Remove the entry from the map, if it is ours and still what we wrote."""

    address: Address
    why: str
    """``deleted``, ``budget``, ``expired``, ``crowded``, ``cluster-gone``, or a Reason's value: the metric's label."""


class Report(Struct, frozen=True, gc=False):
    """Report to people and metrics how misses, or changes of installed addresses, ended: all in the same way."""

    addresses: list[Address]
    cluster: str | None
    outcome: Outcome
    reason: Reason | None
    detail: str
    """A few words for the log; empty if the reason says it all."""
    missed_at: list[float | None]
    """When each one's packet missed; None if no packet waits for this (a watch event, an adoption)."""
    cached: bool = False
    """Whether no read was needed: the answer came from the negative cache, or the entry was in the map already."""


class Mute(Struct, frozen=True):
    """Raise (True) or lower (False) the kernel's mute flag."""

    on: bool


class Admit(Struct, frozen=True):
    """Let the kernel signal this share, at most 1, of the misses that the settings allow."""

    share: float


Command = Read | Watch | Unwatch | Install | Evict | Report | Mute | Admit
