"""A client for etcd whose store is a dict."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from lazymesh.kvstore.model import ClientInfo, KeyValue, ReadResult, Values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazymesh.errors import KvstoreError
    from lazymesh.kvstore.requests import Reads


class FakeWatches(dict[int, Any]):
    """Watches by id."""

    def add(self, key: bytes, listener: object, start: int, **_: object) -> int:
        """Remember one."""
        self[len(self) + 1] = (key, listener, start)
        return len(self)

    def remove(self, watch_id: int) -> None:
        """Forget one."""
        self.pop(watch_id, None)


class FakeClient:
    """A store of a dict; ``error`` fails every read."""

    def __init__(self, *_: object) -> None:
        self.data: dict[bytes, bytes] = {}
        self.error: KvstoreError | None = None
        self.watches = FakeWatches()
        self.asked: Reads | None = None
        self.epoch = 0
        self.last_error: str | None = None
        self.on_crash: object = None

    @property
    def info(self) -> ClientInfo:
        """Say whether it is reached: while ``last_error`` is set, it is not."""
        endpoint = None if self.last_error else "http://x:1"
        return ClientInfo(endpoint, 7, 7, 0, self.last_error)

    def read_soon(self, reads: Reads, timeout: float, on_done: Any) -> None:
        """Read, and answer a moment later."""
        self.asked = reads
        within = [prefix + name for one in reads.whole for name in one.names for prefix in one.prefixes]
        values = Values(7, tuple(map(self.data.get, [*within, *reads.keys])))
        asyncio.get_running_loop().call_soon(on_done, self.error or values)

    async def read_many(self, keys: Sequence[bytes], _timeout: float = 0) -> ReadResult:
        """Read."""
        if self.error:
            raise self.error
        return self._read(keys)

    def _read(self, keys: Sequence[bytes]) -> ReadResult:
        found = [KeyValue(key, self.data[key], 3, 0) if key in self.data else None for key in keys]
        return ReadResult(7, found)

    async def get(self, key: bytes) -> KeyValue | None:
        """Read one."""
        return (await self.read_many([key])).values[0]

    def add_listener(self, listener: object) -> None:
        """Nobody is told."""

    def remove_listener(self, listener: object) -> None:
        """Nobody was told."""

    async def wait_connected(self) -> None:
        """Never be, so that nobody lists anything."""
        await asyncio.Event().wait()

    async def __aenter__(self) -> FakeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""
