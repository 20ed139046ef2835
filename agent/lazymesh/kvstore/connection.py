"""One connection: one channel to one endpoint, from reading its TLS files until its first failure.

A connection never heals: a channel that reconnects by itself would keep outdated certificates, and could end up at
another replica with another etcd behind the same name. The client decides when to make the next one and tells its
listeners. A connection knows which store it is connected to, as which user, and how to log in again when a token has
expired.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.message import DecodeError
from msgspec import structs

from lazymesh.errors import KvstoreError
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore import requests, rpc
from lazymesh.kvstore.certificate import certificate_facts, handshake_failure
from lazymesh.kvstore.channel import Code, RpcError, UnaryCall
from lazymesh.kvstore.failures import Peer, is_stale_auth
from lazymesh.kvstore.native import NativeChannel
from lazymesh.kvstore.transport import TlsFiles, Transport, read_tls_files

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from lazymesh.kvstore.channel import Channel, Metadata
    from lazymesh.kvstore.config import Endpoint, EtcdConfig

Request = TypeVar("Request")
Response = TypeVar("Response", bound=rpc.Answer)
Outcome = TypeVar("Outcome")


class Connection:
    """See the module's docstring; made by :func:`dial`."""

    def __init__(self, endpoint: Endpoint, config: EtcdConfig, transport: Transport) -> None:
        self.endpoint = endpoint
        self.cluster_id = 0
        self.revision = 0
        """Highest store revision seen."""
        self._answered = 0
        """Highest one in an answer to a call. A watch may be ahead of it: etcd tells watches of a write just before it
        shows the write to reads (mvcc's watchableStoreTxnWrite.End), and a busy server pauses in between."""
        self.version = ""
        self.heard_at = time.monotonic()
        """When the server last gave a sign of life."""
        self.failure: KvstoreError | None = None
        """Why the connection has failed; None while it has not."""
        self.login_at: float | None = None
        """When the current token was obtained; None without a password."""
        self.on_down: Callable[[KvstoreError], None] | None = None
        """Called once, when the connection fails by itself."""
        self._config = config
        self._timeout_s = transport.dial_timeout_s
        self.login: Metadata = ()
        """The metadata of each call: empty, or the token of a password login. Pass it to :meth:`renew_login` when
        it is refused."""
        self._renewal: asyncio.Task[None] | None = None
        """The login under way."""
        tls = read_tls_files(config) if config.tls else None
        self.peer = Peer(str(endpoint), _who(config, tls.cert if tls else None))
        self._channel = make_channel(endpoint, config, tls, transport)
        self._channel.on_lost = self._lose

    async def open(self) -> None:
        """Log in, and learn which store this is and its revision; KvstoreError says why that fails."""
        try:
            try:
                await self._channel.open(self._timeout_s)
            except RpcError as exc:
                raise self.peer.translate(exc, "connect") from exc
            if self._config.username:
                await self._authenticate()
            await self.ping(self._timeout_s)
        except KvstoreError as exc:
            if self._config.tls and exc.kind in ("unavailable", "timeout"):
                tls = await handshake_failure(self.endpoint, self._config, self._timeout_s)
                if tls:
                    raise self.peer.error("certificate", "connect", tls.reason, tls.advice) from exc
            raise

    async def close(self) -> None:
        """Close the connection; calls in flight fail with its ``failure``."""
        self.on_down = None
        self.fail(KvstoreError(f"etcd {self.endpoint}: the client was closed"))
        await self._channel.close()

    def fail(self, error: KvstoreError) -> None:
        """Mark the connection as failed; the first reason is kept."""
        if self.failure is None:
            self.failure = error
            if self.on_down:
                self.on_down(error)

    def start(
        self, call: rpc.Call[Request, Response], on_done: Callable[[Response | KvstoreError], None]
    ) -> Callable[[], object]:
        """Start a unary call; return a function that abandons it. on_done gets the outcome: once, later, if at all."""
        login, floor = self.login, self._answered
        again: asyncio.Task[Response | KvstoreError] | None = None

        def done(outcome: bytes | RpcError) -> None:
            nonlocal again
            if isinstance(outcome, RpcError) and is_stale_auth(outcome):
                again = asyncio.create_task(self._again(call, login, floor))
                again.add_done_callback(lambda ended: None if ended.cancelled() else on_done(ended.result()))
            else:
                on_done(self._outcome(call, outcome, floor))

        give_up = self._send(call, login, done)
        return lambda: again.cancel() if again else give_up()

    async def call(self, call: rpc.Call[Request, Response]) -> Response:
        """Make one unary call and return its response; KvstoreError if it fails."""
        pending = _Pending[Response | KvstoreError]()
        outcome = await pending.wait(self.start(call, pending.settle))
        if isinstance(outcome, KvstoreError):
            try:
                raise outcome
            finally:
                del outcome, pending  # the error holds this frame
        return outcome

    async def stream(
        self, method: rpc.Method[Request, Response], requests: rpc.Outbox[Request], what: Callable[[], str]
    ) -> AsyncGenerator[Response, None]:
        """Open a stream; it ends only by KvstoreError or when the caller leaves it."""
        self.check_up()
        floor = self._answered
        # Otherwise a member cut off from its leader would keep its watches open and silent.
        metadata = (*self.login, ("hasleader", "true"))
        encoded = (method.encode(request) async for request in requests)
        try:
            async with aclosing(self._channel.stream(method.path, encoded, metadata)) as responses:
                async for raw in responses:
                    response = self._decoded(method, raw)
                    self._observe(response.header, floor)
                    yield response
        except RpcError as exc:
            self.check_up()
            raise self.peer.translate(exc, what()) from exc
        finally:
            requests.close()
        raise self.peer.error("unavailable", what(), "the server ended the stream")

    async def ping(self, timeout_s: float) -> None:
        """Ask for the server's status, the one call that every user is allowed to make."""
        response = await self.call(rpc.Call(rpc.STATUS, pb.StatusRequest(), timeout_s, lambda: "connect"))
        self.version = response.version

    async def catch_up(self) -> None:
        """Make the member catch up with its cluster; KvstoreError if it is cut off from it."""
        call = rpc.Call(rpc.RANGE, requests.read_agreed(), self._timeout_s, lambda: "connect")
        try:
            await self.call(call)
        except KvstoreError as exc:
            # We may not be allowed to read the key; etcd checks that only after the round of consensus.
            if exc.kind != "permission":
                raise
        await self.ping(self._timeout_s)

    async def renew_login(self, refused: Metadata) -> None:
        """Get a new token, if we log in by password and no other call has got one since.

        All who need one at the same moment share one attempt and its outcome.
        """
        if not self._config.username or self.login is not refused:
            return
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._authenticate(), name="etcd login")
            self._renewal.add_done_callback(self._renewed)
        try:
            await asyncio.shield(self._renewal)
        except KvstoreError as exc:
            raise KvstoreError(str(exc), exc.kind) from None  # a copy, as in _down

    def _renewed(self, task: asyncio.Task[None]) -> None:
        self._renewal = None
        if not task.cancelled():
            task.exception()  # mark as retrieved: those who waited may all have left

    def check_channel(self) -> None:
        """Fail if no more calls can be made over the channel."""
        if reason := self._channel.lost:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        self.fail(self.peer.error("unavailable", "go on", reason))

    def _observe(self, header: pb.ResponseHeader, floor: int) -> None:
        """Process a response's header; KvstoreError if it comes from another store.

        ``floor`` is the revision of an answer that was there when the request was sent, or the stream opened. Answers
        overtake each other, so only one below it indicates a store that went back; the next connect finds out for
        certain.
        """
        self.heard_at = time.monotonic()
        revision, cluster_id = header.revision, header.cluster_id
        self.revision = max(self.revision, revision)
        self.cluster_id = self.cluster_id or cluster_id
        # The end of a compacted watch carries revision 0.
        if cluster_id != self.cluster_id or 0 < revision < floor:
            reason, advice = "another store answers there", "everything is read again"
            self.fail(self.peer.error("unavailable", "go on", reason, advice))
            self.check_up()

    async def _authenticate(self) -> None:
        request = pb.AuthenticateRequest(
            name=self._config.username or "", password=self._config.password or ""
        )
        what = f"log in with the password of {self._config.source}"
        call = rpc.Call(rpc.AUTHENTICATE, request, self._timeout_s, lambda: what)
        # Without a token: with an expired one etcd refuses even a login.
        pending = _Pending[bytes | RpcError]()
        raw = await pending.wait(self._send(call, (), pending.settle))
        try:
            response = self._decoded(call.method, raw)
        except RpcError as exc:
            raise self.peer.translate(exc, what) from exc
        self.login = (("token", response.token),)
        self.login_at = time.monotonic()

    async def _again(
        self, call: rpc.Call[Request, Response], refused: Metadata, floor: int
    ) -> Response | KvstoreError:
        """Repeat a call after a new login; both together take no longer than the call may."""
        deadline = time.monotonic() + call.timeout_s
        try:
            async with asyncio.timeout(call.timeout_s):
                await self.renew_login(refused)
        except TimeoutError:
            return self.peer.error("timeout", call.what(), f"no new login within {call.timeout_s:g} s")
        except KvstoreError as exc:
            return exc
        pending = _Pending[bytes | RpcError]()
        left = structs.replace(call, timeout_s=max(0.001, deadline - time.monotonic()))
        raw = await pending.wait(self._send(left, self.login, pending.settle))
        return self._outcome(call, raw, floor)

    def _send(
        self, call: rpc.Call[Any, Any], login: Metadata, on_done: Callable[[bytes | RpcError], None]
    ) -> Callable[[], None]:
        message = call.method.encode(call.request)
        return self._channel.call(UnaryCall(call.method.path, message, login, call.timeout_s), on_done)

    def _outcome(
        self, call: rpc.Call[Request, Response], raw: bytes | RpcError, floor: int
    ) -> Response | KvstoreError:
        """Return the response or the error."""
        try:
            response = self._decoded(call.method, raw)
            self._observe(response.header, floor)
            self._answered = max(self._answered, response.header.revision)
        except RpcError as exc:
            error = self._down() or self.peer.translate(exc, call.what())
            # Without its traceback, which holds this frame, which holds the error.
            error.__cause__ = exc.with_traceback(None)
            return error
        except KvstoreError as exc:
            return exc
        return response

    def _decoded(self, method: rpc.Method[Request, Response], raw: bytes | RpcError) -> Response:
        if isinstance(raw, RpcError):
            raise raw
        try:
            return method.decode(raw)
        except DecodeError as exc:
            raise RpcError(Code.INTERNAL, f"a response to {method.path} that cannot be decoded") from exc

    def _down(self) -> KvstoreError | None:
        """Return why the connection has failed: a copy, as a shared exception would collect every traceback."""
        return KvstoreError(str(self.failure), self.failure.kind) if self.failure else None

    def check_up(self) -> None:
        """Raise the reason if the connection has failed."""
        if error := self._down():
            raise error


