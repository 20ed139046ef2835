"""The native channel against a server that follows a script: rude servers are hard to come by.

Each test is run in the clear and over TLS: nobody above the socket may tell the difference.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
from msgspec import structs

from lazymesh.kvstore import wire
from lazymesh.kvstore.channel import Code, RpcError, UnaryCall
from lazymesh.kvstore.config import EtcdConfig, parse_config
from lazymesh.kvstore.native import SWEEP_S, NativeChannel
from tests.support.etcd import Authority, eventually
from tests.unit.kvstore.test_wire import HELLO, OK_HEAD, answer, frame, message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

CALL = UnaryCall("/service/method", b"question", (), 5.0)


class Sealing:
    """How the connections of a test are sealed, and the authority for it; None: not at all."""

    authority: Authority | None = None

    def server(self) -> ssl.SSLContext | None:
        """Return what a server seals with."""
        if self.authority is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        pair = self.authority.issue("server")
        context.load_cert_chain(pair.cert, pair.key)
        return context

    def config(self, port: int) -> EtcdConfig:
        """Return how a client gets there."""
        text = f"endpoints: ['{'https' if self.authority else 'http'}://127.0.0.1:{port}']"
        if self.authority:
            text += f"\ntrusted-ca-file: {self.authority.cert}"
        return parse_config(text, "test")


SEALING = Sealing()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Return one for all tests of the module."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(autouse=True, params=["clear", "tls"])
def _sealed(request: pytest.FixtureRequest, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test both ways."""
    monkeypatch.setattr(SEALING, "authority", authority if request.param == "tls" else None)


