"""The bounds of the resolver, in one value with the reasons of the defaults.

Everything that could grow with traffic or with the mesh has its bound here; the shell fills in what the user
chose.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazymesh.core.model import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

_NEGATIVE_TTL = {
    # Watched, so that a publication cancels them at once; the time bounds how long a watch is kept in vain.
    Reason.NOT_FOUND: 30.0,
    Reason.OUT_OF_SCOPE: 60.0,
    Reason.UNKNOWN_IDENTITY: 30.0,
    Reason.FORGED: 60.0,
    Reason.MALFORMED: 60.0,
    Reason.NOT_OURS: 10.0,
    Reason.TAKEN: 0.0,  # no absence at all: the address is forgotten
    Reason.MAP_FULL: 5.0,
    Reason.INSTALL_FAILED: 2.0,
    # Not watched: only the next miss would notice that the cause is gone.
    Reason.NO_CLUSTER: 5.0,
    Reason.AMBIGUOUS: 5.0,
    Reason.CLUSTER_DOWN: 1.0,
    Reason.READ_FAILED: 1.0,
    Reason.SHED: 0.5,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the resolver may hold, ask and keep; times are seconds."""

    queue: int = 4096
    """Missed addresses that may wait for a read, over all clusters; beyond that the oldest is shed."""
    keys_per_transaction: int = 128
    """etcd's default --max-txn-ops. Keys (or ranges), not addresses: a group of two spaces reads 64 at once."""
    whole_at: int = 64
    """From this many waiting addresses of one /24 on, it is read whole: with all 256 there, that costs the same."""
    apart_for: float = 60.0
    """How long no /24 is read whole after one could not be: it held too much, or the range is forbidden."""
    transactions_in_flight: int = 8
    """Per cluster; as measured, more than eight make etcd no faster."""
    owned: int = 25_600
    """Our entries in the map: 5 % of Cilium's 512,000."""
    negatives: int = 65_536
    """Absent addresses remembered; beyond that the oldest is forgotten."""
    negative_ttl: Mapping[Reason, float] = field(default_factory=lambda: dict(_NEGATIVE_TTL))
    """How long each negative answer holds."""
    negative_watch_rate: float = 100.0
    """Addresses a second that are watched although they are absent; see negatives."""
    negative_watch_burst: float = 500.0
    """How many of them at once, after a quiet time."""
    unwatched_ttl: float = 1.0
    """How long an address that is not watched is remembered as absent: as long as the kernel keeps silent about it."""
    breaker_failures: int = 5
    """Failed reads in a row that open a cluster's breaker."""
    backoff_first: float = 1.0
    """Upper bound of the first pause of an open breaker; each further one doubles it."""
    backoff_most: float = 30.0
    """Where the doubling ends."""
    stale_after: float = 600.0
    """An entry that could not be verified for this long is evicted: its address may long since be another pod's."""
    adopted_first: float = 1.0
    """For how long at most adopted entries are read again before anything else of their cluster: what changed while no
    agent ran is corrected before anything new is installed. A bound, because a full budget of entries and a distant
    store would keep first packets waiting for long."""
    revalidation_spread: float = 5.0
    """The known addresses of a cluster that was silent and is back are read again after a random part of this time: all
    nodes of the mesh notice at the same moment."""
    recheck_pause: float = 1.0
    """Between a failed re-read of installed addresses and the next."""
    mute_high: float = 0.75
    """Share of the queue at which the kernel is muted."""
    mute_low: float = 0.25
    """Share of the queue at which it is heard again."""
    one_cluster: float = 0.5
    """Of the queue's level, the part that one cluster can make up while others are ready: it never mutes alone."""
    admission_floor: float = 0.1
    """Answers that take no longer than this are fast, whatever is usual: well within the time that a packet is held."""
    admission_factor: float = 4.0
    """Above the floor, answers that take more than this many times the usual are slow."""
    admission_growth: float = 1.1
    """How the admitted share grows after each second of fast answers: seven of them all but undo a halving."""
    admission_least: float = 0.1
    """The share that is always admitted."""
