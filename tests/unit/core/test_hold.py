"""The holder's queues: short plays, and a machine that parks, answers and waits at random."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lazymesh.core.hold import REMEMBER_S, Cause, Frame, HoldQueues, Return, Why

A, B = b"\x01" + bytes(15) + b"a", b"\x01" + bytes(15) + b"b"
LIMIT = 0.25

_slots = itertools.count()


def frame(address: bytes = A, at: float = 10.0, why: Why = Why.FIRST) -> Frame:
    """Return a packet of this address, parked at that time."""
    return Frame(next(_slots), address, round(at * 1e9), why, b"")


def parked(queues: HoldQueues, *frames: Frame) -> list[Frame]:
    """Park packets that all have to wait, and return them."""
    assert [queues.park(each) for each in frames] == [None] * len(frames)
    return list(frames)


def released(returns: list[Return]) -> list[Frame]:
    """Return the packets alone."""
    return [each.frame for each in returns]


def test_slot_that_is_used_again_does_not_inherit_a_deadline() -> None:
    """The packet that had it before was answered; the one that has it now may wait as long as any other."""
    queues = HoldQueues(limit_s=LIMIT)
    queues.park(Frame(5, A, round(10e9), Why.FIRST, b""))
    assert len(queues.answer(A, Cause.INSTALLED, 10.1)) == 1
    queues.park(Frame(5, A, round(10.2e9), Why.FIRST, b""))
    assert queues.expire(10.2 + LIMIT - 0.001) == []
    assert queues.next_deadline() == pytest.approx(10.2 + LIMIT)
    assert [each.cause for each in queues.expire(10.2 + LIMIT)] == [Cause.TIMEOUT]


@pytest.mark.parametrize("cause", [Cause.INSTALLED, Cause.NEGATIVE])
def test_an_answer_lets_all_of_its_address_go_in_order(cause: Cause) -> None:
    """Good or bad, and nothing of another address."""
    queues = HoldQueues()
    mine = parked(queues, frame(at=10), frame(at=10.1, why=Why.BEHIND), frame(at=10.2, why=Why.GATED))
    parked(queues, frame(B))
    returns = queues.answer(A, cause, since=10.3)
    assert released(returns) == mine
    assert {(each.cause, each.discard) for each in returns} == {(cause, False)}
    assert len(queues) == 1


def test_an_answer_for_an_address_without_packets_changes_nothing() -> None:
    """Most answers are for packets that were never held."""
    assert HoldQueues().answer(A, Cause.INSTALLED, since=10) == []


def test_nothing_waits_longer_than_the_limit() -> None:
    """The first packet's time decides; those behind it go with it."""
    queues = HoldQueues(limit_s=LIMIT)
    mine = parked(queues, frame(at=10), frame(at=10.2, why=Why.BEHIND))
    assert queues.next_deadline() == 10.25
    assert queues.expire(10.24) == []
    returns = queues.expire(10.25)
    assert released(returns) == mine
    assert all(each.cause is Cause.TIMEOUT and not each.discard for each in returns)
    assert queues.next_deadline() is None


def test_a_timeout_may_mean_drop_also_for_those_that_come_a_moment_late() -> None:
    """What was in the ring when the limit struck is treated as those before it."""
    queues = HoldQueues(drop_on_timeout=True)
    parked(queues, frame(at=10))
    assert [each.discard for each in queues.expire(10.25)] == [True]
    late = queues.park(frame(at=10.2, why=Why.BEHIND))
    assert late
    assert (late.cause, late.discard) == (Cause.LATE, True)


def test_an_answer_leaves_no_deadline_behind() -> None:
    """The deadline of packets that are gone wakes nothing."""
    queues = HoldQueues()
    parked(queues, frame(A, at=10), frame(B, at=10.1))
    queues.answer(A, Cause.INSTALLED, since=10.2)
    assert queues.next_deadline() == 10.1 + LIMIT
    assert released(queues.expire(10.3)) == []


def test_a_packet_that_missed_before_the_answer_does_not_wait() -> None:
    """The kernel had parked it before it could see the entry."""
    queues = HoldQueues()
    queues.answer(A, Cause.INSTALLED, since=10)
    late = queues.park(frame(at=9.999))
    assert late
    assert late.cause is Cause.LATE


def test_a_packet_of_the_very_moment_of_an_answer_is_one_before_it() -> None:
    """Whether it comes to us before the answer or behind it."""
    queues = HoldQueues()
    mine = parked(queues, frame(at=10))
    assert released(queues.answer(A, Cause.INSTALLED, since=10)) == mine
    late = queues.park(frame(at=10))
    assert late
    assert late.cause is Cause.LATE


def test_what_comes_late_for_an_answer_passes_also_where_a_timeout_means_drop() -> None:
    """Somebody has answered: only silence drops."""
    queues = HoldQueues(drop_on_timeout=True)
    queues.answer(A, Cause.NEGATIVE, since=10)
    late = queues.park(frame(at=9.9))
    assert late
    assert (late.cause, late.discard) == (Cause.LATE, False)


def test_a_packet_that_was_signalled_after_the_answer_waits_for_its_own() -> None:
    """Its entry has vanished again; the old answer would let it through as world."""
    queues = HoldQueues()
    queues.answer(A, Cause.INSTALLED, since=10)
    mine = parked(queues, frame(at=10.0001))
    assert released(queues.answer(A, Cause.INSTALLED, since=10.001)) == mine


