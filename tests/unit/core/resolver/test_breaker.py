"""The circuit breaker: when it lets reads through, and how long it waits."""

from hypothesis import given
from hypothesis import strategies as st

from lazymesh.core.resolver.breaker import ALLOWED, Breaker, BreakerState
from lazymesh.core.resolver.limits import Limits

LIMITS = Limits(breaker_failures=3, backoff_first=1.0, backoff_most=30.0)


def opened(jitter: float = 1.0) -> Breaker:
    """Return a breaker that opened at time 0."""
    breaker = Breaker(LIMITS, lambda: jitter)
    for _ in range(3):
        breaker.failed(0.0)
    return breaker


def test_it_lets_everything_through_until_the_third_failure_in_a_row() -> None:
    """A success in between starts the count over."""
    breaker = Breaker(LIMITS, lambda: 1.0)
    for outcome in (
        breaker.failed,
        breaker.failed,
        lambda _: breaker.succeeded(),
        breaker.failed,
        breaker.failed,
    ):
        outcome(0.0)
        assert breaker.admits(0.0)
    breaker.failed(0.0)
    assert not breaker.admits(0.0)


def test_it_lets_exactly_one_read_through_after_the_pause() -> None:
    """Half-open admits the probe and nothing beside it."""
    breaker = opened()
    assert not breaker.admits(0.99)
    assert breaker.admits(1.0)
    breaker.sent()
    assert not breaker.admits(1.0)
    breaker.succeeded()
    assert breaker.admits(1.0)


def test_each_failed_probe_doubles_the_pause_up_to_the_limit() -> None:
    """One second, two, four ... thirty, thirty."""
    breaker, now = opened(), 0.0
    for pause in (1, 2, 4, 8, 16, 30, 30):
        assert not breaker.admits(now + pause - 0.01)
        now += pause
        assert breaker.admits(now)
        breaker.sent()
        breaker.failed(now)


def test_jitter_takes_any_part_of_the_pause() -> None:
    """Full jitter: the pause is somewhere between nothing and its bound."""
    assert opened(jitter=0.0).admits(0.0)
    assert opened(jitter=0.5).admits(0.5)
    assert not opened(jitter=0.5).admits(0.49)


def test_failures_of_reads_sent_before_it_opened_do_not_lengthen_the_pause() -> None:
    """Eight transactions in flight fail together; that counts once, not eight times."""
    breaker = opened()
    for _ in range(8):
        breaker.failed(0.5)
    assert breaker.admits(1.0)


def test_a_recovery_starts_the_pauses_over() -> None:
    """The next outage begins with one second again."""
    breaker = opened()
    breaker.sent()
    breaker.failed(1.0)
    breaker.succeeded()
    for _ in range(3):
        breaker.failed(10.0)
    assert breaker.admits(11.0)


@given(script=st.lists(st.sampled_from("sfo"), max_size=30))
def test_it_only_moves_along_its_table(script: list[str]) -> None:
    """In whatever order things happen, only allowed transitions occur."""
    breaker = Breaker(LIMITS, lambda: 1.0)
    for now, letter in enumerate(script):
        before = breaker.state
        if letter == "s":
            breaker.succeeded()
        elif letter == "f":
            breaker.failed(float(now))
        elif breaker.admits(float(now)):
            breaker.sent()
        assert breaker.state is before or breaker.state in ALLOWED[before]
    assert set(ALLOWED) == set(BreakerState)
