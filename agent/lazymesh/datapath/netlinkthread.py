"""Netlink in a thread of its own, because the kernel makes whoever asks about interfaces wait for a lock (RTNL).

Others hold that lock for 100 ms and more: many interfaces go at once, or a driver waits for its hardware. Packets that
miss must be answered meanwhile, so the agent's event loop never asks by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any, Self, TypeVar

from lazymesh.tasks import in_thread, to_its_end

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


class NetlinkThread:
    """An event loop in a thread. Use it with ``async with``."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        callers = asyncio.get_running_loop()

        def report(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            callers.call_soon_threadsafe(callers.call_exception_handler, context)

        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(report)
        self._thread = threading.Thread(target=self._loop.run_forever, name="netlink", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            await self.run(self._stack.aclose())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            await in_thread(self._thread.join)
            self._loop.close()

    async def enter(self, context: contextlib.AbstractAsyncContextManager[T]) -> T:
        """Enter an asynchronous context in the thread; it is left there when the thread ends."""
        return await self.run(self._stack.enter_async_context(context))

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread, and return what it returns; when cancelled, end only after it has ended."""
        callers = asyncio.get_running_loop()
        ended: asyncio.Future[asyncio.Task[T]] = callers.create_future()
        started: list[asyncio.Task[T]] = []

        def start() -> None:
            task = self._loop.create_task(coroutine)
            started.append(task)
            task.add_done_callback(end)

        def end(task: asyncio.Task[T]) -> None:
            if not task.cancelled():
                task.exception()  # a caller that was cancelled does not ask, and that is no reason to report it
            callers.call_soon_threadsafe(ended.set_result, task)

        def cancel() -> None:
            self._loop.call_soon_threadsafe(lambda: started[0].cancel())  # noqa: PLW0108 (it starts only now)

        self._loop.call_soon_threadsafe(start)
        return (await to_its_end(ended, cancel)).result()
