"""A Channel (channel.py) over Google's grpcio: the alternative to native.py, for ``--etcd-transport grpcio``.

Imported only on demand: it costs 20 MB and brings its own threads.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

# grpc's C core writes to stderr, in the middle of a JSON log; our errors say the same.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio

from lazymesh.kvstore.channel import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from lazymesh.kvstore.channel import Metadata, UnaryCall
    from lazymesh.kvstore.config import Endpoint
    from lazymesh.kvstore.transport import TlsFiles, Transport


class GrpcioChannel:
    """One channel to one endpoint; it dials when first used, and never again."""

    def __init__(self, endpoint: Endpoint, tls: TlsFiles | None, transport: Transport) -> None:
        self.on_lost: Callable[[str], None] | None = None
        self._calls: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[bytes]] = set()
        self._closed = False
        options = channel_options(endpoint, transport)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(endpoint.target, options)
        else:
            credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
            self._channel = grpc.aio.secure_channel(endpoint.target, credentials, options)

    @property
    def lost(self) -> str | None:
        """Left to itself, the channel would reconnect at the next call, with outdated certificates."""
        ready = self._channel.get_state() is grpc.ChannelConnectivity.READY
        return None if ready else "the connection was lost"

    async def open(self, timeout_s: float) -> None:
        """Do nothing: the first call connects."""

    def call(self, request: UnaryCall, on_done: Callable[[bytes | RpcError], None]) -> Callable[[], None]:
        """Make a call with one request and one response."""
        given_up = False

        def give_up() -> None:
            nonlocal given_up
            given_up = True
            task.cancel()

        def end(done: asyncio.Task[bytes]) -> None:
            self._tasks.discard(done)
            if given_up:
                return
            if done.cancelled():  # because the channel was closed
                on_done(RpcError(Code.UNAVAILABLE, "the connection was closed"))
            elif isinstance(error := done.exception(), grpc.RpcError):
                on_done(_translate(error))
            else:
                on_done(done.result())

        task = asyncio.create_task(self._unary(request))
        self._tasks.add(task)
        task.add_done_callback(end)
        return give_up

    async def _unary(self, request: UnaryCall) -> bytes:
        multi = self._calls.get(request.path)
        if multi is None:
            multi = self._calls[request.path] = self._channel.unary_unary(request.path)
        response: bytes = await multi(request.message, timeout=request.timeout_s, metadata=request.metadata)
        return response

    async def stream(
        self, path: str, requests: AsyncIterator[bytes], metadata: Metadata
    ) -> AsyncGenerator[bytes, None]:
        """Make a call with many requests and responses."""
        multi: Any = self._channel.stream_stream(path)
        call = multi(requests, metadata=metadata)
        try:
            async for response in call:
                yield response
        except grpc.RpcError as exc:
            raise _translate(exc) from exc
        except asyncio.CancelledError:
            self._raise_unless_cancelled()
            raise
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close the channel."""
        self._closed = True
        await self._channel.close()

    def _raise_unless_cancelled(self) -> None:
        """Distinguish a closed channel, which cancels its calls, from a cancellation of this task."""
        task = asyncio.current_task()
        if self._closed and task is not None and not task.cancelling():
            raise RpcError(Code.UNAVAILABLE, "the connection was closed")


def channel_options(endpoint: Endpoint, transport: Transport) -> list[tuple[str, Any]]:
    """Return grpc's options for a channel to this endpoint."""
    options: list[tuple[str, Any]] = [
        ("grpc.keepalive_time_ms", int(transport.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(transport.keepalive_timeout_s * 1000)),
        # etcd answers pings on an idle connection with GOAWAY; there the supervisor probes.
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", transport.max_message_bytes),
        ("grpc.max_send_message_length", transport.max_message_bytes),
        # A shared subchannel would give a new connection the old one's transport, or its back-off.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        # Half an hour without a call must not look like a lost connection.
        ("grpc.client_idle_timeout_ms", 2**31 - 1),
    ]
    # grpc percent-encodes a literal IPv6 address in the authority, which no certificate contains.
    if endpoint.address or ":" in endpoint.host:
        options.append(("grpc.ssl_target_name_override", endpoint.host))
    return options


def _translate(error: grpc.RpcError) -> RpcError:
    """Convert grpc.aio's error, whose base class declares neither code nor details."""
    if isinstance(error, grpc.aio.AioRpcError):
        return RpcError(Code(error.code().value[0]), error.details() or "")
    return RpcError(Code.UNKNOWN, str(error))
