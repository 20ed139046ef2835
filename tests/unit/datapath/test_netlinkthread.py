"""Work in the thread for netlink: results, errors, cancellation, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from lazymesh.datapath.netlinkthread import NetlinkThread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def test_work_is_done_in_another_thread_and_the_loop_goes_on() -> None:
    """Whatever the kernel makes it wait for."""

    async def work() -> threading.Thread:
        time.sleep(0.2)  # noqa: ASYNC251 (as a system call would)
        return threading.current_thread()

    turns = 0
    async with NetlinkThread() as netlink:
        running = asyncio.create_task(netlink.run(work()))
        while not running.done():
            turns += 1
            await asyncio.sleep(0.001)
        assert (await running) is not threading.current_thread()
    assert turns > 20


async def test_error_is_the_caller_s() -> None:
    """And the thread goes on."""

    async def failing() -> None:
        await asyncio.sleep(0)
        raise OSError("no such device")

    async with NetlinkThread() as netlink:
        with pytest.raises(OSError, match="no such device"):
            await netlink.run(failing())
        assert await netlink.run(asyncio.sleep(0, "on")) == "on"


@pytest.mark.parametrize(
    "pauses_s",
    [(0,), (0.05,), (0.02, 0.02)],
    ids=["at once", "in the middle", "and again while it tidies up"],
)
async def test_cancelled_work_has_ended_when_its_caller_goes_on(pauses_s: tuple[float, ...]) -> None:
    """What it uses may be closed then; the thread itself goes on.

    Twice: the agent is told to stop while it takes itself apart after a failure.
    """
    steps: list[str] = []

    async def forever() -> None:
        steps.append("began")
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)
            steps.append("tidied")

    async with NetlinkThread() as netlink:
        task = asyncio.create_task(netlink.run(forever()))
        for pause_s in pauses_s:
            await asyncio.sleep(pause_s)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps in ([], ["began", "tidied"])
        assert await netlink.run(asyncio.sleep(0, "on")) == "on"
    assert bool(steps) or pauses_s == (0,)


async def test_contexts_are_left_in_the_thread_that_entered_them() -> None:
    """A socket of netlink belongs to one event loop; the latest goes first."""
    left: list[tuple[str, threading.Thread]] = []

    @contextlib.asynccontextmanager
    async def context(name: str) -> AsyncIterator[threading.Thread]:
        yield threading.current_thread()
        left.append((name, threading.current_thread()))

    async with NetlinkThread() as netlink:
        one, other = [await netlink.enter(context(name)) for name in ("one", "other")]
    assert one is other
    assert left == [("other", one), ("one", one)]
    assert not one.is_alive()


def unexpected() -> list[dict[str, Any]]:
    """Return what the handler of the caller's loop will have been told."""
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: seen.append(context))
    return seen


async def test_unexpected_error_reaches_the_agent_s_handler() -> None:
    """It logs and counts what nobody awaited."""
    seen = unexpected()

    async def work() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await asyncio.sleep(0.01)

    async with NetlinkThread() as netlink:
        await netlink.run(work())
    await asyncio.sleep(0)
    assert [type(context["exception"]) for context in seen] == [ZeroDivisionError]


async def test_error_of_cancelled_work_is_nobody_s() -> None:
    """Such as of a socket that was closed: the end of an agent reports nothing unexpected."""
    seen = unexpected()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("closed")

    async with NetlinkThread() as netlink:
        task = asyncio.create_task(netlink.run(work()))
        await asyncio.sleep(0.02)
        task.cancel()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
        del task
        gc.collect()
        await netlink.run(asyncio.sleep(0))
    await asyncio.sleep(0)
    assert seen == []
