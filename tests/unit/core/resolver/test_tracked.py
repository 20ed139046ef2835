"""What is remembered about one address: allowed phases, which state of a key counts; and void reads of a cluster."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.model import Space
from lazymesh.core.records import IpRecord
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


def record(number: int) -> IpRecord:
    """Return one of many."""
    return IpRecord(number, bytes([172, 18, 0, 3]), 0, "")


@given(revisions=st.permutations(range(5)))
def test_the_newest_state_of_a_key_counts_in_whatever_order_they_come(revisions: list[int]) -> None:
    """Never an older answer over a newer one."""
    tracked = Tracked(B1, ("b",), spaces=DIRECT)
    for number, revision in enumerate(revisions):
        newest = not number or revision > max(revisions[:number])
        assert tracked.learn(Space.PUSHED, record(revision), revision) == newest
    assert tracked.newest() == record(4)
    assert (tracked.keys, tracked.records, tracked.revisions) == ((Space.PUSHED,), (record(4),), (4,))


def test_of_two_keys_the_newer_record_counts() -> None:
    """An endpoint on its way from one space to the other is for a moment in both."""
    tracked = Tracked(B1, ("b",), spaces=DIRECT)
    tracked.learn(Space.PULL_ONLY, record(2), 11)
    tracked.learn(Space.PUSHED, record(1), 10)
    assert tracked.newest() == record(2)
    tracked.learn(Space.PULL_ONLY, None, 12)
    assert tracked.newest() == record(1)


def test_of_two_keys_read_at_one_revision_the_first_of_the_group_counts() -> None:
    """A publisher moves the record; the removal of the other key settles it."""
    tracked = Tracked(
        B1, ("b",), spaces=DIRECT, keys=DIRECT, records=(record(1), record(2)), revisions=(10, 10)
    )
    assert tracked.newest() == record(1)
    tracked.learn(DIRECT[0], record(3), 11)
    tracked.learn(DIRECT[1], record(4), 11)
    assert tracked.newest() == record(3)
    tracked.learn(DIRECT[0], None, 12)
    assert tracked.newest() == record(4)


@pytest.mark.parametrize("records", [(None, None), (None, record(2)), (record(1), None)])
def test_keys_read_at_one_revision_say_what_the_only_one_says(records: tuple[IpRecord | None, ...]) -> None:
    """Mostly an address is in one space, and the other key does not exist."""
    tracked = Tracked(B1, ("b",), spaces=DIRECT, keys=DIRECT, records=records, revisions=(10, 10))
    assert tracked.newest() == next(filter(None, records), None)


def test_of_an_address_that_was_not_read_no_record_counts() -> None:
    """Nor of one whose store was replaced."""
    tracked = Tracked(B1, ("b",))
    assert tracked.newest() is None
    tracked.learn(Space.PUSHED, record(1), 10)
    tracked.forget_states()
    assert tracked.newest() is None


@given(revisions=st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_a_change_of_one_key_counts_against_what_was_read_of_both(revisions: list[int]) -> None:
    """Whatever its revision is."""
    tracked = Tracked(B1, ("b",), spaces=DIRECT, keys=DIRECT, records=(record(1), None), revisions=(10, 10))
    for revision in revisions:
        tracked.learn(Space.PULL_ONLY, record(2), revision)
    assert tracked.newest() == record(2 if max(revisions) > 10 else 1)


def test_only_the_group_that_answered_last_counts() -> None:
    """The revisions of two stores cannot be compared."""
    tracked = Tracked(B1, ("b",), spaces=CACHE)
    tracked.learn(Space.CACHED, record(1), 1000)
    assert tracked.newest() == record(1)
    tracked.spaces = DIRECT
    assert tracked.newest() is None


def test_void_reads_stay_in_flight() -> None:
    """They still count, but their answer will not."""
    link = Link("b", Breaker(Limits(), lambda: 1.0))
    link.sent[B1,] = Sent(link, [Tracked(B1, ("b",))])
    link.void_reads()
    assert link.sent[B1,].void
    assert len(link.sent) == 1
