"""The standalone policy in the kernel: keeps the policy map equal to what the policy says of the known identities."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazymesh.core.model import Direction
    from lazymesh.core.policy import PolicyChange, PolicyEngine
    from lazymesh.core.records import Labels
    from lazymesh.datapath.maps import PolicyMap


class Enforcement:
    """Collects changes and writes them in batches; ``flush`` before telling anybody that an identity is known.

    keep: the map was filled for this very policy by an earlier life, so what it allows stays until ``sweep``: an
    agent's restart must not deny a running flow.
    """

    def __init__(self, policy_map: PolicyMap, engine: PolicyEngine | None, keep: bool) -> None:
        self._map = policy_map
        self._engine = engine
        self._pending: dict[tuple[Direction, int], bool] = {}
        self._leftovers = policy_map.items()
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

    def remove(self, identity: int) -> None:
        """An identity is no more."""
        if self._engine is not None:
            self._note(self._engine.remove(identity))

    def flush(self) -> None:
        """Write what has changed."""
        if self._pending:
            pending, self._pending = self._pending, {}
            self._leftovers -= pending.keys()
            self._map.apply(
                [k for k, on in pending.items() if on], [k for k, on in pending.items() if not on]
            )

    def sweep(self) -> None:
        """Everything there is has been told: what an earlier life allowed beyond that goes."""
        self._map.apply((), self._leftovers)
        self._leftovers = set()

    def _note(self, change: PolicyChange) -> None:
        if change.allowed:
            self._pending.update(dict.fromkeys(change.allowed, True))
        if change.revoked:
            self._pending.update(dict.fromkeys(change.revoked, False))