def test_an_old_answer_does_not_let_younger_misses_go() -> None:
    """It was given before they missed; those before it go, those behind it stay in order."""
    queues = HoldQueues(limit_s=LIMIT)
    old = parked(queues, frame(at=10), frame(at=10.01, why=Why.BEHIND))
    young = parked(queues, frame(at=10.2), frame(at=10.3, why=Why.GATED))
    assert released(queues.answer(A, Cause.INSTALLED, since=10.1)) == old
    assert queues.next_deadline() == pytest.approx(10.2 + LIMIT)
    assert released(queues.answer(A, Cause.INSTALLED, since=10.31)) == young


def test_a_packet_behind_answered_ones_goes_at_once() -> None:
    """It was not signalled, so no answer would ever come; a stream to an absent peer is not held up."""
    queues = HoldQueues()
    queues.answer(A, Cause.NEGATIVE, since=10)
    late = queues.park(frame(at=11.2, why=Why.BEHIND))
    assert late
    assert late.cause is Cause.LATE


def test_a_packet_behind_one_that_was_not_parked_waits() -> None:
    """The signalled one may have been refused; the answer to its signal is still to come."""
    queues = HoldQueues()
    queues.answer(A, Cause.INSTALLED, since=10)
    parked(queues, frame(at=10 + REMEMBER_S + 0.1, why=Why.BEHIND))
    parked(queues, frame(B, at=10, why=Why.BEHIND))


def test_a_gated_packet_waits_only_behind_others() -> None:
    """It has its entry: alone it goes back at once."""
    queues = HoldQueues()
    alone = queues.park(frame(why=Why.GATED))
    assert alone
    assert alone.cause is Cause.GATED
    parked(queues, frame(), frame(why=Why.GATED))


def test_draining_gives_everything_back_in_order() -> None:
    """The holder ends: nothing may stay."""
    queues = HoldQueues()
    mine = parked(queues, frame(A), frame(B), frame(A, why=Why.BEHIND))
    returns = list(queues.drain())
    assert sorted(each.slot for each in released(returns)) == sorted(each.slot for each in mine)
    assert [each for each in released(returns) if each.address == A] == [mine[0], mine[2]]
    assert {each.cause for each in returns} == {Cause.SHUTDOWN}
    assert len(queues) == 0
    assert queues.next_deadline() is None


def test_answers_are_forgotten_in_time() -> None:
    """A million addresses answered leave nothing behind."""
    queues = HoldQueues()
    for number in range(10_000):
        queues.answer(b"%017d" % number, Cause.INSTALLED, since=float(number))
    assert len(queues._answered) <= REMEMBER_S + 1


def test_an_address_that_is_answered_again_and_again_keeps_no_others() -> None:
    """It was the first to be answered, and is always remembered."""
    queues = HoldQueues()
    for number in range(100):
        queues.answer(A, Cause.INSTALLED, since=float(number))
        queues.answer(b"%017d" % number, Cause.INSTALLED, since=float(number))
    assert len(queues._answered) <= REMEMBER_S + 2


class Holding(RuleBasedStateMachine):
    """Parks, answers and lets time pass in any order; checks what must hold whatever happens."""

    addresses = st.sampled_from([A, B, b"\x02" + bytes(16)])

    def __init__(self) -> None:
        super().__init__()
        self.queues = HoldQueues(limit_s=LIMIT)
        self.now = 100.0
        self.waiting: dict[int, Frame] = {}
        self.gone: set[int] = set()
        self.order: dict[bytes, int] = {}

    @rule(address=addresses, why=st.sampled_from(Why), age=st.sampled_from([0.0, 0.0, 0.0001, 0.02]))
    def park(self, address: bytes, why: Why, age: float) -> None:
        """Packets come in the order of their slots; the ring may have kept them for a while."""
        each = frame(address, self.now - age, why)
        self.waiting[each.slot] = each
        back = self.queues.park(each)
        self.take([back] if back else [])

    @rule(
        address=addresses,
        cause=st.sampled_from([Cause.INSTALLED, Cause.NEGATIVE]),
        ago=st.sampled_from([0.0, 0.01]),
    )
    def answer(self, address: bytes, cause: Cause, ago: float) -> None:
        """An answer lets go everything that missed before it."""
        since = self.now - ago
        self.take(self.queues.answer(address, cause, since))
        left = [each for each in self.waiting.values() if each.address == address]
        assert not left or (left[0].why is Why.FIRST and left[0].parked_at > since)

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.25, 3.0]))
    def wait(self, seconds: float) -> None:
        """Time passes, and the holder looks when it said that it would."""
        until = self.now + seconds
        while (deadline := self.queues.next_deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            self.take(self.queues.expire(self.now))
        self.now = until

    @rule()
    def drain(self) -> None:
        """Everything goes."""
        self.take(list(self.queues.drain()))
        assert not self.waiting

    def take(self, returns: list[Return]) -> None:
        """Each packet goes back once, and behind the earlier ones of its address."""
        for each in returns:
            slot = each.frame.slot
            assert slot not in self.gone
            self.gone.add(slot)
            del self.waiting[slot]
            assert self.order.get(each.frame.address, -1) < slot
            self.order[each.frame.address] = slot

    @invariant()
    def nothing_is_lost_and_nothing_waits_too_long(self) -> None:
        """What was parked waits or has gone back; the first of each address is within the limit."""
        assert len(self.queues) == len(self.waiting)
        firsts: dict[bytes, Frame] = {}
        for each in self.waiting.values():
            firsts.setdefault(each.address, each)
        for each in firsts.values():
            assert self.now <= each.parked_at + LIMIT + 1e-9
            deadline = self.queues.next_deadline()
            assert deadline is not None
            assert deadline <= each.parked_at + LIMIT


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
