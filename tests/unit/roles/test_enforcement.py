"""The policy map follows the identities."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from lazymesh.core.identities import IdentityRange
from lazymesh.core.model import Direction
from lazymesh.core.policy import PolicyEngine
from lazymesh.core.policyfile import parse_policy
from lazymesh.errors import DatapathError, MapFullError
from lazymesh.roles.enforcement import Enforcement
from tests.support.lab import BOTH_WAYS, POLICY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazymesh.datapath.maps import PolicyMap

OUT = Direction.EGRESS
SERVER, OTHER = {"k8s:app": "server"}, {"k8s:app": "other"}
Pair = tuple[Direction, int]


class FakePolicyMap:
    """A set with the map's interface and limited room; ``broken`` makes it refuse everything."""

    def __init__(self, *pairs: Pair, room: int = 100) -> None:
        self.pairs = set(pairs)
        self.room = room
        self.broken = False

    def items(self) -> set[Pair]:
        """Return everything that is allowed."""
        return set(self.pairs)

    def apply(self, allow: Iterable[Pair], revoke: Iterable[Pair]) -> None:
        """Take away, then add."""
        if self.broken:
            raise DatapathError("cannot write the policy map")
        self.pairs -= set(revoke)
        for pair in allow:
            if pair not in self.pairs and len(self.pairs) == self.room:
                raise MapFullError("the policy map is full")
            self.pairs.add(pair)


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


def test_sweep_of_one_clusters_identities_leaves_those_of_others() -> None:
    """Others may be dead for long, and their pods' flows go on."""
    pairs = FakePolicyMap((OUT, 7), (OUT, 70))
    force = enforcement(pairs, keep=True)
    force.sweep(of=IdentityRange(50, 99))
    assert pairs.pairs == {(OUT, 7)}
    force.sweep()
    assert pairs.pairs == set()


def test_what_an_earlier_life_allowed_stays_until_the_sweep() -> None:
    """The same policy over a restart: a running flow is not cut; what is not reported again goes at the end."""
    pairs = FakePolicyMap((OUT, 7), (OUT, 9))
    force = enforcement(pairs, keep=True)
    assert pairs.pairs == {(OUT, 7), (OUT, 9)}
    force.upsert(7, SERVER)
    force.flush()
    force.sweep()
    assert pairs.pairs == {(OUT, 7)}


def test_what_an_earlier_agent_allowed_goes_when_it_is_reported_and_denied() -> None:
    """Not only at the sweep, for which every cluster must have been listed: a dead one would keep it forever."""
    pairs = FakePolicyMap((OUT, 7), (Direction.INGRESS, 7), (OUT, 8), (OUT, 9))
    force = enforcement(pairs, keep=True, policy=BOTH_WAYS)
    force.upsert(7, OTHER)
    force.remove(8)
    force.flush()
    assert pairs.pairs == {(OUT, 9)}
    force.upsert(7, SERVER)
    force.flush()
    assert pairs.pairs == {(OUT, 7), (Direction.INGRESS, 7), (OUT, 9)}


def test_what_an_earlier_life_allowed_is_not_written_again() -> None:
    """A map with no room for more is not an error for what is there."""
    pairs = FakePolicyMap((OUT, 7), (OUT, 9))
    force = enforcement(pairs, keep=True)
    pairs.broken = True
    force.upsert(7, SERVER)
    force.flush()
    pairs.broken = False
    force.upsert(7, OTHER)
    force.sweep()
    assert pairs.pairs == set()


def test_what_did_not_fit_is_written_when_it_is_reported_again() -> None:
    """By its link, which is restarted: the kernel must allow whatever the engine says it does."""
    pairs = FakePolicyMap(room=2)
    engine = PolicyEngine(parse_policy(POLICY, "p"))
    force = Enforcement(cast("PolicyMap", pairs), engine, keep=False)
    for _ in range(2):
        for number in (7, 8, 11):
            force.upsert(number, SERVER)
        with pytest.raises(MapFullError):
            force.flush()
        assert not any(engine.verdict(OUT, number) for number in (7, 8, 11)), "none counts as allowed"
    pairs.room = 3
    for number in (7, 8, 11):
        force.upsert(number, SERVER)
    force.flush()
    assert pairs.pairs == {(OUT, 7), (OUT, 8), (OUT, 11)}
    assert all(engine.verdict(OUT, number) for number in (7, 8, 11))


def test_what_did_not_fit_is_no_other_clusters_error_and_leaves_nothing_behind() -> None:
    """Part may have been written; it may never be reported again, and the next flush is another cluster's."""
    pairs = FakePolicyMap(room=2)
    force = enforcement(pairs)
    for number in (7, 8, 11):
        force.upsert(number, SERVER)
    with pytest.raises(MapFullError):
        force.flush()
    assert pairs.pairs == {(OUT, 7), (OUT, 8)}
    force.upsert(12, SERVER)
    force.flush()
    assert pairs.pairs == {(OUT, 12)}


def test_what_could_not_be_taken_out_is_taken_out_by_the_next_flush() -> None:
    """Whoever it belongs to."""
    pairs = FakePolicyMap((OUT, 9))
    force = enforcement(pairs, keep=True)
    force.upsert(7, SERVER)
    force.flush()
    pairs.broken = True
    force.upsert(7, OTHER)
    with pytest.raises(DatapathError):
        force.flush()
    with pytest.raises(DatapathError):
        force.sweep()
    pairs.broken = False
    force.flush()
    assert pairs.pairs == set()


@pytest.mark.parametrize("policy", [POLICY, None])
def test_another_policy_starts_from_nothing(policy: str | None) -> None:
    """And no policy allows and denies nothing."""
    pairs = FakePolicyMap((OUT, 7))
    force = enforcement(pairs, policy=policy)
    assert pairs.pairs == set()
    force.upsert(7, OTHER)
    force.flush()
    assert pairs.pairs == set()
