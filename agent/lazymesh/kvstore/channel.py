"""What a connection needs from a gRPC transport to one server: calls, streams, and notice of its end.

There are two: native.py, HTTP/2 on our own event loop, and grpcio.py, Google's library, which doubles the time of a
call (it is passed between threads) and is kept for those who need what only it can do. Both carry bytes, whose meaning
connection.py knows. The user chooses by ``--etcd-transport``.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

Metadata = tuple[tuple[str, str], ...]
"""Names (in lower case) and values that accompany a call's message."""


class Code(enum.IntEnum):
    """gRPC's status codes, by their numbers on the wire."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class RpcError(Exception):
    """A failed call, as the server reported it, or as we do when the server is gone."""

    def __init__(self, code: Code, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class UnaryCall(Struct, frozen=True):
    """One unary call."""

    path: str
    message: bytes
    metadata: Metadata
    timeout_s: float


class Channel(Protocol):
    """gRPC over one connection. No task and no future per call: this is the miss path."""

    on_lost: Callable[[str], None] | None
    """Called with a reason when the server closes the connection, if that is noticed at once; see ``lost``."""

    @property
    def lost(self) -> str | None:
        """Why no call can be made any more; None while calls can be made. Poll it now and then."""

    async def open(self, timeout_s: float) -> None:
        """Connect; RpcError when that fails."""

    def call(self, request: UnaryCall, on_done: Callable[[bytes | RpcError], None]) -> Callable[[], None]:
        """Start a call with one request and one response; return a function that abandons it.

        on_done receives the response or the error: once, later, and never after the call was abandoned.
        """
        ...

    def stream(
        self, path: str, requests: AsyncIterator[bytes], metadata: Metadata
    ) -> AsyncGenerator[bytes, None]:
        """Start a call with many of both; responses are read as they are consumed. Close it when leaving early."""

    async def close(self) -> None:
        """Release everything; calls in flight fail with UNAVAILABLE."""
