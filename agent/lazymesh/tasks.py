"""Coroutines that run and end together, and long work that must leave time for others."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")

PIECE = 32
"""Most items that are worked on at once."""
SPELL_S = 0.002
"""Others wait for this long, unless a single item takes longer."""


async def together(*parts: Coroutine[Any, Any, Any]) -> None:
    """Run all parts until the first one ends, then cancel the others; raise its error if it failed."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wait(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, at most this long; clear it, and tell whether it came."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    came = event.is_set()
    event.clear()
    return came


async def to_its_end(work: asyncio.Future[Result], cancel: Callable[[], object] | None = None) -> Result:
    """Return a future's result; when cancelled, however often, end only after it has ended.

    cancel: called once in that case, to end it sooner.
    """
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as exc:
            if cancelled is None and cancel is not None:
                cancel()
            cancelled = exc
    if cancelled is None:
        return work.result()
    if not work.cancelled():
        work.exception()  # nobody will ask for it any more, and that is no reason to report it
    raise cancelled


async def in_thread(function: Callable[[], Result]) -> Result:
    """Run in a thread what the kernel may keep waiting; when cancelled, end only after it has ended.

    So it may use what its caller closes.
    """
    return await to_its_end(asyncio.ensure_future(asyncio.to_thread(function)))


async def take_turns(steps: Iterator[None], seconds: float = math.inf) -> None:
    """Go through the steps, at most this long, and let others run in between; what is left stays in the iterator."""
    until = time.monotonic() + seconds
    for _ in steps:
        await asyncio.sleep(0)
        if time.monotonic() > until:
            return


class FairShare:
    """Keeps long work from taking all of the event loop's time, for which packets of other clusters wait, too.

    The work is done in pieces, and each spell of it is followed by a pause as long as the spell. A piece is as large as
    the last one's time allows: one node's record may take a hundred times as long as another's.
    """

    def __init__(self) -> None:
        self._worked = 0.0
        self._size = 1

    async def work(self, items: Sequence[Item], take: Callable[[Sequence[Item]], object]) -> None:
        """Pass the items on, piece by piece; work shorter than a spell counts towards the next one."""
        at = 0
        while at < len(items):
            piece = items[at : at + self._size]
            at += len(piece)
            began = time.monotonic()
            take(piece)
            took = time.monotonic() - began
            self._size = max(1, min(PIECE, int(len(piece) * SPELL_S / took))) if took else PIECE
            self._worked += took
            if self._worked >= SPELL_S:
                pause, self._worked = self._worked, 0.0
                await asyncio.sleep(pause)
