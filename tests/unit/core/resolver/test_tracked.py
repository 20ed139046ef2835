"""What is remembered about one address: allowed phases, which state of a key counts; and void reads of a cluster."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.events import KeyState
from lazymesh.core.model import Space
from lazymesh.core.resolver.breaker import Breaker
from lazymesh.core.resolver.limits import Limits
from lazymesh.core.resolver.tracked import ALLOWED, Link, Phase, Sent, Tracked
from tests.support.playbook import B1, CACHE, DIRECT


@pytest.mark.parametrize(
    ("start", "to"), list(itertools.product(Phase, Phase)), ids=lambda phase: phase.value
)
def test_only_the_moves_of_the_table_are_possible(start: Phase, to: Phase) -> None:
    """Anything else is a bug and says so."""
    tracked = Tracked(B1, ("b",), phase=start)
    if to in ALLOWED[start]:
        tracked.move(to)
        assert tracked.phase is to
    else:
        with pytest.raises(RuntimeError, match="0a020001 cannot go from"):
            tracked.move(to)


@given(states=st.permutations([KeyState(B1, Space.PUSHED, str(n).encode(), n) for n in range(5)]))
def test_the_newest_state_of_a_key_counts_in_whatever_order_they_come(states: list[KeyState]) -> None:
    """Never an older answer over a newer one."""
    tracked = Tracked(B1, ("b",), spaces=DIRECT)
    for state in states:
        tracked.learn(state)
    assert tracked.newest() == b"4"
    assert tracked.known == ((Space.PUSHED,), (b"4",), (4,))


def test_of_two_keys_the_newer_record_counts() -> None:
    """An endpoint on its way from one space to the other is for a moment in both."""
    tracked = Tracked(B1, ("b",), spaces=DIRECT)
    tracked.learn(KeyState(B1, Space.PULL_ONLY, b"new", 11))
    tracked.learn(KeyState(B1, Space.PUSHED, b"old", 10))
    assert tracked.newest() == b"new"
    tracked.learn(KeyState(B1, Space.PULL_ONLY, None, 12))
    assert tracked.newest() == b"old"


def test_of_two_keys_read_at_one_revision_the_first_of_the_group_counts() -> None:
    """A publisher moves the record; the removal of the other key settles it."""
    tracked = Tracked(B1, ("b",), spaces=DIRECT)
    tracked.known = DIRECT, tuple(space.value.encode() for space in DIRECT), (10, 10)
    assert tracked.newest() == DIRECT[0].value.encode()
    tracked.learn(KeyState(B1, DIRECT[0], b"again", 11))
    tracked.learn(KeyState(B1, DIRECT[1], b"moved", 11))
    assert tracked.newest() == b"again"


def test_only_the_group_that_answered_last_counts() -> None:
    """The revisions of two stores cannot be compared."""
    tracked = Tracked(B1, ("b",), spaces=CACHE)
    tracked.learn(KeyState(B1, Space.CACHED, b"cached", 1000))
    assert tracked.newest() == b"cached"
    tracked.spaces = DIRECT
    assert tracked.newest() is None


def test_void_reads_stay_in_flight() -> None:
    """They still count, but their answer will not."""
    link = Link("b", Breaker(Limits(), lambda: 1.0))
    link.sent[B1,] = Sent(link, [Tracked(B1, ("b",))])
    link.void_reads()
    assert link.sent[B1,].void
    assert len(link.sent) == 1
