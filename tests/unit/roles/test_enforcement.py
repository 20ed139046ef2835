"""The policy map follows the identities."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from lazymesh.core.model import Direction
from lazymesh.core.policy import PolicyEngine
from lazymesh.core.policyfile import parse_policy
from lazymesh.errors import MapFullError
from lazymesh.roles.enforcement import Enforcement
from tests.support.lab import POLICY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazymesh.datapath.maps import PolicyMap

OUT = Direction.EGRESS
SERVER, OTHER = {"k8s:app": "server"}, {"k8s:app": "other"}
Pair = tuple[Direction, int]


class FakePolicyMap:
    """A set with the map's interface; ``full`` makes it refuse."""

    def __init__(self, *pairs: Pair) -> None:
        self.pairs = set(pairs)
        self.full = False

    def items(self) -> set[Pair]:
        """Return everything that is allowed."""
        return set(self.pairs)

    def apply(self, allow: Iterable[Pair], revoke: Iterable[Pair]) -> None:
        """Take away, then add."""
        self.pairs -= set(revoke)
        if self.full and list(allow):
            raise MapFullError("the policy map is full")
        self.pairs |= set(allow)


def enforcement(pairs: FakePolicyMap, *, keep: bool = False, policy: str | None = POLICY) -> Enforcement:
    """Return an enforcement of the lab's policy over that map."""
    engine = PolicyEngine(parse_policy(policy, "p")) if policy else None
    return Enforcement(cast("PolicyMap", pairs), engine, keep)


def test_nothing_is_in_force_before_the_flush() -> None:
    """Changes are collected; the flush writes them all."""
    pairs = FakePolicyMap()
    force = enforcement(pairs)
    force.upsert(7, SERVER)
    force.upsert(8, OTHER)
    assert pairs.pairs == set()
    force.flush()
    assert pairs.pairs == {(OUT, 7)}
    force.upsert(7, OTHER)
    force.upsert(8, SERVER)
    force.flush()
    assert pairs.pairs == {(OUT, 8)}
    force.remove(8)
    force.flush()
    assert pairs.pairs == set()


def test_what_an_earlier_life_allowed_stays_until_the_sweep() -> None:
    """The same policy over a restart: a running flow is not cut; what is not told again goes at the end."""
    pairs = FakePolicyMap((OUT, 7), (OUT, 9))
    force = enforcement(pairs, keep=True)
    assert pairs.pairs == {(OUT, 7), (OUT, 9)}
    force.upsert(7, SERVER)
    force.flush()
    force.sweep()
    assert pairs.pairs == {(OUT, 7)}


@pytest.mark.parametrize("policy", [POLICY, None])
def test_another_policy_starts_from_nothing(policy: str | None) -> None:
    """And no policy allows and denies nothing."""
    pairs = FakePolicyMap((OUT, 7))
    force = enforcement(pairs, policy=policy)
    assert pairs.pairs == set()
    force.upsert(7, OTHER)
    force.flush()
    assert pairs.pairs == set()
