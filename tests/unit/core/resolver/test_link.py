"""One cluster's lanes: who is taken first, and void reads."""

import pytest

from lazymesh.core.resolver.breaker import Breaker
from lazymesh.core.resolver.limits import Limits
from lazymesh.core.resolver.link import VOID, Lane, Link
from lazymesh.core.resolver.tracked import Tracked
from tests.support.playbook import B1, DIRECT

CASES = {
    "misses alone take all the room": (10, 0, 8, True, (8, 0)),
    "checks alone take all the room": (0, 10, 8, True, (0, 8)),
    "checks get a quarter beside many misses": (10, 10, 8, True, (6, 2)),
    "checks get what few misses leave": (1, 10, 8, True, (1, 7)),
    "checks that must pause get nothing": (1, 10, 8, False, (1, 0)),
    "room for one goes to the miss": (5, 5, 1, True, (1, 0)),
}


@pytest.mark.parametrize(("misses", "checks", "room", "with_checks", "taken"), CASES.values(), ids=CASES)
def test_a_lane_is_emptied_in_fair_parts(
    misses: int, checks: int, room: int, with_checks: bool, taken: tuple[int, int]
) -> None:
    """Oldest first, misses before checks."""
    lane = Lane()
    for n in range(misses):
        lane.misses.add(Tracked(bytes([n]), ()))
    for n in range(checks):
        lane.checks.add(Tracked(bytes([100 + n]), ()))
    numbers = [tracked.address[0] for tracked in lane.take(room, None, with_checks=with_checks).taken()]
    assert numbers == [*range(taken[0]), *range(100, 100 + taken[1])]
    assert len(lane) == misses + checks - sum(taken)


@pytest.mark.parametrize(("misses", "whole"), [(0, 1), (5, 0)])
def test_checks_go_whole_alone_only(misses: int, whole: int) -> None:
    """A packet would wait for what is read with its address."""
    lane = Lane()
    for n in range(misses):
        lane.misses.add(Tracked(bytes([10, 2, 9, n]), ()))
    for n in range(200):
        lane.checks.add(Tracked(bytes([10, 2, 1, n]), ()))
    batch = lane.take(64, 64, with_checks=True)
    assert len(batch.whole) == whole
    assert len(batch.taken()) == (200 if whole else 64)


def test_void_reads_stay_in_flight_without_a_group() -> None:
    """They still count, but their answer will not."""
    link = Link("b", Breaker(Limits(), lambda: 1.0), reading={B1: DIRECT})
    link.void_reads()
    assert link.reading == {B1: VOID}
