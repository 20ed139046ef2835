"""The audit's windows are closed when their addresses are answered, one by one or many at once."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lazymesh.core.audit import Window
from lazymesh.core.model import Direction
from lazymesh.datapath import abi
from lazymesh.roles import auditing
from lazymesh.roles.auditing import IDLE_S, MANY, Auditor
from tests.support.etcd import eventually

A_LITTLE = timedelta(milliseconds=100)
"""Dates are made of seconds since the start, and cut at milliseconds."""


class Windows:
    """Stands in for the kernel's map and its counter, and counts how often it is asked."""

    def __init__(self, *open_for: bytes) -> None:
        self.open = dict.fromkeys(open_for, 2.0)
        """By address: when its last packet came."""
        self.opened = len(open_for)
        self.asked = 0

    def add(self, addresses: list[bytes], last: float) -> None:
        """Open some."""
        self.open |= dict.fromkeys(addresses, last)
        self.opened += len(addresses)

    def windows_opened(self) -> int:
        """Return how many there were, ever."""
        return self.opened

    def is_empty(self) -> bool:
        """Tell whether there is none."""
        self.asked += 1
        return not self.open

    def elements(self) -> list[tuple[bytes, bytes]]:
        """Return them as the kernel has them."""
        return [
            (abi.pack_dedup_key(address), bytes(abi.Window(0, int(last * 1e9), 3, 400, 0, 0)))
            for address, last in self.open.items()
        ]

    def take(self, address: bytes) -> Window | None:
        """Close one."""
        self.asked += 1
        if address not in self.open:
            return None
        last = self.open.pop(address)
        return Window(address, Direction.EGRESS, 0.0, last, 3, 400)


def addresses(count: int) -> list[bytes]:
    """Return this many addresses."""
    return [bytes((10, 2, number >> 8, number & 255)) for number in range(count)]


@pytest.mark.parametrize("count", [1, MANY - 1, MANY, 4 * MANY])
def test_a_window_is_closed_however_many_are_answered_with_its_address(count: int) -> None:
    """Its packets are counted, once."""
    answered = addresses(count)
    windows = Windows(answered[-1], b"\x0a\x03\0\0")
    auditor = _auditor(windows)
    auditor.installed(answered)
    auditor.installed(answered)
    assert list(windows.open) == [b"\x0a\x03\0\0"]
    assert (auditor.log.windows_total, auditor.log.packets_total) == (1, 3)


def test_many_answers_are_looked_up_once_while_no_window_is_open() -> None:
    """So it is in a storm that is held or dropped."""
    windows = Windows()
    _auditor(windows).installed(addresses(4 * MANY))
    assert windows.asked == 1


async def test_record_begins_with_the_agent_and_says_so() -> None:
    """An hour asked for does not make it an hour old; what is forgotten makes it begin later."""
    windows = Windows()
    before = datetime.now(UTC)
    auditor = _auditor(windows)
    answer = await auditor.describe(3600.0)
    assert answer["windows"] == []
    since = datetime.fromisoformat(answer["recordedSince"])
    assert before - A_LITTLE < since < datetime.now(UTC) + A_LITTLE
    auditor.log.complete_since += 60
    later = datetime.fromisoformat((await auditor.describe(3600.0))["recordedSince"])
    assert abs(later - since - timedelta(seconds=60)) < A_LITTLE


async def test_windows_that_made_room_for_others_are_counted_and_end_the_complete_record() -> None:
    """What went through them is unknown; those forgotten before the agent began are not its own."""
    windows = Windows(*addresses(10))
    windows.opened += 7
    auditor = _auditor(windows)
    began = auditor.log.complete_since
    windows.add(addresses(30)[10:], last=2.0)
    auditor.installed(addresses(5))
    await auditor.describe(3600.0)
    assert (auditor.log.forgotten_total, auditor.log.complete_since) == (0, began)
    windows.open.popitem()
    windows.open.popitem()
    before = time.monotonic()
    answer = await auditor.describe(3600.0)
    assert auditor.log.forgotten_total == 2
    assert before <= auditor.log.complete_since <= time.monotonic()
    assert datetime.fromisoformat(answer["recordedSince"]) > datetime.now(UTC) - timedelta(seconds=60)
    later = auditor.log.complete_since
    await auditor.describe(3600.0)
    assert (auditor.log.forgotten_total, auditor.log.complete_since) == (2, later)


async def test_windows_that_are_idle_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered or not: they are in the sums and in the record then, and the others stay open."""
    monkeypatch.setattr(auditing, "LOOK_EVERY_S", 0.01)
    idle, used = addresses(3)[:2], addresses(3)[2:]
    windows = Windows()
    windows.add(idle, time.monotonic() - IDLE_S - 1)
    windows.add(used, time.monotonic())
    auditor = _auditor(windows)
    running = asyncio.create_task(auditor.run())
    await eventually(lambda: list(windows.open) == used)
    running.cancel()
    assert (auditor.log.windows_total, auditor.log.packets_total) == (2, 6)
    found = (await auditor.describe(3600.0))["windows"]
    assert [(each["address"], each["open"]) for each in found] == [
        ("10.2.0.0", False),
        ("10.2.0.1", False),
        ("10.2.0.2", True),
    ]


async def test_thousands_of_windows_leave_others_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held any more when the agent has shown no sign of life for a tenth of a second."""
    monkeypatch.setattr(auditing, "LOOK_EVERY_S", 0)
    windows = Windows()
    windows.add(addresses(16_000), time.monotonic() - IDLE_S - 1)
    auditor, seen = _auditor(windows), []

    async def other() -> None:
        while True:
            await asyncio.sleep(0)
            seen.append(len(windows.open))

    waiting = asyncio.create_task(other())
    assert len((await auditor.describe(3600.0))["windows"]) == 16_000
    assert len(seen) >= 10
    running = asyncio.create_task(auditor.run())
    await eventually(lambda: not windows.open)
    running.cancel()
    waiting.cancel()
    assert len(set(seen) - {0, 16_000}) >= 10


def _auditor(windows: Windows) -> Auditor:
    resolver = cast("Any", SimpleNamespace(describe=lambda _address: None))
    return Auditor(cast("Any", windows), cast("Any", windows), None, resolver)
