"""The standalone policy in the kernel: keeps the policy map equal to the policy's verdicts on known identities."""

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
    """Collects changes and writes them in batches; ``flush`` before making an identity known to the resolver.

    keep: an earlier agent filled the map for this very policy, so what it allows stays until the identity is reported,
    or until ``sweep``: an agent's restart must not deny a running flow.
    """

    def __init__(self, policy_map: PolicyMap, engine: PolicyEngine | None, keep: bool) -> None:
        self._map = policy_map
        self._engine = engine
        self._pending: dict[tuple[Direction, int], bool] = {}
        self._leftovers = policy_map.items()
        """What an earlier agent has allowed, for identities not reported so far."""
        if engine is None or not keep:
            policy_map.apply((), self._leftovers)
            self._leftovers = set()
        if engine is not None:
            self._note(engine.current())
            self.flush()

    def upsert(self, identity: int, labels: Labels) -> None:
        """Take an identity's labels."""
        if self._engine is not None:
            self._note(self._engine.upsert(identity, labels))
            self._revoke_leftovers(identity)

    def remove(self, identity: int) -> None:
        """Withdraw an identity."""
        if self._engine is not None:
            self._note(self._engine.remove(identity))
            self._revoke_leftovers(identity)

    def flush(self) -> None:
        """Write the changes; when that fails, what was to be allowed is denied until it is reported again.

        The cluster's link reports it again, as it is restarted after such an error.
        """
        if not self._pending:
            return
        allowed = [pair for pair, on in self._pending.items() if on]
        try:
            self._map.apply(allowed, [pair for pair, on in self._pending.items() if not on])
        except DatapathError:
            # Part of it may be in the map. Removing that needs no room, so a full map does not fail the next flush,
            # which may be another cluster's.
            self._pending = dict.fromkeys(self._pending, False)
            if self._engine is not None:
                self._engine.withdraw(allowed)
            raise
        self._pending = {}

    def sweep(self, of: IdentityRange | None = None) -> None:
        """Remove what an earlier agent allowed for identities, of these or all, that were not reported."""
        gone = {pair for pair in self._leftovers if of is None or pair[1] in of}
        self._pending.update(dict.fromkeys(gone, False))
        self._leftovers -= gone
        self.flush()

    def _note(self, change: PolicyChange) -> None:
        if change.allowed:
            kept = self._leftovers.intersection(change.allowed)
            self._leftovers -= kept  # they are in the map already
            self._pending.update({pair: True for pair in change.allowed if pair not in kept})
        if change.revoked:
            self._pending.update(dict.fromkeys(change.revoked, False))

    def _revoke_leftovers(self, identity: int) -> None:
        """Revoke what an earlier agent allowed this identity; call after noting what policy allows it now."""
        if self._leftovers:
            gone = self._leftovers.intersection([(direction, identity) for direction in Direction])
            self._leftovers -= gone
            self._pending.update(dict.fromkeys(gone, False))
