"""gRPC over HTTP/2 on our own event loop: asyncio moves wire.py's bytes over one socket, without threads.

The transport of the miss path: a call costs two system calls and no hop between threads. Large buffers are allocated
once (BufferedProtocol), because asyncio's streams map a new one for each read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from msgspec import field

from lazymesh.kvstore.certificate import client_context
from lazymesh.kvstore.channel import Code, RpcError
from lazymesh.kvstore.tls import TlsStream
from lazymesh.kvstore.wire import Exchange, ProtocolError, Wire, request_head

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from lazymesh.kvstore.channel import Metadata, UnaryCall
    from lazymesh.kvstore.config import Endpoint, EtcdConfig

BUFFER = 64 << 10
SWEEP_S = 0.05
"""Interval of the check for timeouts while calls are in flight: a timer per call would be a tenth of a call's work."""
PONG_S = 0.25
"""The answer to a ping waits this long. Go's server measures its bandwidth by a ping at every response that comes while
none is unanswered, so a prompt answer makes of each call two, for both sides; keepalive waits for seconds."""


class _Unary(Exchange, eq=False, kw_only=True):
    """A call with one request and one response, which is its outcome."""

    calls: set[_Unary]
    """Those that the server has not ended."""
    timeout_s: float
    on_done: Callable[[bytes | RpcError], None]
    answered: bool = False
    deadline: float = 0.0

    def on_message(self, message: bytes | RpcError) -> None:
        """Take the response, or why there is none; only the first counts."""
        if not self.answered:
            self.answered = True
            self.on_done(message)

    def on_end(self, code: Code, details: str) -> None:
        """Take the status, which is the outcome if there was no response."""
        self.calls.discard(self)
        if code is Code.OK:
            code, details = Code.INTERNAL, "no response to a request"
        self.on_message(RpcError(code, details))

    def expire(self) -> None:
        """Take note that there is no response in time."""
        self.on_message(RpcError(Code.DEADLINE_EXCEEDED, f"no answer within {self.timeout_s:g} s"))


class _Streamed(Exchange, eq=False, kw_only=True):
    """A call with many requests and responses, which wait here."""

    wire: Wire
    items: asyncio.Queue[bytes | RpcError] = field(default_factory=asyncio.Queue)
    """The responses, then how the call ended."""

    def on_message(self, message: bytes) -> None:
        """Queue a response; the server gets no credit for it yet."""
        self.wire.withhold(self, len(message))
        self.items.put_nowait(message)

    def on_end(self, code: Code, details: str) -> None:
        """Queue the end."""
        self.items.put_nowait(RpcError(code, details))


