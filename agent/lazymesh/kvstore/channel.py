"""What a connection needs of whatever carries gRPC to one server: calls, streams, and word of the end.

Two things do: native.py, HTTP/2 on our own event loop, and grpcio.py, Google's library, which costs a call twice
the time (its threads hand it to each other) and is kept for whoever needs what only it can do. Both speak bytes;
what they mean is connection.py's business. Which one it is, the user says: ``--etcd-transport``.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

Metadata = tuple[tuple[str, str], ...]
"""Names and values that a call carries beside its message; names in lower case."""


class Code(enum.IntEnum):
    """gRPC's status codes, by the numbers that travel."""

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
    """A call that did not end well: the server's word, or ours when the server has none any more."""

    def __init__(self, code: Code, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class UnaryCall(NamedTuple):
    """One unary call."""

    path: str
    message: bytes
    metadata: Metadata
    timeout_s: float


class Channel(Protocol):
    """One connection's worth of gRPC. No task and no future for a call: this is the miss path."""

    on_lost: Callable[[str], None] | None
    """Called with a reason when the server has gone by itself, if that is noticed at once; see ``lost``."""

    @property
    def lost(self) -> str | None:
        """Why no call can be made any more; None while calls can. To be asked now and then."""

    async def open(self, timeout_s: float) -> None:
        """Connect; RpcError when that fails."""

    def call(self, request: UnaryCall, on_done: Callable[[bytes | RpcError], None]) -> Callable[[], None]:
        """Make a call with one request and one response, now; return what gives it up.

        on_done takes the response, or why there is none: once, later, and not after the call was given up.
        """
        ...

    def stream(
        self, path: str, requests: AsyncIterator[bytes], metadata: Metadata
    ) -> AsyncGenerator[bytes, None]:
        """Make a call with many of both; responses come as they are taken. To be closed when left early."""

    async def close(self) -> None:
        """Give everything back; calls under way fail with UNAVAILABLE."""
