"""What waits for a read: order, neighbours that are taken together, and which goes first in a lane."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lazymesh.core.model import format_address, parse_address
from lazymesh.core.resolver.tracked import Tracked
from lazymesh.core.resolver.waiting import Batch, Lane, Waiting

if TYPE_CHECKING:
    from lazymesh.core.model import Address


def waiting_for(*addresses: str) -> Waiting[Tracked]:
    """Return these, in this order."""
    waiting: Waiting[Tracked] = Waiting()
    for address in addresses:
        waiting.add([Tracked(parse_address(address), ())])
    return waiting


def texts(batch: Batch[Tracked]) -> tuple[list[list[str]], list[str]]:
    """Return what goes whole, and what apart."""
    whole = [[format_address(one.address) for one in members] for members in batch.whole]
    return whole, [format_address(one.address) for one in batch.apart]


A = ("10.2.0.5", "10.2.0.6", "10.2.0.7")
B = ("10.2.1.5", "10.2.1.6")
V6 = ("fd00::1", "fd00::2", "fd00::3")


@pytest.mark.parametrize(
    ("waits", "room", "whole", "apart"),
    [
        pytest.param(B, 8, [], B, id="few go apart"),
        pytest.param(A, 8, [A], (), id="many go whole"),
        pytest.param((A[0], B[0], A[1], B[1], A[2]), 8, [A], B, id="wherever they are in the row"),
        pytest.param((*B, *A), 1, [], B[:1], id="the oldest first"),
        pytest.param((*B, *A), 3, [A], B, id="more than there is room for, if it is whole"),
        pytest.param((*A, *B), 1, [A], (), id="which takes all the room"),
        pytest.param((*A, *B), 2, [A], B[:1], id="or leaves some"),
        pytest.param((*B, *A), 4, [A], B, id="and takes less than its number would"),
        pytest.param(V6, 8, [], V6, id="IPv6 never goes whole"),
    ],
)
def test_neighbours_go_together(
    waits: tuple[str, ...], room: int, whole: list[tuple[str, ...]], apart: tuple[str, ...]
) -> None:
    """Three of a /24 count as many here."""
    waiting, batch = waiting_for(*waits), Batch()
    waiting.take(batch, room, whole_at=3)
    assert texts(batch) == ([list(each) for each in whole], list(apart))
    assert waiting.count == len(waits) - len(batch.taken())


def test_nothing_goes_whole_where_it_must_not() -> None:
    """A cluster that has too much in a /24 is read address by address."""
    batch = Batch()
    waiting_for(*A, *B).take(batch, 4, whole_at=None)
    assert texts(batch) == ([], [*A, B[0]])


def test_the_oldest_is_shed() -> None:
    """A neighbourhood whose first one is gone goes behind the others."""
    waiting = waiting_for(A[0], B[0], A[1], B[1], A[2])
    shed = []
    while waiting.count:
        shed.append(format_address(waiting.first().address))
        assert waiting.remove(waiting.first().address)
    assert shed == [A[0], B[0], A[1], B[1], A[2]]


ADDRESSES = st.builds(lambda group, last: bytes((10, 2, group, last)), st.integers(0, 2), st.integers(0, 4))


class Row(RuleBasedStateMachine):
    """Everything that can be done to Waiting, compared with a list."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: Waiting[Tracked] = Waiting()
        self.model: list[Address] = []

    @rule(address=ADDRESSES)
    def comes(self, address: Address) -> None:
        """One more waits."""
        if address not in self.model:
            self.waiting.add([Tracked(address, ())])
            self.model.append(address)

    @rule(address=ADDRESSES)
    def goes(self, address: Address) -> None:
        """One no longer waits."""
        assert self.waiting.remove(address) == (address in self.model)
        self.model = [each for each in self.model if each != address]

    @rule(room=st.integers(0, 5), whole_at=st.sampled_from([None, 1, 3]))
    def is_taken(self, room: int, whole_at: int | None) -> None:
        """Some are read; nothing older is left behind except part of its own neighbourhood."""
        batch = Batch()
        self.waiting.take(batch, room, whole_at)
        taken = [tracked.address for tracked in batch.taken()]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(self.model)
        assert len(batch.apart) + len(batch.whole) <= room
        assert bool(taken) == bool(room and self.model)
        for members in batch.whole:
            (group,) = {tracked.address[:-1] for tracked in members}
            assert len(members) == sum(each[:-1] == group for each in self.model)
        self.model = [each for each in self.model if each not in taken]

    @rule()
    def all_move(self) -> None:
        """They wait elsewhere from now on."""
        other: Waiting[Tracked] = Waiting()
        self.waiting.move_to(other)
        assert not self.waiting.count
        self.waiting = other

    @invariant()
    def it_is_what_it_was_told(self) -> None:
        """In number, and the first is of the oldest neighbourhood."""
        assert self.waiting.count == len(self.model)
        if self.model:
            assert self.waiting.first().address in self.model


TestRow = Row.TestCase


TURNS = {
    "misses alone take all the room": (10, 0, 8, True, (8, 0)),
    "checks alone take all the room": (0, 10, 8, True, (0, 8)),
    "checks get a quarter beside many misses": (10, 10, 8, True, (6, 2)),
    "checks get what few misses leave": (1, 10, 8, True, (1, 7)),
    "checks that must pause get nothing": (1, 10, 8, False, (1, 0)),
    "room for one goes to the miss": (5, 5, 1, True, (1, 0)),
}


@pytest.mark.parametrize(("misses", "checks", "room", "with_checks", "taken"), TURNS.values(), ids=TURNS)
def test_a_lane_is_emptied_in_fair_parts(
    misses: int, checks: int, room: int, with_checks: bool, taken: tuple[int, int]
) -> None:
    """Oldest first, misses before checks."""
    lane: Lane[Tracked] = Lane()
    for n in range(misses):
        lane.misses.add([Tracked(bytes([n]), ())])
    for n in range(checks):
        lane.checks.add([Tracked(bytes([100 + n]), ())])
    numbers = [tracked.address[0] for tracked in lane.take(room, None, with_checks=with_checks).taken()]
    assert numbers == [*range(taken[0]), *range(100, 100 + taken[1])]
    assert len(lane) == misses + checks - sum(taken)


@pytest.mark.parametrize(("misses", "whole"), [(0, 1), (5, 0)])
def test_checks_go_whole_alone_only(misses: int, whole: int) -> None:
    """A packet would wait for what is read with its address."""
    lane: Lane[Tracked] = Lane()
    for n in range(misses):
        lane.misses.add([Tracked(bytes([10, 2, 9, n]), ())])
    for n in range(200):
        lane.checks.add([Tracked(bytes([10, 2, 1, n]), ())])
    batch = lane.take(64, 64, with_checks=True)
    assert len(batch.whole) == whole
    assert len(batch.taken()) == (200 if whole else 64)
