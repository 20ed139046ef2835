"""Admission: fewer misses while answers are slow, all of them again when they are not, without swinging in between."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.resolver.admission import SAMPLES, Admission
from lazymesh.core.resolver.limits import Limits

FAST, SLOW = 0.001, 0.5


class Seconds:
    """Lets seconds pass, with answers."""

    def __init__(self) -> None:
        self.admission = Admission(Limits())
        self.now = 0.0
        self.admission.look(self.now)

    def second(self, **times: float) -> float:
        """Let each of these clusters give enough answers to count, each in this time; return the share."""
        for cluster, seconds in times.items():
            for _ in range(SAMPLES):
                self.admission.took(cluster, [seconds])
        self.now += 1.0
        self.admission.look(self.now)
        return self.admission.share


def test_fast_answers_admit_everything() -> None:
    """Nothing to do."""
    time = Seconds()
    assert [time.second(b=FAST) for _ in range(5)] == [1.0] * 5


def test_slow_answers_halve_the_share_and_are_judged_again_a_second_later() -> None:
    """What was admitted before is answered in the meantime; never less than a tenth."""
    time = Seconds()
    time.second(b=FAST)
    time.second(b=SLOW)
    assert [time.second(b=SLOW) for _ in range(9)] == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.1, 0.1, 0.1]
    assert time.admission.cuts == {"latency": 4, "queue": 0}


def test_one_slow_second_is_a_burst() -> None:
    """And so is the next one after a fast one."""
    time = Seconds()
    assert [time.second(b=times) for times in (FAST, SLOW, FAST, SLOW, FAST)] == [1.0] * 5


def test_a_few_late_answers_in_every_second_do_not_keep_misses_out() -> None:
    """A busy node has them for hours; when answers queue, most of them are late."""
    time = Seconds()
    time.second(b=FAST)
    assert [time.second(b=SLOW) for _ in range(2)] == [1.0, 0.5]
    time.second(b=FAST)
    for late, grows in ((1, True), (2 * SAMPLES, False)):
        before = time.admission.share
        time.admission.took("b", [0.09] * late)
        assert (time.second(b=FAST) > before) is grows


def test_it_is_released_step_by_step_and_only_upwards() -> None:
    """Also when nothing misses any more: silence is fast."""
    time = Seconds()
    time.second(b=FAST)
    for _ in range(9):
        time.second(b=SLOW)
    shares = [time.second(b=FAST) for _ in range(10)] + [time.second() for _ in range(20)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_slow_cluster_among_good_ones_changes_nothing() -> None:
    """The cause is not here."""
    time = Seconds()
    time.second(b=FAST, c=FAST)
    assert [time.second(b=FAST, c=SLOW) for _ in range(5)] == [1.0] * 5


def test_a_cluster_that_is_far_away_is_not_slow() -> None:
    """Each is compared with itself."""
    time = Seconds()
    assert [time.second(far=0.3) for _ in range(5)] == [1.0] * 5
    assert [time.second(far=1.3) for _ in range(2)] == [1.0, 0.5]


def test_a_few_answers_say_nothing() -> None:
    """One slow answer among three is not a percentile."""
    time = Seconds()
    time.second(b=FAST)
    for _ in range(3):
        time.admission.took("b", [SLOW])
        assert time.second() == 1.0


def test_a_cluster_that_is_gone_is_forgotten() -> None:
    """Its successor under the same name may be near or far."""
    time = Seconds()
    time.second(b=FAST)
    time.admission.forget("b")
    assert [time.second(b=SLOW) for _ in range(2)] == [1.0, 1.0]


def test_a_full_queue_halves_too() -> None:
    """The same flood must not be admitted again as soon as the kernel is heard."""
    time = Seconds()
    assert time.admission.overrun()
    assert (time.admission.share, time.admission.cuts["queue"]) == (0.5, 1)


@given(capacity=st.floats(0.15, 0.9), load=st.floats(1.0, 3.0))
def test_under_a_lasting_flood_it_stays_near_what_can_be_done(capacity: float, load: float) -> None:
    """The server has a fixed capacity, in shares of the settings' rate, and its queue does not forget."""
    time, waiting, shares = Seconds(), 0.0, []
    time.second(b=FAST)
    for _ in range(300):
        waiting = max(0.0, waiting + min(time.admission.share, load) - capacity)
        shares.append(time.second(b=FAST + waiting / capacity))
    steady = shares[100:]
    assert 0.4 * capacity < sum(steady) / len(steady) < 1.1 * capacity
    falls = sum(1 for before, after in itertools.pairwise(steady) if after < before)
    assert falls <= len(steady) / 5
