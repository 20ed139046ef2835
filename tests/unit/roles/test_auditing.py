"""The audit's windows are closed when their addresses are answered, one by one or many at once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lazymesh.core.audit import Window
from lazymesh.core.model import Direction
from lazymesh.roles.auditing import MANY, Auditor

A_LITTLE = timedelta(milliseconds=100)
"""Dates are made of seconds since the start, and cut at milliseconds."""


class Windows:
    """Stands in for the kernel's map, and counts how often it is asked."""

    def __init__(self, *open_for: bytes) -> None:
        self.open = set(open_for)
        self.asked = 0

    def is_empty(self) -> bool:
        """Tell whether there is none."""
        self.asked += 1
        return not self.open

    def items(self) -> list[Window]:
        """Show those of which no test has any."""
        return []

    def take(self, address: bytes) -> Window | None:
        """Close one."""
        self.asked += 1
        if address not in self.open:
            return None
        self.open.remove(address)
        return Window(address, Direction.EGRESS, 1.0, 2.0, 3, 400)


def addresses(count: int) -> list[bytes]:
    """Return so many addresses."""
    return [bytes((10, 2, number >> 8, number & 255)) for number in range(count)]


@pytest.mark.parametrize("count", [1, MANY - 1, MANY, 4 * MANY])
def test_a_window_is_closed_however_many_are_answered_with_its_address(count: int) -> None:
    """Its packets are counted, once."""
    answered = addresses(count)
    windows = Windows(answered[-1], b"\x0a\x03\0\0")
    auditor = _auditor(windows)
    auditor.installed(answered)
    auditor.installed(answered)
    assert windows.open == {b"\x0a\x03\0\0"}
    assert (auditor.log.windows_total, auditor.log.packets_total) == (1, 3)


def test_many_answers_are_looked_up_once_while_no_window_is_open() -> None:
    """So it is in a storm that is held or dropped."""
    windows = Windows()
    _auditor(windows).installed(addresses(4 * MANY))
    assert windows.asked == 1


def test_record_begins_with_the_agent_and_says_so() -> None:
    """An hour asked for does not make it an hour old; what is forgotten makes it begin later."""
    windows = Windows()
    before = datetime.now(UTC)
    auditor = _auditor(windows)
    answer = auditor.describe(3600.0)
    assert answer["windows"] == []
    since = datetime.fromisoformat(answer["recordedSince"])
    assert before - A_LITTLE < since < datetime.now(UTC) + A_LITTLE
    auditor.log.complete_since += 60
    later = datetime.fromisoformat(auditor.describe(3600.0)["recordedSince"])
    assert abs(later - since - timedelta(seconds=60)) < A_LITTLE


def _auditor(windows: Windows) -> Auditor:
    resolver = cast("Any", SimpleNamespace(describe=lambda _address: None))
    return Auditor(cast("Any", windows), None, resolver)
