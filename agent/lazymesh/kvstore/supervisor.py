"""Keeps one connection to one store: dials the endpoints in turn, backs off, detects silence and replacement.

One connection at a time, never spread over the endpoints: each replica of a clustermesh-apiserver has its own etcd
with its own cluster id and revisions. Callers either wait for a connection as long as it takes, or learn at once why
there is none. client.py and hub.py decide what is sent over the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from lazymesh.core.backoff import Backoff, BackoffLimits
from lazymesh.errors import KvstoreError
from lazymesh.kvstore.connection import Connection, dial
from lazymesh.kvstore.model import ClientEvent, ClientInfo, Connected, Disconnected
from lazymesh.kvstore.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.kvstore.config import Endpoint, EtcdConfig

log = structlog.get_logger()

CHANNEL_CHECK_S = 2.0
"""How soon an idle connection is found to be closed by the server; a watch notices at once."""


@dataclass(frozen=True, slots=True)
class Options:
    """Timeouts and intervals of one client; the defaults suit a store across a continent."""

    transport: Transport = field(default_factory=Transport)
    backoff: BackoffLimits = field(default_factory=BackoffLimits)
    silence_s: float = 15.0
    """After this long without a sign of life the server is probed."""
    probe_timeout_s: float = 10.0
    """A server that does not answer the probe for this long is given up."""
    progress_s: float = 60.0
    """How often idle watches are moved forward (on servers whose progress reports are in order, see hub.py)."""
    fresh_login_s: float = 10.0
    """The refusal of a watch is final if its stream's token is younger than this; etcd's tokens live 300 s."""
    settled_s: float = 5.0
    """A connection that lasted this long was a success: the next failure restarts the back-off."""
    jitter: Callable[[], float] = random.random


class Dial(Protocol):
    """Opens a connection; tests bring their own."""

    async def __call__(self, endpoint: Endpoint, config: EtcdConfig, transport: Transport) -> Connection:
        """Return an open connection or raise KvstoreError."""


class Supervisor:
    """The one connection of a client, and the store's identity across successive connections."""

    def __init__(self, config: EtcdConfig, options: Options, dial: Dial = dial) -> None:
        self.epoch = 0
        """How often the store turned out to be another one, or an older state of the same one."""
        self.listeners: list[Callable[[ClientEvent], None]] = []
        self._config = config
        self._options = options
        self._dial = dial
        self._backoff = Backoff(options.backoff, options.jitter)
        self.present: Connection | None = None
        """The connection, None while there is none; read-only for others."""
        self._failure: KvstoreError | None = None
        self._up = asyncio.Event()
        self._settled = asyncio.Event()
        """Set when it is known whether there is a connection: not during a round of dialling."""
        self._attention = asyncio.Event()
        """Wakes the guard of the connection early."""
        self._turn = 0
        self._cluster_id: int | None = None
        self._revision = 0
        self._connects = 0

    @property
    def info(self) -> ClientInfo:
        """State of this store."""
        connection = self.present
        return ClientInfo(
            endpoint=str(connection.endpoint) if connection else None,
            cluster_id=self._cluster_id,
            revision=max(self._revision, connection.revision if connection else 0),
            reconnects=max(0, self._connects - 1),
            last_error=str(self._failure) if self._failure else None,
        )

    async def run(self) -> None:
        """Keep a connection until cancelled."""
        while True:
            connection = await self._dial_round()
            if connection:
                await self._keep(connection)
            await asyncio.sleep(self._backoff.next_s())

    async def connection(self, timeout_s: float) -> Connection:
        """Return the connection; while the endpoints are being dialled, wait for the outcome."""
        if self.present:
            return self.present
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        except TimeoutError as exc:
            where = " and ".join(str(endpoint) for endpoint in self._config.endpoints)
            message = (
                f"etcd {where}: no connection within {timeout_s:g} s; check that it is reachable from here"
            )
            raise KvstoreError(message, "timeout") from exc
        if self.present:
            return self.present
        failure = self._failure or KvstoreError("unreachable: settled, but neither connection nor failure")
        # A copy: a shared exception object would collect the traceback of every caller.
        raise KvstoreError(str(failure), failure.kind)

    async def wait_connected(self) -> Connection:
        """Return the connection, however long it takes to get one."""
        while not self.present:
            await self._up.wait()
        return self.present

    def suspect(self, connection: Connection) -> None:
        """Probe the server now: a call has timed out, or failed in an odd way."""
        connection.heard_at = -math.inf
        self._attention.set()

    async def _dial_round(self) -> Connection | None:
        """Try each endpoint once, beginning after the last one tried; None when none answers."""
        self._settled.clear()
        for _ in self._config.endpoints:
            endpoint = self._config.endpoints[self._turn % len(self._config.endpoints)]
            self._turn += 1
            try:
                return await self._up_to_date(
                    await self._dial(endpoint, self._config, self._options.transport)
                )
            except KvstoreError as exc:
                self._failure = exc
                log.debug("etcd endpoint does not answer", endpoint=str(endpoint), error=str(exc))
        self._settled.set()
        return None

    async def _up_to_date(self, connection: Connection) -> Connection:
        """Return it once a lagging member has caught up: its old state would look like a store that went back.

        KvstoreError if it has failed by now: a server may announce its shutdown with its first answer.
        """
        try:
            if connection.cluster_id == self._cluster_id and connection.revision < self._revision:
                await connection.catch_up()
            connection.check_up()
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _keep(self, connection: Connection) -> None:
        started = time.monotonic()
        self._adopt(connection)
        try:
            while connection.failure is None:
                await self._guard(connection)
        finally:
            await connection.close()
        if time.monotonic() - started >= self._options.settled_s:
            self._backoff.reset()

    def _adopt(self, connection: Connection) -> None:
        """Make it the connection in use, and find out whether its store is still the same."""
        known = self._cluster_id is not None
        reset = known and (connection.cluster_id != self._cluster_id or connection.revision < self._revision)
        if reset:
            self.epoch += 1
            self._revision = connection.revision
        self._cluster_id = connection.cluster_id
        self._connects += 1
        self.present = connection
        connection.on_down = self._lose
        self._up.set()
        self._settled.set()
        event = Connected(str(connection.endpoint), connection.cluster_id, connection.revision, reset)
        log.info("etcd connected", endpoint=event.endpoint, revision=event.revision, reset=reset)
        self._tell(event)

    def _lose(self, error: KvstoreError) -> None:
        if self.present:
            self._revision = max(self._revision, self.present.revision)
        self.present = None
        self._failure = error
        self._up.clear()
        self._attention.set()
        log.warning("etcd disconnected", error=str(error))
        self._tell(Disconnected(error))

    def _tell(self, event: ClientEvent) -> None:
        for listener in self.listeners:
            listener(event)

    async def _guard(self, connection: Connection) -> None:
        """Sleep while signs of life come in; probe the server when they do not."""
        connection.check_channel()
        quiet_s = connection.heard_at + self._options.silence_s - time.monotonic()
        try:
            if quiet_s > 0:
                self._attention.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(quiet_s, CHANNEL_CHECK_S)):
                        await self._attention.wait()
            elif connection.failure is None:
                await connection.ping(self._options.probe_timeout_s)
        except KvstoreError as exc:
            # Any other answer, even a refusal, is a sign of life too.
            connection.heard_at = time.monotonic()
            if exc.kind in ("unavailable", "timeout"):
                connection.fail(exc)
