"""Parts that end together."""

from __future__ import annotations

import asyncio

import pytest

from lazymesh.tasks import together


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
