"""What status, metrics and ``lazymesh why`` may know of the resolver: values of the moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.core.resolver.tracked import Fetch, Phase

if TYPE_CHECKING:
    from lazymesh.core.model import Entry, Reason, Space
    from lazymesh.core.resolver.tracked import Link, Tracked


@dataclass(frozen=True, slots=True)
class AddressView:
    """One address as the resolver sees it."""

    state: str
    """``resolving``, ``installed`` or ``absent``."""
    owners: tuple[str, ...]
    cluster: str | None
    reason: Reason | None
    """Why it is absent; None in other states."""
    expires: float | None
    """When the absence is forgotten, on the shell's clock; None in other states."""
    entry: Entry | None
    verified: bool
    """False: the entry is served on the word of an earlier time (cluster silent, or entry adopted)."""
    reading: bool
    """True: a read is due or under way."""
    known: tuple[tuple[Space, bool, int], ...]
    """For each key seen: its space, whether it holds a record, and the revision at which that was so."""
    watched: tuple[Space, ...]


@dataclass(frozen=True, slots=True)
class ClusterView:
    """One cluster as the resolver sees it."""

    state: str
    """``connecting``, ``ready`` or ``silent``."""
    breaker: str
    """``closed``, ``open`` or ``half-open``."""
    in_flight: int
    """Transactions sent and not answered."""
    queued: int
    """Addresses that wait for a read: missed ones, and known ones to be read again."""
    addresses: int


def view_of_address(tracked: Tracked, *, in_doubt: bool) -> AddressView:
    """Return the view of one address."""
    absent = tracked.phase is Phase.ABSENT
    return AddressView(
        state=tracked.phase.value,
        owners=tracked.owners,
        cluster=tracked.link.name if tracked.link is not None else None,
        reason=tracked.reason if absent else None,
        expires=tracked.expires if absent else None,
        entry=tracked.entry,
        verified=tracked.entry is not None and not in_doubt,
        reading=tracked.fetch is not Fetch.IDLE,
        known=tuple((state.space, state.value is not None, state.as_of) for state in tracked.known),
        watched=tracked.watched,
    )


def view_of_cluster(link: Link) -> ClusterView:
    """Return the view of one cluster."""
    return ClusterView(
        state=link.state.value,
        breaker=link.breaker.state.value,
        in_flight=link.in_flight,
        queued=sum(map(len, link.lanes.values())),
        addresses=len(link.members),
    )
