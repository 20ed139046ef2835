"""Coroutines that belong together: they run at once, and end at once; and those that must not take all the time."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

Item = TypeVar("Item")

PIECE = 32
SPELL_S = 0.002


async def together(*parts: Coroutine[Any, Any, Any]) -> None:
    """Run all parts until the first one ends, then cancel the others; if it failed, its error is raised."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class FairShare:
    """Keeps long work from taking all of the event loop's time: packets of other clusters wait for it, too.

    It is done in pieces, and after every spell of it comes a pause that is as long.
    """

    def __init__(self) -> None:
        self._worked = 0.0

    async def work(self, items: Sequence[Item], take: Callable[[Sequence[Item]], object]) -> None:
        """Have the items taken, piece by piece; what is short leaves no trace but in the next spell."""
        for at in range(0, len(items), PIECE):
            began = time.monotonic()
            take(items[at : at + PIECE])
            self._worked += time.monotonic() - began
            if self._worked >= SPELL_S:
                pause, self._worked = self._worked, 0.0
                await asyncio.sleep(pause)
