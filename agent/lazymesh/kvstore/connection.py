"""One connection: one channel to one endpoint, from its TLS files being read until it first fails.

A connection never heals: grpc's own reconnecting would keep yesterday's certificates, and could end at
another replica with another etcd behind the same name. The client makes the next one, decides when, and tells
those concerned. This one knows which store it speaks to, who we are there, and how to log in again when a
token has expired.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from lazymesh.errors import KvstoreError
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore import rpc
from lazymesh.kvstore.certificate import certificate_facts, handshake_failure
from lazymesh.kvstore.failures import Peer, is_stale_auth
from lazymesh.kvstore.transport import Transport, open_channel, read_tls_files

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from lazymesh.kvstore.config import Endpoint, EtcdConfig

Request = TypeVar("Request")
Response = TypeVar("Response", bound=rpc.Answer)


Login = tuple[tuple[str, str], ...]
"""Metadata that calls are made with: empty, or the token of a login by password."""


class Connection:
    """See the module's docstring; made by :func:`dial`."""

    def __init__(self, endpoint: Endpoint, config: EtcdConfig, transport: Transport) -> None:
        self.endpoint = endpoint
        self.cluster_id = 0
        self.revision = 0
        """Highest store revision seen."""
        self.version = ""
        self.heard_at = time.monotonic()
        """When the server last gave a sign of life."""
        self.failure: KvstoreError | None = None
        """Why it is down, once it is."""
        self.login_at: float | None = None
        """When the present token was got; None without a password."""
        self.on_down: Callable[[KvstoreError], None] | None = None
        """Called once, when it goes down by itself."""
        self._config = config
        self._timeout_s = transport.dial_timeout_s
        self.login: Login = ()
        """To be handed to :meth:`renew_login` when it is refused."""
        self._logging_in = asyncio.Lock()
        self._calls: dict[str, Any] = {}
        tls = read_tls_files(config) if config.tls else None
        self.peer = Peer(str(endpoint), _who(config, tls.cert if tls else None))
        self._channel = open_channel(endpoint, tls, transport)

    async def open(self) -> None:
        """Log in and ask which store this is, and at what revision; KvstoreError says why that fails."""
        try:
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
        """Give the connection up; calls still under way fail with its ``failure``."""
        self.on_down = None
        self.fail(KvstoreError(f"etcd {self.endpoint}: the client was closed"))
        await self._channel.close()

    def fail(self, error: KvstoreError) -> None:
        """Declare the connection down; the first reason stays."""
        if self.failure is None:
            self.failure = error
            if self.on_down:
                self.on_down(error)

    async def call(
        self,
        method: rpc.Method[Request, Response],
        request: Request,
        timeout_s: float,
        what: Callable[[], str],
    ) -> Response:
        """Make one unary call; ``what`` says, for a message, what could not be done."""
        login, floor = self.login, self.revision
        try:
            response = await self._unary(method, request, timeout_s, login)
        except grpc.RpcError as exc:
            if not is_stale_auth(exc):
                raise self.peer.translate(exc, what()) from exc
            await self.renew_login(login)
            try:
                response = await self._unary(method, request, timeout_s, self.login)
            except grpc.RpcError as again:
                raise self.peer.translate(again, what()) from again
        self._observe(response.header, floor)
        return response

    async def stream(
        self, method: rpc.Method[Request, Response], requests: rpc.Outbox[Request], what: Callable[[], str]
    ) -> AsyncGenerator[Response, None]:
        """Open a stream; it never ends well, only by KvstoreError or by being left."""
        self._check_up()
        floor = self.revision
        multi = self._channel.stream_stream(method.path, method.encode, method.decode)
        # A member cut off from its leader would otherwise keep its watches open and silent.
        call: Any = multi(requests, metadata=(*self.login, ("hasleader", "true")))
        try:
            async for response in call:
                self._observe(response.header, floor)
                yield response
        except grpc.RpcError as exc:
            raise self.peer.translate(exc, what()) from exc
        except asyncio.CancelledError:
            self._raise_failure_unless_cancelled()
            raise
        finally:
            requests.close()
            call.cancel()
        raise self.peer.error("unavailable", what(), "the server ended the stream")

    async def ping(self, timeout_s: float) -> None:
        """Ask for the server's status, the one call that every user may make."""
        response = await self.call(rpc.STATUS, pb.StatusRequest(), timeout_s, lambda: "connect")
        self.version = response.version

    async def renew_login(self, refused: Login) -> None:
        """Get a new token, if we log in by password at all and nobody has got one since."""
        async with self._logging_in:
            if self._config.username and self.login is refused:
                await self._authenticate()

    def check_channel(self) -> None:
        """Go down if the channel has lost its transport: by itself, the next call would get it another one."""
        if self._channel.get_state() is not grpc.ChannelConnectivity.READY:
            self.fail(self.peer.error("unavailable", "go on", "the connection was lost"))

    def _observe(self, header: pb.ResponseHeader, floor: int) -> None:
        """Take note of a response's header; KvstoreError when it is not the store of the ones before.

        ``floor`` is the revision known when the request was sent, or the stream opened. Answers overtake each
        other, so only that one tells a store that went back; the next connect finds out for sure.
        """
        self.heard_at = time.monotonic()
        self.revision = max(self.revision, header.revision)
        self.cluster_id = self.cluster_id or header.cluster_id
        # The end of a compacted watch comes with revision 0.
        if header.cluster_id != self.cluster_id or 0 < header.revision < floor:
            reason, advice = "another store answers there", "all is read anew"
            self.fail(self.peer.error("unavailable", "go on", reason, advice))
            self._check_up()

    async def _authenticate(self) -> None:
        request = pb.AuthenticateRequest(
            name=self._config.username or "", password=self._config.password or ""
        )
        try:
            # Without a token: etcd refuses even the login for an expired one.
            response = await self._unary(rpc.AUTHENTICATE, request, self._timeout_s, ())
        except grpc.RpcError as exc:
            raise self.peer.translate(exc, f"log in with the password of {self._config.source}") from exc
        self.login = (("token", response.token),)
        self.login_at = time.monotonic()

    async def _unary(
        self, method: rpc.Method[Request, Response], request: Request, timeout_s: float, login: Login
    ) -> Response:
        self._check_up()
        multi = self._calls.get(method.path)
        if multi is None:
            multi = self._channel.unary_unary(method.path, method.encode, method.decode)
            self._calls[method.path] = multi
        try:
            response: Response = await multi(request, timeout=timeout_s, metadata=login)
        except asyncio.CancelledError:
            self._raise_failure_unless_cancelled()
            raise
        return response

    def _check_up(self) -> None:
        if self.failure:
            # A copy: the one exception object would collect the tracebacks of all who meet it.
            raise KvstoreError(str(self.failure), self.failure.kind)

    def _raise_failure_unless_cancelled(self) -> None:
        """Tell a closed channel, which cancels its calls, from somebody's cancelling this task."""
        task = asyncio.current_task()
        if task is not None and not task.cancelling():
            self._check_up()


def _who(config: EtcdConfig, cert: bytes | None) -> str:
    """Say in words whom etcd takes us for."""
    if config.username:
        return f"user {config.username!r}"
    facts = certificate_facts(cert) if cert else None
    if facts is None:
        return "no user"
    expired = ", expired" if facts.not_after.timestamp() < time.time() else ""
    return f"user {facts.common_name!r} (the certificate's common name{expired})"


async def dial(endpoint: Endpoint, config: EtcdConfig, transport: Transport) -> Connection:
    """Return an open connection; KvstoreError says why there is none."""
    connection = Connection(endpoint, config, transport)
    try:
        await connection.open()
    except BaseException:
        await connection.close()
        raise
    return connection
