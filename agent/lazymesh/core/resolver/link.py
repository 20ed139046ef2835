"""One cluster as the resolver sees it: is it ready, what waits for it, what is in flight, what belongs to it.

Each cluster has its own lanes, in-flight window and breaker, so that a dead or slow one costs the others
nothing. A lane holds the addresses that wait for one read group. Misses go first, because packets wait for
them; re-reads of known addresses (*checks*) take what room is left, but at least a quarter, so that a storm
of misses cannot keep old entries unverified. Before both go those of entries that an earlier life of the
agent has left (*proofs*): their records may have changed while nobody looked. What is sent when is decided in
``backlog``.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazymesh.core.resolver.waiting import Batch, Waiting

if TYPE_CHECKING:
    from lazymesh.core.model import Address, Space
    from lazymesh.core.resolver.breaker import Breaker
    from lazymesh.core.resolver.tracked import Tracked


VOID: tuple[Space, ...] = ()
"""In place of a read group: the answer of this read is worth nothing, it may be older than what was known."""


class LinkState(enum.Enum):
    """Whether the cluster's addresses can be judged; the value is the word in status and metrics."""

    CONNECTING = "connecting"
    READY = "ready"
    SILENT = "silent"


@dataclass(slots=True, eq=False)
class Lane:
    """The addresses that wait for a read of one group of spaces."""

    misses: Waiting = field(default_factory=Waiting)
    checks: Waiting = field(default_factory=Waiting)
    proofs: Waiting = field(default_factory=Waiting)
    """Checks of entries that an earlier life of the agent has left: they go before everything else."""

    def __len__(self) -> int:
        return self.misses.count + self.checks.count + self.proofs.count

    def take_proofs(self, room: int, whole_at: int | None) -> Batch:
        """Remove and return addresses whose entries are of an earlier life (as ``Waiting.take``)."""
        batch = Batch()
        self.proofs.take(batch, room, whole_at)
        return batch

    def take(self, room: int, whole_at: int | None, *, with_checks: bool) -> Batch:
        """Remove and return addresses (as ``Waiting.take``)."""
        if self.proofs.count:  # they have had their time
            self.proofs.move_to(self.checks)
        checks = min(self.checks.count, max(room // 4, room - self.misses.count)) if with_checks else 0
        batch = Batch()
        self.misses.take(batch, room - checks, whole_at)
        if checks:
            # Nobody waits for checks, but misses would wait for a whole /24 of them.
            self.checks.take(batch, checks, None if batch.taken() else whole_at)
        return batch


@dataclass(slots=True, eq=False)
class Link:
    """The resolver's side of one cluster."""

    name: str
    breaker: Breaker
    state: LinkState = LinkState.CONNECTING
    in_flight: int = 0
    """Transactions sent and not answered."""
    members: dict[Address, Tracked] = field(default_factory=dict)
    """Every tracked address that is resolved with this cluster."""
    reading: dict[Address, tuple[Space, ...]] = field(default_factory=dict)
    """What is in flight; outlives the address itself, so that forgetting an address never doubles its read.
    VOID stands for a read that was sent to a store that no longer is, or for an address that was forgotten."""
    lanes: dict[tuple[Space, ...], Lane] = field(default_factory=dict)
    unproven: set[Address] = field(default_factory=set)
    """Addresses with an entry of an earlier life of the agent that no read has ended for yet."""
    checks_after: float = -math.inf
    """No checks are sent before: the last one failed, or all nodes would ask at once."""
    ready_at: float = -math.inf
    """Since when it is ready: no answer could come before."""
    whole_after: float = -math.inf
    """No /24 is read whole before: the last one could not be."""
    missed: int = 0
    """How many missed addresses wait for a read, in all lanes; kept by ``backlog``."""

    def void_reads(self) -> None:
        """Make the answers of all reads in flight worthless: they may carry revisions of a replaced store."""
        for address in self.reading:
            self.reading[address] = VOID