class Server:
    """One connection's other end; a test says what it says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.calls = 0

    def say(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    async def call(self) -> int:
        """Wait for the head of the next call; return its stream."""
        return (await self.until(wire.HEADERS))[2]

    async def until(self, kind: int) -> tuple[int, int, int, bytes]:
        """Read frames up to one of a kind, and return that."""
        async with asyncio.timeout(5):
            while (got := await self.frame())[0] != kind:
                pass
        return got

    async def frame(self) -> tuple[int, int, int, bytes]:
        """Read one frame."""
        head = await self.reader.readexactly(9)
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        return kind, flags, stream, await self.reader.readexactly(int.from_bytes(head[:3], "big"))


@asynccontextmanager
async def met(hello: bytes = HELLO) -> AsyncIterator[tuple[NativeChannel, Server]]:
    """Yield a channel and the server at its other end."""
    servers: asyncio.Queue[Server] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.readexactly(len(wire.PREFACE))
        writer.write(hello)
        servers.put_nowait(Server(reader, writer))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=SEALING.server())
    config = SEALING.config(listener.sockets[0].getsockname()[1])
    channel = NativeChannel(config.endpoints[0], config, 1 << 20)
    try:
        await channel.open(2)
        yield channel, await servers.get()
    finally:
        await channel.close()
        listener.close()
        for writer in writers:
            writer.close()
        await asyncio.sleep(0.01)


def ask(channel: NativeChannel, call: UnaryCall = CALL) -> asyncio.Future[bytes | RpcError]:
    """Make a call, as a future."""
    future: asyncio.Future[bytes | RpcError] = asyncio.get_running_loop().create_future()
    channel.call(call, future.set_result)
    return future


async def test_the_response_is_the_outcome_and_its_trailers_are_waited_for_by_nobody() -> None:
    """Whatever comes behind it: who has failed sends no response."""
    before, body, trailers = answer(1, b"here").partition(message(b"here"))
    for behind in (trailers, frame(wire.RST_STREAM, 0, 1, struct.pack(">I", 8)), None):
        async with met() as (channel, server):
            call = ask(channel)
            assert await server.call() == 1
            server.say(before + body)
            assert await call == b"here"
            assert len(channel._calls) == 1
            if behind is None:
                await channel.close()
            else:
                server.say(behind)
            await eventually(lambda: not channel._calls)
            assert channel.lost == ("the connection was closed" if behind is None else None)


async def test_trailers_that_never_come_are_given_up_at_the_deadline() -> None:
    """The server may have only so many calls at a time, and this is still one; nobody is told of it."""
    async with met() as (channel, server):
        call = ask(channel, structs.replace(CALL, timeout_s=0.2))
        assert await server.call() == 1
        before, body, _ = answer(1, b"here").partition(message(b"here"))
        server.say(before + body)
        assert await call == b"here"
        await server.until(wire.RST_STREAM)
        await eventually(lambda: not channel._calls)


async def test_a_late_call_that_another_one_abandons_is_not_told() -> None:
    """Both are late at the same moment; whichever is told first gives the other up."""
    async with met() as (channel, _):
        told: list[int] = []
        give_up: list[Callable[[], None]] = []

        def tell(number: int, _: object) -> None:
            told.append(number)
            give_up[1 - number]()

        late = structs.replace(CALL, timeout_s=0.01)
        give_up += [channel.call(late, partial(tell, number)) for number in range(2)]
        await eventually(lambda: told)
        await asyncio.sleep(2 * SWEEP_S)
        assert len(told) == 1


async def test_calls_overtake_each_other() -> None:
    """Each gets its own answer."""
    async with met() as (channel, server):
        one, two = ask(channel), ask(channel)
        first, second = await server.call(), await server.call()
        server.say(answer(second, b"two") + answer(first, b"one"))
        assert (await two, await one) == (b"two", b"one")


async def test_a_call_without_answer_ends_at_its_deadline_and_is_reset() -> None:
    """The server is told of both; the connection goes on."""
    async with met() as (channel, server):
        late = ask(channel, structs.replace(CALL, timeout_s=0.05))
        stream = await server.call()
        outcome = await late
        assert isinstance(outcome, RpcError)
        assert outcome.code is Code.DEADLINE_EXCEEDED
        assert (await server.until(wire.RST_STREAM))[2] == stream
        server.say(answer(stream, b"too late"))
        again = ask(channel)
        server.say(answer(await server.call(), b"in time"))
        assert await again == b"in time"


async def test_more_calls_than_the_server_takes_wait() -> None:
    """And go on as room is made, or fail at their own deadline."""
    async with met(frame(wire.SETTINGS, 0, 0, struct.pack(">HI", 3, 1))) as (channel, server):
        first, second, third = ask(channel), ask(channel, structs.replace(CALL, timeout_s=0.05)), ask(channel)
        stream = await server.call()
        outcome = await second
        assert isinstance(outcome, RpcError)
        server.say(answer(stream, b"one"))
        assert await first == b"one"
        server.say(answer(await server.call(), b"three"))
        assert await third == b"three"


async def test_a_server_that_dies_fails_everything_and_is_told() -> None:
    """Calls under way, streams, and whoever asks later."""
    async with met() as (channel, server):
        lost: list[str] = []
        channel.on_lost = lost.append
        call = ask(channel)
        await server.call()
        server.writer.close()
        outcome = await call
        assert isinstance(outcome, RpcError)
        assert outcome.code is Code.UNAVAILABLE
        await eventually(lambda: lost)
        assert channel.lost == lost[0] == "the connection was lost"
        later = await ask(channel)
        assert isinstance(later, RpcError)


async def test_goodbye_lets_calls_under_way_end_well_and_then_the_connection() -> None:
    """The order of a server's graceful stop."""
    async with met() as (channel, server):
        lost: list[str] = []
        channel.on_lost = lost.append
        call = ask(channel)
        stream = await server.call()
        server.say(frame(wire.GOAWAY, 0, 0, struct.pack(">II", 1, 0)))
        await eventually(lambda: channel.lost)
        assert not lost
        server.say(answer(stream, b"well"))
        assert await call == b"well"
        await eventually(lambda: lost)


async def test_garbage_ends_the_connection() -> None:
    """Not HTTP/2 any more: nothing that follows can be believed."""
    async with met() as (channel, server):
        call = ask(channel)
        await server.call()
        server.say(frame(wire.DATA, 0, 99, b"x"))
        outcome = await call
        assert isinstance(outcome, RpcError)
        assert "never opened" in outcome.details


