"""Parts that end together."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazymesh.tasks import PIECE, SPELL_S, FairShare, in_thread, take_turns, together, wait

if TYPE_CHECKING:
    from collections.abc import Sequence


async def test_first_end_is_the_end_of_all() -> None:
    """Who still runs is cancelled, and has the time to tidy up."""
    tidied: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            tidied.append("done")

    async def short() -> None:
        await asyncio.sleep(0)

    await together(forever(), short(), forever())
    assert tidied == ["done", "done"]


async def test_error_of_a_part_is_the_error_of_all() -> None:
    """As it is, in no group."""

    async def failing() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        await together(asyncio.Event().wait(), failing())


async def test_cancelling_reaches_every_part() -> None:
    """And nothing is left running."""
    waiting = asyncio.Event()
    whole = asyncio.create_task(together(waiting.wait(), waiting.wait()))
    await asyncio.sleep(0)
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_thread_is_waited_for_even_when_cancelled() -> None:
    """What it uses may be closed right after."""
    steps: list[str] = []
    started, go_on = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        go_on.wait(5)
        steps.append("worked")

    async def whole() -> None:
        try:
            await in_thread(work)
        finally:
            steps.append("closed")

    task = asyncio.create_task(whole())
    await asyncio.to_thread(started.wait)
    for _ in range(2):  # the second time by whoever does not want to wait for the first
        task.cancel()
        await asyncio.sleep(0.01)
        assert steps == []
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["worked", "closed"]


async def test_thread_s_result_and_error_are_the_caller_s() -> None:
    """As if it had been called."""
    assert await in_thread(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)


async def test_long_work_leaves_others_half_of_the_time() -> None:
    """It is done in pieces, in order, and whoever waits meanwhile gets his turn many times."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    waiting, taken = asyncio.create_task(other()), []

    def take(piece: Sequence[int]) -> None:
        assert len(piece) <= PIECE
        taken.extend(piece)
        until = time.monotonic() + 0.003
        while time.monotonic() < until:
            pass

    began = time.monotonic()
    await FairShare().work(range(10 * PIECE), take)
    waiting.cancel()
    assert taken == list(range(10 * PIECE))
    assert time.monotonic() - began >= 2 * 0.03
    assert turns >= 10


async def test_piece_is_as_large_as_its_time_allows() -> None:
    """One item to begin with; many of those that take no time, one at a time of those that take long."""
    lengths: list[int] = []

    def take(piece: Sequence[float]) -> None:
        lengths.append(len(piece))
        time.sleep(sum(piece))

    await FairShare().work([*[0.0] * 4 * PIECE, *[SPELL_S] * (PIECE + 4)], take)
    assert lengths[0] == 1
    assert max(lengths) == PIECE
    assert lengths[-4:] == [1] * 4


async def test_short_work_is_done_at_once() -> None:
    """No pause, no turn of the loop."""
    taken: list[int] = []
    working = FairShare().work([1, 2], taken.extend)
    with pytest.raises(StopIteration):
        working.send(None)
    assert taken == [1, 2]


async def test_wait_tells_whether_the_event_came_and_clears_it() -> None:
    """So that the next wait is for the next one."""
    event = asyncio.Event()
    event.set()
    assert await wait(event, 5)
    assert not await wait(event, 0.01)


async def test_steps_that_take_too_long_can_be_gone_on_with() -> None:
    """Others run between any two."""
    done: list[int] = []
    steps = (done.append(number) for number in range(5))
    await take_turns(steps, -1)
    assert done == [0]
    await take_turns(steps)
    assert done == [0, 1, 2, 3, 4]
