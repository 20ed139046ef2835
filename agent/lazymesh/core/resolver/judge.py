"""Decides whether a record may become an entry here, without memory of earlier ones.

The order of the checks is the order of suspicion: can it be read, may its cluster say this at all, is it
meant for this region, are its identity's labels known here (an entry with an unknown identity matches no
policy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazymesh.core.identities import check_identity
from lazymesh.core.model import Reason
from lazymesh.core.records import REGIONAL, BadRecord, IpRecord

if TYPE_CHECKING:
    from collections.abc import Container

    from lazymesh.core.clusters import ClusterInfo, ClusterTable
    from lazymesh.core.model import Address
    from lazymesh.core.records import Record


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a record must not become an entry."""

    reason: Reason
    detail: str = ""
    identity: int = 0
    """The identity that the record names; 0 if it could not be read."""


@dataclass(slots=True)
class Judge:
    """What records are judged by; the resolver replaces ``table`` when another one is in force."""

    table: ClusterTable
    identities: Container[int]
    """The identities whose labels are known here; the shell's own set, which changes while we use it."""
    region: str | None = None
    """The region of this node; None: unknown, so that nothing is out of scope."""
    here: Container[Address] = ()
    """This node's own addresses; the shell's set, too."""

    def verdict(self, record: Record, cluster: ClusterInfo) -> IpRecord | Refusal:
        """Return a cluster's record if it may be installed, else why not."""
        if isinstance(record, BadRecord):
            return Refusal(record.reason, record.detail)
        forged = check_identity(record.identity, cluster.identities)
        if forged is not None:
            return Refusal(Reason.FORGED, forged, record.identity)
        if record.scope == REGIONAL and self._elsewhere(record.host_ip):
            return Refusal(Reason.OUT_OF_SCOPE, "", record.identity)
        if record.identity not in self.identities:
            return Refusal(Reason.UNKNOWN_IDENTITY, "", record.identity)
        return record

    def _elsewhere(self, host_ip: Address) -> bool:
        if self.region is None:
            return False
        # A host of unknown region is admitted: scope saves traffic, it guards nothing, and the peer is known.
        region = self.table.region_of(host_ip)
        return region is not None and region != self.region