@pytest.mark.parametrize("hello", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH\r\n"])
async def test_another_protocol_is_told_at_the_door(hello: bytes) -> None:
    """A wrong port, most likely."""
    with pytest.raises(RpcError, match="does not speak HTTP/2"):
        async with met(hello):
            pass


async def test_nobody_there_and_nobody_speaking() -> None:
    """Two ways not to connect."""
    config = SEALING.config(1)
    channel = NativeChannel(config.endpoints[0], config, 1)
    with pytest.raises(RpcError, match="failed to connect: Connection refused") as caught:
        await channel.open(2)
    assert caught.value.code is Code.UNAVAILABLE
    with pytest.raises(RpcError, match=r"no connection within 0\.1 s"):
        await silent()


async def silent() -> None:
    """Dial a server that accepts and says nothing."""
    writers: list[asyncio.StreamWriter] = []
    listener = await asyncio.start_server(lambda _r, w: writers.append(w), "127.0.0.1", 0)
    config = SEALING.config(listener.sockets[0].getsockname()[1])
    channel = NativeChannel(config.endpoints[0], config, 1)
    try:
        await channel.open(0.1)
    finally:
        await channel.close()
        listener.close()
        for writer in writers:
            writer.close()
        await asyncio.sleep(0.01)


async def words(*all_words: bytes) -> AsyncIterator[bytes]:
    """Yield some requests, then wait for ever."""
    for word in all_words:
        yield word
    await asyncio.Event().wait()


async def test_a_stream_carries_many_both_ways_and_requests_of_a_moment_in_one_write() -> None:
    """Responses come one by one, an end that is no good one as an error."""
    async with met() as (channel, server):
        responses = channel.stream("/service/stream", words(b"one", b"two"), ())
        first = asyncio.ensure_future(anext(responses))
        stream = await server.call()
        assert [(await server.until(wire.DATA))[3] for _ in range(2)] == [message(b"one"), message(b"two")]
        server.say(frame(wire.HEADERS, 4, stream, OK_HEAD) + frame(wire.DATA, 0, stream, message(b"uno")))
        assert await first == b"uno"
        server.say(
            frame(wire.DATA, 0, stream, message(b"due")) + frame(wire.RST_STREAM, 0, stream, b"\0\0\0\x08")
        )
        assert await anext(responses) == b"due"
        with pytest.raises(RpcError) as caught:
            await anext(responses)
        assert caught.value.code is Code.CANCELLED


async def test_a_stream_that_is_left_is_reset() -> None:
    """The server need not go on."""
    async with met() as (channel, server):
        responses = channel.stream("/service/stream", words(), ())
        first = asyncio.ensure_future(anext(responses))
        stream = await server.call()
        server.say(frame(wire.HEADERS, 4, stream, OK_HEAD) + frame(wire.DATA, 0, stream, message(b"x")))
        await first
        await responses.aclose()
        assert (await server.until(wire.RST_STREAM))[2] == stream


async def test_pings_are_answered_after_the_calls_of_a_while() -> None:
    """A server that waits for an answer would hang up; one that pings at each response is not to do so all the time."""
    async with met() as (channel, server):
        server.say(frame(wire.PING, 0, 0, b"12345678") + frame(wire.PING, wire.ACK, 0, bytes(8)))
        await asyncio.sleep(0.01)
        calls = [ask(channel) for _ in range(2)]
        kinds: list[int] = []
        while kinds.count(wire.DATA) < len(calls):
            kinds.append((await server.frame())[0])
        assert wire.PING not in kinds
        assert await server.until(wire.PING) == (wire.PING, wire.ACK, 0, b"12345678")
        server.say(frame(wire.PING, 0, 0, b"87654321"))
        assert (await server.until(wire.PING))[3] == b"87654321"
        assert not any(call.done() for call in calls)


async def refused(server_side: ssl.SSLContext | None) -> str:
    """Dial a server that hangs up after our first words, or seals as it says; return why there is no connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_side)
    config = SEALING.config(listener.sockets[0].getsockname()[1])
    channel = NativeChannel(config.endpoints[0], config, 1)
    try:
        with pytest.raises(RpcError) as caught:
            await channel.open(2)
    finally:
        await channel.close()
        listener.close()
    assert caught.value.code is Code.UNAVAILABLE
    return caught.value.details


async def test_why_a_handshake_fails_is_said(authority: Authority, tmp_path: Path) -> None:
    """A server that breaks it off, and one that nobody trusts. What etcd refuses, etcd shows."""
    SEALING.authority = authority
    assert await refused(None) == "failed to connect: the server ended the TLS handshake"
    stranger = Sealing()
    stranger.authority = Authority(tmp_path / "stranger")
    assert await refused(stranger.server()) == "failed to connect: certificate verify failed"
