"""Back-off with full jitter: between nothing and a limit that doubles up to a ceiling."""

from __future__ import annotations

from lazymesh.core.backoff import Backoff, BackoffLimits


def test_limit_doubles_up_to_the_ceiling() -> None:
    """With a jitter that is always at its most, the delays are the limits themselves."""
    backoff = Backoff(BackoffLimits(initial_s=1, ceiling_s=5), jitter=lambda: 1.0)
    assert [backoff.next_s() for _ in range(5)] == [1, 2, 4, 5, 5]


def test_delay_is_anything_between_nothing_and_the_limit() -> None:
    """Full jitter: chance decides the whole delay, not a part of it."""
    drawn = iter([0.0, 0.5, 0.25])
    backoff = Backoff(BackoffLimits(initial_s=4, ceiling_s=100), jitter=lambda: next(drawn))
    assert [backoff.next_s() for _ in range(3)] == [0, 4, 4]


def test_success_starts_the_sequence_over() -> None:
    """After a reset the first limit applies again."""
    backoff = Backoff(BackoffLimits(initial_s=1, ceiling_s=50), jitter=lambda: 1.0)
    for _ in range(4):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() == 1


def test_a_very_long_outage_stays_at_the_ceiling() -> None:
    """Thousands of failures do not overflow the exponent."""
    backoff = Backoff(BackoffLimits(initial_s=0.25, ceiling_s=30), jitter=lambda: 1.0)
    assert {backoff.next_s() for _ in range(5000)} >= {30.0}
    assert backoff.next_s() == 30
