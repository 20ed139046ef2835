"""The standalone policy in the kernel: keeps the policy map equal to what the policy says of the known identities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazymesh.core.model import Direction
from lazymesh.errors import DatapathError

if TYPE_CHECKING:
    from lazymesh.core.identities import IdentityRange
    from lazymesh.core.policy import PolicyChange, PolicyEngine
    from lazymesh.core.records import Labels
    from lazymesh.datapath.maps import PolicyMap


class Enforcement:
    """Collects changes and writes them in batches; ``flush`` before telling anybody that an identity is known.

    keep: the map was filled for this very policy by an earlier life, so what it allows stays until the identity is told
    of, or until ``sweep``: an agent's restart must not deny a running flow.
    """

    def __init__(self, policy_map: PolicyMap, engine: PolicyEngine | None, keep: bool) -> None:
        self._map = policy_map
        self._engine = engine
        self._pending: dict[tuple[Direction, int], bool] = {}
        self._leftovers = policy_map.items()
        """What an earlier life has allowed, and nobody has told of so far."""
        if engine is None or not keep:
            policy_map.apply((), self._leftovers)
            self._leftovers = set()
        if engine is not None:
            self._note(engine.current())
            self.flush()

    def upsert(self, identity: int, labels: Labels) -> None:
        """An identity has these labels now."""
        if self._engine is not None:
            self._note(self._engine.upsert(identity, labels))
            self._revoke_leftovers(identity)

    def remove(self, identity: int) -> None:
        """An identity is no more."""
        if self._engine is not None:
            self._note(self._engine.remove(identity))
            self._revoke_leftovers(identity)

    def flush(self) -> None:
        """Write what has changed; when that fails, what was to be allowed is denied until it is told again.

        Who tells it again is the link of its cluster, which starts anew after such an error.
        """
        if not self._pending:
            return
        allowed = [pair for pair, on in self._pending.items() if on]
        try:
            self._map.apply(allowed, [pair for pair, on in self._pending.items() if not on])
        except DatapathError:
            # Some of it may stand. Taking it out needs no room, so that a full map is nobody else's error: the next
            # flush may be that of another cluster.
            self._pending = dict.fromkeys(self._pending, False)
            if self._engine is not None:
                self._engine.withdraw(allowed)
            raise
        self._pending = {}

    def sweep(self, of: IdentityRange | None = None) -> None:
        """Everything has been told of these identities, or of all: what an earlier life allowed beyond that goes."""
        gone = {pair for pair in self._leftovers if of is None or pair[1] in of}
        self._pending.update(dict.fromkeys(gone, False))
        self._leftovers -= gone
        self.flush()

    def _note(self, change: PolicyChange) -> None:
        if change.allowed:
            kept = self._leftovers.intersection(change.allowed)
            self._leftovers -= kept  # they are in the map, and need not be written
            self._pending.update({pair: True for pair in change.allowed if pair not in kept})
        if change.revoked:
            self._pending.update(dict.fromkeys(change.revoked, False))

    def _revoke_leftovers(self, identity: int) -> None:
        """Whatever the policy allows this identity now is noted already; all else goes."""
        if self._leftovers:
            gone = self._leftovers.intersection([(direction, identity) for direction in Direction])
            self._leftovers -= gone
            self._pending.update(dict.fromkeys(gone, False))