class NativeChannel(asyncio.BufferedProtocol):
    """A Channel (channel.py) of our own."""

    def __init__(self, endpoint: Endpoint, config: EtcdConfig, max_message_bytes: int) -> None:
        self.on_lost: Callable[[str], None] | None = None
        self._endpoint = endpoint
        self._config = config
        self._wire = Wire(max_message_bytes)
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._tls: TlsStream | None = None
        self._sealed = memoryview(b"")
        """The buffer for received bytes that must be decrypted."""
        self._buffer = memoryview(bytearray(BUFFER))
        self._filled = 0
        self._settled: asyncio.Future[None] = self._loop.create_future()
        """Done when the server has proved that it speaks HTTP/2."""
        self._waiting: deque[tuple[Exchange, bytes, bytes | None]] = deque()
        """Calls beyond the server's limit of concurrent streams."""
        self._flush_due = False
        self._calls: set[_Unary] = set()
        """Unary calls that the server has not ended: after its GOAWAY they may still succeed."""
        self._sweeper: asyncio.TimerHandle | None = None
        """Set while there are calls."""
        self._pong: asyncio.TimerHandle | None = None
        """Set while there are unanswered pings."""
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        self._head = partial(request_head, endpoint.scheme, f"{host}:{endpoint.port}")

    @property
    def lost(self) -> str | None:
        """Why no call can be made any more."""
        return self._wire.closing

    async def open(self, timeout_s: float) -> None:
        """Connect, run the TLS handshake, and wait for the server's first frame."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._config.tls:
                    self.seal_with(TlsStream(client_context(self._config), self._endpoint.host))
                await self._loop.create_connection(
                    lambda: self, self._endpoint.dial_host, self._endpoint.port
                )
                await self._settled
        except TimeoutError as exc:
            raise RpcError(Code.DEADLINE_EXCEEDED, f"no connection within {timeout_s:g} s") from exc
        except OSError as exc:
            raise RpcError(Code.UNAVAILABLE, f"failed to connect: {_words(exc)}") from exc

    def seal_with(self, tls: TlsStream) -> None:
        """Use TLS from the first byte on."""
        self._tls, self._sealed = tls, memoryview(bytearray(BUFFER))

    def call(self, request: UnaryCall, on_done: Callable[[bytes | RpcError], None]) -> Callable[[], None]:
        """Start a call with one request and one response.

        The response is the outcome: a server that fails sends none. Over TLS a third of etcd's trailers, which confirm
        success, arrive about 100 us later; the call stays open for them, but its outcome does not wait.
        """
        call = _Unary(calls=self._calls, timeout_s=request.timeout_s, on_done=on_done)
        head = self._head(request.path, request.metadata, int(request.timeout_s * 1000))
        self._begin(call, head, request.message)
        # After it is sent: a packet waits for that, but not for these.
        self._calls.add(call)
        call.deadline = time.monotonic() + request.timeout_s
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        return lambda: self._give_up(call)

    async def stream(
        self, path: str, requests: AsyncIterator[bytes], metadata: Metadata
    ) -> AsyncGenerator[bytes, None]:
        """Start a call with many requests and responses."""
        exchange = _Streamed(wire=self._wire)
        self._begin(exchange, self._head(path, metadata, None), None)
        sending = asyncio.create_task(self._send(exchange, requests), name=f"requests of {path}")
        try:
            while True:
                item = await exchange.items.get()
                if isinstance(item, RpcError):
                    if item.code is Code.OK:
                        return
                    raise item
                yield item
                self._wire.consumed(exchange, len(item))
                self._flush()
        finally:
            sending.cancel()
            self._leave(exchange)

    async def close(self) -> None:
        """Close the connection."""
        self._end("the connection was closed")

    # --- called by asyncio -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the preface, or begin the TLS handshake."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 (create_connection made it)
        self._transport = transport
        if self._wire.closing:
            transport.abort()
        elif self._tls is None:
            self._flush()
        else:
            self._go_on(self._tls)

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Return the buffer for the next bytes."""
        return self._sealed if self._tls is not None else self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take received bytes."""
        if self._tls is None:
            self._take(nbytes)
        else:
            self._tls.feed(self._sealed[:nbytes])
            self._go_on(self._tls)

    def _go_on(self, tls: TlsStream) -> None:
        """Continue the handshake, and take what can be decrypted."""
        if not tls.established:
            tls.shake_hands()
            self._flush()
        while tls.established and (length := tls.open_into(self._buffer[self._filled :])):
            self._take(length)
        if self._transport is not None and (words := tls.to_send()):  # TLS's own messages
            self._transport.write(words)
        if tls.ended:
            self.connection_lost(tls.error)

    def _take(self, nbytes: int) -> None:
        """Take new plaintext in the buffer."""
        filled = self._filled + nbytes
        try:
            used = self._wire.feed(self._buffer[:filled])
        except ProtocolError as exc:
            self._end(str(exc))
            return
        self._filled = filled - used
        if used and self._filled:
            self._buffer[: self._filled] = bytes(self._buffer[used:filled])
        if self._wire.ready and not self._settled.done():
            self._settled.set_result(None)
        if self._waiting:
            self._admit()
        if self._wire.out:
            self._flush()
        if self._wire.pongs and self._pong is None:
            self._pong = self._loop.call_later(PONG_S, self._answer_pings)
        if self._wire.closing and not self._calls:
            self._end(self._wire.closing)

    def eof_received(self) -> None:
        """Let asyncio close the transport."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail all calls in flight."""
        in_handshake = self._tls is not None and not self._tls.established
        lost = (
            "the connection was lost"
            if self._wire.ready
            else "the server closed the connection: does it expect https?"
        )
        cause = exc or ConnectionResetError() if in_handshake else None
        self._end(f"{lost} ({_words(exc)})" if exc else lost, cause)

    # --- inside -------------------------------------------------------------------------------------------------

    def _begin(self, exchange: Exchange, head: bytes, message: bytes | None) -> None:
        """Begin a call, or queue it while the server's limit of streams is reached."""
        if self._wire.closing or len(self._wire.exchanges) >= self._wire.max_streams:
            self._waiting.append((exchange, head, message))
            if self._wire.closing:
                self._loop.call_soon(self._admit)
            return
        self._wire.begin(exchange, head, message)
        self._flush()

    def _admit(self) -> None:
        """Begin queued calls as far as the server's limit allows."""
        wire = self._wire
        while self._waiting and (wire.closing or len(wire.exchanges) < wire.max_streams):
            exchange, head, message = self._waiting.popleft()
            if exchange.ended:
                continue
            if wire.closing:
                exchange.ended = True
                exchange.on_end(Code.UNAVAILABLE, wire.closing)
            else:
                wire.begin(exchange, head, message)
                self._flush()

    async def _send(self, exchange: Exchange, requests: AsyncIterator[bytes]) -> None:
        async for message in requests:
            if exchange.ended:
                return
            self._wire.send(exchange, message)
            self._flush_soon()  # together with whatever else is to be sent
        if not exchange.ended:
            self._wire.finish(exchange)
            self._flush()

    def _give_up(self, call: _Unary) -> None:
        if call in self._calls:
            self._calls.discard(call)
            self._leave(call)

    def _leave(self, exchange: Exchange) -> None:
        if exchange.stream:
            self._wire.cancel(exchange)
            self._flush()
        exchange.ended = True
        self._admit()

    def _sweep(self) -> None:
        """Expire calls."""
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep) if self._calls else None
        now = time.monotonic()
        for late in [call for call in self._calls if call.deadline <= now]:
            if late in self._calls:  # else it was abandoned when another one was told
                self._give_up(late)
                late.expire()

    def _answer_pings(self) -> None:
        self._pong = None
        self._wire.out += self._wire.pongs
        self._wire.pongs.clear()
        self._flush()

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        wire = self._wire
        if not wire.out or self._transport is None:
            return
        tls = self._tls
        if tls is not None and (tls.ended or not tls.established):
            return  # encrypted later, or never: the end is reported after the answers before it
        out = wire.out[0] if len(wire.out) == 1 else b"".join(wire.out)
        wire.out.clear()
        if tls is not None:
            out = tls.seal(out)
        self._transport.write(out)

    def _end(self, reason: str, cause: Exception | None = None) -> None:
        """End the connection: calls in flight fail for this reason, or an earlier one; ``open`` fails by the cause."""
        self._wire.fail(Code.UNAVAILABLE, reason)
        if not self._settled.done():
            self._settled.set_exception(cause or RpcError(Code.UNAVAILABLE, reason))
            self._settled.exception()  # mark as retrieved: there may be no waiter any more
        self._admit()
        for timer in (self._sweeper, self._pong):
            if timer is not None:
                timer.cancel()
        self._sweeper = self._pong = None
        transport, self._transport = self._transport, None
        if transport is not None:
            with contextlib.suppress(RuntimeError):
                transport.abort()
        lost, self.on_lost = self.on_lost, None
        if lost is not None:
            lost(self._wire.closing or reason)


def _words(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError):  # its errno is OpenSSL's, not the system's
        return (exc.reason or "the server ended the TLS session").replace("_", " ").lower()
    if isinstance(exc, OSError) and exc.errno and exc.errno > 0:
        return os.strerror(exc.errno)
    return str(exc) or "the server ended the TLS handshake"
