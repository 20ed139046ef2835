"""The record of open windows: sums stay, details are bounded, and the past can be asked for."""

from __future__ import annotations

from lazymesh.core.audit import KEEP, AuditedWindow, AuditLog, Window
from lazymesh.core.model import Direction

PEER = bytes((10, 2, 0, 5))


def closed(first: float = 10.0, last: float = 12.5, packets: int = 3) -> AuditedWindow:
    """Return a closed window of one peer."""
    window = Window(PEER, Direction.EGRESS, first, last, packets, 100 * packets)
    return AuditedWindow(window, "b", 131_073, "denied", open=False)


def test_a_window_lasts_from_its_first_packet_to_its_last() -> None:
    """One packet alone takes no time."""
    assert closed().window.seconds == 2.5
    assert closed(10.0, 10.0, 1).window.seconds == 0


def test_sums_are_kept_of_everything_closed() -> None:
    """They are what the metrics show."""
    log = AuditLog()
    log.close(closed())
    log.close(closed(20.0, 20.5, 2))
    assert (log.windows_total, log.packets_total, log.seconds_total) == (2, 5, 3.0)


def test_the_past_can_be_asked_for() -> None:
    """What was still open at the moment asked for, or later, in the order in which it was closed."""
    log = AuditLog()
    old, late, longest = closed(1, 2), closed(5, 6), closed(0, 9)
    for each in (old, late, longest):
        log.close(each)
    assert list(log.since(0)) == [old, late, longest]
    assert list(log.since(6)) == [late, longest]
    assert list(log.since(9.5)) == []


def test_details_are_bounded_and_sums_are_not() -> None:
    """The oldest go first."""
    log = AuditLog()
    for number in range(KEEP + 10):
        log.close(closed(number, number, 1))
    kept = list(log.since(0))
    assert len(kept) == KEEP
    assert kept[0].window.first == 10
    assert log.windows_total == KEEP + 10
    assert log.complete_since == 9


def test_windows_are_closed_or_open_or_forgotten() -> None:
    """Windows that open during the count hide some, but never add any."""
    log = AuditLog(complete_since=1.0, gone_before=100)
    log.compare(opened=103, open_now=3, now=2.0)
    log.close(closed())
    log.compare(opened=103, open_now=2, now=3.0)
    assert (log.forgotten_total, log.complete_since) == (0, 1.0)
    log.compare(opened=110, open_now=7, now=4.0)
    assert (log.forgotten_total, log.complete_since) == (2, 4.0)
    log.compare(opened=111, open_now=9, now=5.0)
    log.compare(opened=112, open_now=9, now=6.0)
    assert (log.forgotten_total, log.complete_since) == (2, 4.0)
    log.compare(opened=113, open_now=9, now=7.0)
    assert (log.forgotten_total, log.complete_since) == (3, 7.0)


def test_what_is_forgotten_ends_the_time_of_which_all_is_known() -> None:
    """Windows are not closed in the order of their last packets; and nothing is forgotten before there are many."""
    log = AuditLog(complete_since=100.0)
    lasts = [90.0, 300.0, 200.0]
    for last in (*lasts, *[400.0] * (KEEP - len(lasts))):
        log.close(closed(50.0, last))
    assert log.complete_since == 100
    for expected in (100, 300, 300):
        log.close(closed(50.0, 400.0))
        assert log.complete_since == expected
