"""One connection, over a channel that answers as the test wants: logins by password, and a store that goes back."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from lazymesh.errors import KvstoreError
from lazymesh.kvstore import connection as module
from lazymesh.kvstore import etcd_pb2 as pb
from lazymesh.kvstore import requests, rpc
from lazymesh.kvstore.channel import Code, RpcError
from lazymesh.kvstore.config import parse_config
from lazymesh.kvstore.connection import Connection
from lazymesh.kvstore.transport import Transport
from tests.support.etcd import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from lazymesh.kvstore.channel import Metadata, UnaryCall

CONFIG = parse_config("endpoints: ['http://127.0.0.1:1']\nusername: u\npassword: p\n", "b")
EXPIRED = RpcError(Code.UNAUTHENTICATED, "etcdserver: invalid auth token")


class Server:
    """A channel to a server that refuses every token but its own, and logs in when it is told to."""

    on_lost: Callable[[str], None] | None = None
    lost: str | None = None

    def __init__(self) -> None:
        self.revision = 7
        self.logins: list[Callable[[bytes | RpcError], None]] = []
        self.timeouts: list[float] = []

    def call(self, request: UnaryCall, on_done: Callable[[bytes | RpcError], None]) -> Callable[[], None]:
        """Answer a read at once, and a login later."""
        if request.path == rpc.AUTHENTICATE.path:
            self.logins.append(on_done)
            return lambda: None
        good = request.metadata == (("token", "good"),)
        if good:
            self.timeouts.append(request.timeout_s)
        header = pb.ResponseHeader(cluster_id=1, revision=self.revision)
        answer = pb.RangeResponse(header=header).SerializeToString() if good else EXPIRED
        asyncio.get_running_loop().call_soon(on_done, answer)
        return lambda: None

    async def stream(
        self, _path: str, _requests: AsyncIterator[bytes], _metadata: Metadata
    ) -> AsyncGenerator[bytes, None]:
        """Tell of one write."""
        header = pb.ResponseHeader(cluster_id=1, revision=self.revision + 1)
        yield pb.WatchResponse(header=header).SerializeToString()

    async def close(self) -> None:
        """Fail what is in flight."""
        for login in self.logins:
            login(RpcError(Code.UNAVAILABLE, "the connection was closed"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Put the server behind every connection."""
    server = Server()
    monkeypatch.setattr(module, "make_channel", lambda *_: server)
    return server


def read(connection: Connection, outcomes: list[object], timeout_s: float = 5) -> None:
    """Start a read."""
    call = rpc.Call(rpc.RANGE, requests.read_one(b"k"), timeout_s, lambda: "read k")
    connection.start(call, outcomes.append)


def connect() -> Connection:
    """Return a connection with a token that has expired."""
    return Connection(CONFIG.endpoints[0], CONFIG, Transport())


async def test_calls_whose_token_has_expired_share_one_login(server: Server) -> None:
    """Each is made again with the token that it brings."""
    connection, outcomes = connect(), []
    for _ in range(8):
        read(connection, outcomes)
    await eventually(lambda: server.logins)
    await asyncio.sleep(0.01)
    server.logins.pop()(pb.AuthenticateResponse(token="good").SerializeToString())
    await eventually(lambda: len(outcomes) == 8)
    assert all(isinstance(outcome, pb.RangeResponse) for outcome in outcomes)
    assert server.logins == []
    assert all(timeout <= 5 for timeout in server.timeouts)


async def test_calls_share_the_failure_of_a_login_and_the_next_call_tries_again(server: Server) -> None:
    """One after the other they would take a login's time each."""
    connection, outcomes = connect(), []
    for _ in range(8):
        read(connection, outcomes)
    await eventually(lambda: server.logins)
    server.logins.pop()(RpcError(Code.UNAVAILABLE, "no leader"))
    await eventually(lambda: len(outcomes) == 8)
    assert {str(outcome) for outcome in outcomes} == {str(outcomes[0])}
    assert "no leader" in str(outcomes[0])
    assert len({id(outcome) for outcome in outcomes}) == 8, "one exception would collect all tracebacks"
    read(connection, outcomes)
    await eventually(lambda: server.logins)


async def test_a_login_without_an_answer_takes_no_longer_than_the_call_may(server: Server) -> None:
    """The call's time limit is what packets are held for."""
    connection, outcomes = connect(), []
    read(connection, outcomes, timeout_s=0.05)
    await eventually(lambda: outcomes)
    (outcome,) = outcomes
    assert isinstance(outcome, KvstoreError)
    assert outcome.kind == "timeout"
    assert "cannot read k: no new login within 0.05 s" in str(outcome)
    await connection.close()
    assert len(server.logins) == 1


async def read_once(connection: Connection) -> object:
    """Make a read and return its outcome."""
    outcomes: list[object] = []
    read(connection, outcomes)
    await eventually(lambda: outcomes)
    return outcomes[0]


def logged_in() -> Connection:
    """Return a connection with a good token."""
    connection = connect()
    connection.login = (("token", "good"),)
    return connection


async def test_a_read_may_not_show_yet_what_a_watch_has_told(server: Server) -> None:
    """The server was interrupted between the two: it is the same store."""
    connection, requests_ = logged_in(), rpc.Outbox[pb.WatchRequest]()
    assert isinstance(await read_once(connection), pb.RangeResponse)
    async with contextlib.aclosing(connection.stream(rpc.WATCH, requests_, lambda: "watch")) as told:
        assert (await anext(told)).header.revision == 8
        assert connection.revision == 8
        assert isinstance(await read_once(connection), pb.RangeResponse)
    assert connection.failure is None


async def test_a_store_that_shows_less_than_it_did_is_another(server: Server) -> None:
    """It was restored from a backup behind our back."""
    connection = logged_in()
    assert isinstance(await read_once(connection), pb.RangeResponse)
    server.revision = 6
    outcome = await read_once(connection)
    assert isinstance(outcome, KvstoreError)
    assert "another store answers there" in str(outcome)
    assert connection.failure is not None