class _Pending(Generic[Outcome]):
    """The future of an outcome that arrives by callback."""

    def __init__(self) -> None:
        self._future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def settle(self, outcome: Outcome) -> None:
        """Take the outcome."""
        if not self._future.done():
            self._future.set_result(outcome)

    async def wait(self, give_up: Callable[[], object]) -> Outcome:
        """Return the outcome; a cancelled waiter abandons the call."""
        try:
            return await self._future
        except asyncio.CancelledError:
            give_up()
            raise


def _who(config: EtcdConfig, cert: bytes | None) -> str:
    """Return in words as whom we are known to etcd."""
    facts = certificate_facts(cert) if cert else None
    expired = facts is not None and facts.not_after.timestamp() < time.time()
    if config.username:
        return f"user {config.username!r}" + (" (whose certificate has expired)" if expired else "")
    if facts is None:
        return "no user"
    return f"user {facts.common_name!r} (the certificate's common name{', expired' if expired else ''})"


def make_channel(
    endpoint: Endpoint, config: EtcdConfig, tls: TlsFiles | None, transport: Transport
) -> Channel:
    """Return a channel that is not open yet; ``tls`` None: without TLS."""
    if transport.kind == "native":
        return NativeChannel(endpoint, config, transport.max_message_bytes)
    from lazymesh.kvstore.grpcio import GrpcioChannel  # noqa: PLC0415 (20 MB, rarely needed)

    return GrpcioChannel(endpoint, tls, transport)


async def dial(endpoint: Endpoint, config: EtcdConfig, transport: Transport) -> Connection:
    """Return an open connection; KvstoreError says why that failed."""
    connection = Connection(endpoint, config, transport)
    try:
        await connection.open()
    except BaseException:
        await connection.close()
        raise
    return connection
