"""The client of one store: reads, listings, writes, leases and watches, each of them one call or one stream.

It combines a supervisor, which keeps the connection, and a hub, which keeps the watches. Nothing is retried here:
the caller knows best whether the answer is still needed. Every failure is a KvstoreError with a one-line message.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self, TypeVar

from lazymesh.errors import KvstoreError
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore import requests, rpc
from lazymesh.kvstore.hub import WatchHub
from lazymesh.kvstore.model import KeyValue, Page, ReadResult, Values
from lazymesh.kvstore.supervisor import Options, Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from lazymesh.kvstore.config import EtcdConfig
    from lazymesh.kvstore.connection import Connection
    from lazymesh.kvstore.model import ClientEvent, ClientInfo

Request = TypeVar("Request")
Response = TypeVar("Response", bound=rpc.Answer)

TIMEOUT_S = 10.0
"""Default timeout of one call."""


class EtcdClient:
    """``async with EtcdClient(config) as client``; it stays connected, or tries to, for as long as the block lasts."""

    def __init__(self, config: EtcdConfig, options: Options | None = None) -> None:
        options = options or Options()
        self._supervisor = Supervisor(config, options)
        self.watches = WatchHub(self._supervisor, options)
        self._tasks: list[asyncio.Task[None]] = []
        self._reads: set[asyncio.Task[Values]] = set()
        self.on_crash: Callable[[BaseException], None] | None = None
        """Called with the bug that has ended one of the client's tasks: nothing more comes from this client."""

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._supervisor.run(), name="etcd supervisor"),
            asyncio.create_task(self.watches.run(), name="etcd watches"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._report_crash)
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._tasks, *self._reads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def info(self) -> ClientInfo:
        """State of this store and of the connection to it."""
        return self._supervisor.info

    @property
    def epoch(self) -> int:
        """Revisions read in different epochs must not be compared."""
        return self._supervisor.epoch

    def add_listener(self, listener: Callable[[ClientEvent], None]) -> None:
        """Report connects and disconnects; watches that they end are reported before them."""
        self._supervisor.listeners.append(listener)

    def remove_listener(self, listener: Callable[[ClientEvent], None]) -> None:
        """Undo :meth:`add_listener`."""
        self._supervisor.listeners.remove(listener)

    async def wait_connected(self) -> None:
        """Wait until the store answers, however long it takes."""
        await self._supervisor.wait_connected()

    async def read_many(self, keys: Sequence[bytes], timeout_s: float = TIMEOUT_S) -> ReadResult:
        """Read up to 128 keys at one revision, in one round trip. If one key is refused, all of them fail."""
        connection = await self._supervisor.connection(timeout_s)
        answer = await self._call_on(connection, _read_call(requests.Reads(keys), timeout_s))
        return requests.read_result(answer, len(keys))

    def read_soon(
        self, reads: requests.Reads, timeout_s: float, on_done: Callable[[Values | KvstoreError], None]
    ) -> None:
        """Read up to 128 keys and prefixes at one revision; while there is a connection, without creating a task.

        on_done is always called. KvstoreError (exhausted): there are too many keys below a prefix.
        """
        connection = self._supervisor.present
        if connection is None:
            task = asyncio.create_task(self._read_values(reads, timeout_s))
            self._reads.add(task)
            task.add_done_callback(self._reads.discard)
            task.add_done_callback(lambda ended: on_done(_outcome_of(ended)))
            return

        def done(outcome: pb.TxnResponse | pb.RangeResponse | KvstoreError) -> None:
            if isinstance(outcome, KvstoreError):
                self._suspect(connection, outcome)
                on_done(outcome)
                return
            try:
                values = requests.values_of(outcome, reads)
            except KvstoreError as exc:
                on_done(exc)
            else:
                on_done(values)

        connection.start(_read_call(reads, timeout_s), done)

    async def _read_values(self, reads: requests.Reads, timeout_s: float) -> Values:
        connection = await self._supervisor.connection(timeout_s)
        return requests.values_of(await self._call_on(connection, _read_call(reads, timeout_s)), reads)

    async def get(self, key: bytes, timeout_s: float = TIMEOUT_S) -> KeyValue | None:
        """Read one key; None if it does not exist."""
        return (await self.read_many([key], timeout_s)).values[0]

    async def get_prefix(self, prefix: bytes) -> list[KeyValue]:
        """Read all keys of a prefix, at one revision; for prefixes known to be small."""
        async with aclosing(self.list_prefix(prefix)) as pages:
            return [item async for page in pages for item in page.items]

    async def list_prefix(
        self, prefix: bytes, page: int = 1_000, timeout_s: float = TIMEOUT_S
    ) -> AsyncGenerator[Page, None]:
        """Read all keys of a prefix at one revision, page by page, in key order; at least one page comes.

        Where values are so large that a page would be refused, pages are made smaller for a while.
        """
        connection = await self._supervisor.connection(timeout_s)
        epoch, revision, most = self.epoch, 0, page
        after: bytes | None = None
        while True:
            request = requests.read_page(prefix, after, revision, page)
            # All pages over one connection: each replica has its own revisions.
            call = rpc.Call(rpc.RANGE, request, timeout_s, lambda: f"list {_text(prefix)}*")
            try:
                answer = await self._call_on(connection, call)
            except KvstoreError as exc:
                if exc.kind != "exhausted" or page == 1:
                    raise
                page = max(1, page // 8)
                continue
            page = min(most, 2 * page)
            # Even an answer at a pinned revision has the current one in its header.
            revision = revision or answer.header.revision
            yield Page(revision, epoch, [requests.key_value(kv) for kv in answer.kvs])
            after = requests.next_page(answer, after)
            if after is None:
                return

    async def put(self, key: bytes, value: bytes, lease: int = 0, timeout_s: float = TIMEOUT_S) -> int:
        """Write one key, bound to a lease if one is given, and return the store's revision."""
        request = pb.PutRequest(key=key, value=value, lease=lease)
        response = await self._call(rpc.PUT, request, timeout_s, lambda: f"write {_text(key)}")
        return response.header.revision

    async def delete(self, key: bytes, *, prefix: bool = False, timeout_s: float = TIMEOUT_S) -> int:
        """Delete a key, or all keys with this prefix, and return how many there were."""
        end = requests.prefix_end(key) if prefix else b""
        request = pb.DeleteRangeRequest(key=key, range_end=end)
        response = await self._call(rpc.DELETE_RANGE, request, timeout_s, lambda: f"delete {_text(key)}")
        return response.deleted

    async def write_many(
        self, writes: Sequence[tuple[bytes, bytes | None]], lease: int = 0, timeout_s: float = TIMEOUT_S
    ) -> int:
        """Put up to 128 keys (delete those with value None) in one transaction; return its revision."""
        request = requests.write_batch(writes, lease)
        keys = [key for key, _ in writes]
        response = await self._call(rpc.TXN, request, timeout_s, lambda: f"write {_names(keys)}")
        return response.header.revision

    async def status(self, timeout_s: float = TIMEOUT_S) -> ClientInfo:
        """Ask the server for its status and return the client's state after the answer."""
        connection = await self._supervisor.connection(timeout_s)
        call = rpc.Call(rpc.STATUS, pb.StatusRequest(), timeout_s, lambda: "get the status")
        await self._call_on(connection, call)
        return self.info

    async def grant_lease(self, ttl_s: int, timeout_s: float = TIMEOUT_S) -> int:
        """Return the id of a new lease; its keys are deleted when it is not kept alive (lease.py)."""
        request = pb.LeaseGrantRequest(TTL=ttl_s)
        return (await self._call(rpc.LEASE_GRANT, request, timeout_s, lambda: "get a lease")).ID

    async def renew_lease(self, lease: int, timeout_s: float = TIMEOUT_S) -> int:
        """Renew a lease and return its remaining seconds; 0: expired, its keys are gone."""
        connection = await self._supervisor.connection(timeout_s)
        what = f"keep lease {lease:x} alive"
        answers = connection.stream(
            rpc.LEASE_KEEP_ALIVE, rpc.Outbox(pb.LeaseKeepAliveRequest(ID=lease)), lambda: what
        )
        try:
            async with asyncio.timeout(timeout_s), aclosing(answers):
                return (await anext(answers)).TTL
        except TimeoutError as exc:
            self._supervisor.suspect(connection)
            raise connection.peer.error("timeout", what, f"no answer within {timeout_s:g} s") from exc

    async def revoke_lease(self, lease: int, timeout_s: float = TIMEOUT_S) -> None:
        """Revoke a lease; all keys written with it are deleted."""
        request = pb.LeaseRevokeRequest(ID=lease)
        await self._call(rpc.LEASE_REVOKE, request, timeout_s, lambda: f"revoke lease {lease:x}")

    async def _call(
        self,
        method: rpc.Method[Request, Response],
        request: Request,
        timeout_s: float,
        what: Callable[[], str],
    ) -> Response:
        connection = await self._supervisor.connection(timeout_s)
        return await self._call_on(connection, rpc.Call(method, request, timeout_s, what))

    async def _call_on(self, connection: Connection, call: rpc.Call[Request, Response]) -> Response:
        try:
            return await connection.call(call)
        except KvstoreError as exc:
            self._suspect(connection, exc)
            raise

    def _suspect(self, connection: Connection, error: KvstoreError) -> None:
        if error.kind in ("timeout", "unavailable"):
            self._supervisor.suspect(connection)

    def _report_crash(self, task: asyncio.Task[None]) -> None:
        """Report the crash of a background task: nothing awaits it, and without it the client goes silent."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self.on_crash is not None:
            self.on_crash(error)
        else:
            task.get_loop().call_exception_handler(
                {"message": f"{task.get_name()} crashed", "exception": error}
            )


def _read_call(reads: requests.Reads, timeout_s: float) -> rpc.Call[Any, Any]:
    def what() -> str:
        return f"read {_names([*(prefix + b'*' for prefix in reads.prefixes), *reads.keys])}"

    if len(reads.keys) == 1 and not reads.whole:
        return rpc.Call(rpc.RANGE, requests.read_one(reads.keys[0]), timeout_s, what)
    return rpc.Call(rpc.READ_MANY, reads, timeout_s, what)


def _outcome_of(task: asyncio.Task[Values]) -> Values | KvstoreError:
    if task.cancelled():
        return KvstoreError("the client was closed")
    error = task.exception()
    if error is None:
        return task.result()
    return error if isinstance(error, KvstoreError) else KvstoreError(f"{type(error).__name__}: {error}")


def _text(key: bytes) -> str:
    return key.decode(errors="replace")


def _names(keys: Sequence[bytes]) -> str:
    return _text(keys[0]) + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
