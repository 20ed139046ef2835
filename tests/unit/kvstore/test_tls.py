"""TLS on two buffers, against OpenSSL's server side on two more: whatever pieces the bytes come in."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.kvstore.channel import Code, RpcError, UnaryCall
from lazymesh.kvstore.config import parse_config
from lazymesh.kvstore.native import NativeChannel
from lazymesh.kvstore.tls import TlsStream
from lazymesh.kvstore.wire import PREFACE
from tests.support.etcd import Authority
from tests.unit.kvstore.test_wire import HELLO, answer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.etcd import Pair

CALL = UnaryCall("/service/method", b"question", (), 5.0)
RECORD = 16_384
"""The most that TLS seals at once."""


class Server:
    """The other side."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.received, self.to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.received, self.to_send, server_side=True)

    def read(self) -> bytes:
        """Return all that the client has said."""
        said = b""
        try:
            while piece := self.tls.read(1 << 20):
                said += piece
        except ssl.SSLWantReadError:
            pass
        return said


class Certificates:
    """An authority, and a certificate of its own for both sides."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        self.pair: Pair = self.authority.issue("both")

    def client(self) -> TlsStream:
        """Return a client's side."""
        context = ssl.create_default_context(cafile=self.authority.cert)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return TlsStream(context, "127.0.0.1")

    def server(self) -> Server:
        """Return a server's."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.pair.cert, self.pair.key)
        return Server(context)

    def met(self) -> tuple[TlsStream, Server]:
        """Return both, after their handshake."""
        client, server = self.client(), self.server()
        while not client.established:
            client.shake_hands()
            server.received.write(client.to_send())
            with contextlib.suppress(ssl.SSLWantReadError):
                server.tls.do_handshake()
            client.feed(memoryview(server.to_send.read()))
        server.received.write(client.to_send())
        server.tls.do_handshake()
        client.feed(memoryview(server.to_send.read()))
        return client, server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Return certificates for all tests of the module."""
    return Certificates(tmp_path_factory.mktemp("authority"))


def opened(client: TlsStream, room: int = 1 << 16) -> bytes:
    """Return all that can be opened, by looks of some size."""
    buffer = memoryview(bytearray(room))
    whole = b""
    while length := client.open_into(buffer):
        whole += buffer[:length]
    return whole


@given(
    said=st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    long=st.booleans(),
    cut=st.integers(1, 700),
    room=st.integers(1, 2 * RECORD),
)
def test_what_was_said_is_heard_however_it_is_cut(
    certificates: Certificates, said: list[bytes], long: bool, cut: int, room: int
) -> None:
    """Records one by one, parts of one, or several at once; in the order in which they were sealed."""
    client, server = certificates.met()
    words = [*said, bytes(3 * RECORD)] if long else said
    for word in words:
        at = 0
        while at < len(word):  # one record at a time
            at += server.tls.write(word[at:])
    sealed, heard = server.to_send.read(), b""
    for at in range(0, len(sealed), cut):
        client.feed(memoryview(sealed)[at : at + cut])
        heard += opened(client, room)
    assert heard == b"".join(words)
    assert not client.ended


@given(words=st.lists(st.binary(min_size=1, max_size=3 * RECORD), max_size=4))
def test_what_is_sealed_arrives(certificates: Certificates, words: list[bytes]) -> None:
    """Also more than a record holds."""
    client, server = certificates.met()
    for word in words:
        server.received.write(client.seal(word))
    assert client.to_send() == b""
    assert server.read() == b"".join(words)


def test_what_came_before_the_end_is_heard_and_the_end_is_told(certificates: Certificates) -> None:
    """A server that says good-bye behind its last answer, in one segment."""
    client, server = certificates.met()
    server.tls.write(b"the last answer")
    with pytest.raises(ssl.SSLWantReadError):
        server.tls.unwrap()
    client.feed(memoryview(server.to_send.read()))
    assert opened(client) == b"the last answer"
    assert client.ended
    assert client.error is None


@pytest.mark.parametrize("at", [0, 3, 6, -1])
def test_what_came_before_a_forged_record_is_heard_and_nothing_of_it_or_after_it(
    certificates: Certificates, at: int
) -> None:
    """Whichever of its bytes is wrong."""
    client, server = certificates.met()
    server.tls.write(b"true")
    true = server.to_send.read()
    server.tls.write(b"forged")
    forged = bytearray(server.to_send.read())
    forged[at] ^= 0x80
    server.tls.write(b"late")
    client.feed(memoryview(true + bytes(forged) + server.to_send.read()))
    assert opened(client) == b"true"
    if at == 3:  # a record that says that it is longer: too long, or not all here
        assert client.error is not None or not client.ended
        return
    assert client.ended
    assert isinstance(client.error, ssl.SSLError)
    assert client.to_send()  # the server is told


def test_a_server_of_another_authority_is_refused_and_told(
    tmp_path: Path, certificates: Certificates
) -> None:
    """Before anything is sent to it."""
    client, server = certificates.client(), Certificates(tmp_path / "other").server()
    client.shake_hands()
    server.received.write(client.to_send())
    with pytest.raises(ssl.SSLWantReadError):
        server.tls.do_handshake()
    client.feed(memoryview(server.to_send.read()))
    client.shake_hands()
    assert not client.established
    assert client.ended
    assert isinstance(client.error, ssl.SSLCertVerificationError)
    server.received.write(client.to_send())
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
        server.tls.do_handshake()


@given(garbage=st.binary(min_size=1, max_size=600))
def test_garbage_ends_a_handshake_or_is_waited_out(certificates: Certificates, garbage: bytes) -> None:
    """And nothing of it is taken for what somebody said."""
    client = certificates.client()
    client.shake_hands()
    client.feed(memoryview(garbage))
    client.shake_hands()
    assert not client.established
    assert client.ended == (client.error is not None)


class Pipe(asyncio.Transport):
    """Where a channel writes to: memory."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it."""
        self.written += bytes(data)

    def abort(self) -> None:
        """Keep that."""
        self.aborted = True


class Met:
    """A channel over TLS and its server, with nothing but memory between them: tests say what comes together."""

    def __init__(self, certificates: Certificates) -> None:
        config = parse_config(
            f"endpoints: ['https://127.0.0.1:1']\ntrusted-ca-file: {certificates.authority.cert}", "test"
        )
        self.channel = NativeChannel(config.endpoints[0], config, 1 << 20)
        self.server, self.pipe = certificates.server(), Pipe()
        self.lost: list[str] = []
        self._heard = b""
        self.channel.on_lost = self.lost.append
        self.channel.seal_with(certificates.client())

    def shake_hands(self) -> None:
        """Go through the handshake, and have HTTP/2 spoken."""
        if not self.pipe.written:
            self.channel.connection_made(self.pipe)
        for _ in range(3):
            self.hear()
            with contextlib.suppress(ssl.SSLWantReadError):
                self.server.tls.do_handshake()
            self.tell(self.server.to_send.read())
        self.say(HELLO)

    def hear(self) -> bytes:
        """Return all that the channel has said so far, as far as it can be opened."""
        self.server.received.write(self.pipe.written)
        self.pipe.written = b""
        self._heard += self.server.read()
        return self._heard

    def seal(self, *words: bytes) -> bytes:
        """Return the server's words sealed, each in records of its own."""
        for word in words:
            self.server.tls.write(word)
        return self.server.to_send.read()

    def say(self, *words: bytes) -> None:
        """Have the server say something."""
        self.tell(self.seal(*words))

    def tell(self, sealed: bytes) -> None:
        """Have bytes arrive, as many at once as the channel takes."""
        while sealed:
            room = self.channel.get_buffer(-1)
            part, sealed = sealed[: len(room)], sealed[len(room) :]
            room[: len(part)] = part
            self.channel.buffer_updated(len(part))


@pytest.mark.parametrize("ending", ["garbage", "alert", "good-bye"])
async def test_an_answer_that_leads_to_a_call_may_come_with_the_end(
    certificates: Certificates, ending: str
) -> None:
    """The answer is told, the call fails for the reason that the connection did, and nothing is raised."""
    met = Met(certificates)
    met.shake_hands()
    outcomes: list[bytes | RpcError] = []

    def ask_again(outcome: bytes | RpcError) -> None:
        outcomes.append(outcome)
        met.channel.call(CALL, outcomes.append)

    met.channel.call(CALL, ask_again)
    answered = met.seal(answer(1, b"the answer"))
    if ending == "garbage":
        met.hear()
        end = b"\x17\x03\x03\x00\x10" + bytes(16)
    elif ending == "alert":
        met.server.received.write(b"\x17\x03\x03\x00\x10" + bytes(16))
        with pytest.raises(ssl.SSLError):
            met.server.tls.read(1)
        end = met.server.to_send.read()
    else:
        with contextlib.suppress(ssl.SSLWantReadError):
            met.server.tls.unwrap()
        end = met.server.to_send.read()
    met.tell(answered + end)
    first, second = outcomes
    assert first == b"the answer"
    assert isinstance(second, RpcError)
    assert second.code is Code.UNAVAILABLE
    (reason,) = met.lost
    assert reason.startswith("the connection was lost")
    assert "format" not in reason
    assert met.pipe.aborted
    if ending == "garbage":
        met.server.received.write(met.pipe.written)
        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            met.server.read()


async def test_a_call_before_the_handshake_is_over_is_sent_when_it_is(certificates: Certificates) -> None:
    """And nothing in the clear before."""
    met = Met(certificates)
    met.channel.connection_made(met.pipe)
    met.channel.call(CALL, lambda _: None)
    met.shake_hands()
    said = met.hear()
    assert said.startswith(PREFACE)
    assert CALL.message in said
    await met.channel.close()


async def test_more_than_a_buffer_of_answers_is_taken_at_once(certificates: Certificates) -> None:
    """Also while a part of a frame is there already: nothing stays sealed until something else comes."""
    met = Met(certificates)
    met.shake_hands()
    outcomes: list[bytes | RpcError] = []
    for _ in range(7):
        met.channel.call(CALL, outcomes.append)
    words = b"".join(answer(2 * n + 1, bytes(10_000)) for n in range(7))
    met.say(words[:9_000])
    sealed = b"".join([met.seal(words[at : at + RECORD]) for at in range(9_000, len(words), RECORD)])
    room = len(met.channel.get_buffer(-1))
    assert len(sealed) <= room < len(words)
    met.tell(sealed)
    assert [len(outcome) for outcome in outcomes if isinstance(outcome, bytes)] == [10_000] * 7
    await met.channel.close()


async def test_who_hangs_up_hears_no_more(certificates: Certificates) -> None:
    """What has come with the answer after which the channel was closed is nobody's."""
    met = Met(certificates)
    met.shake_hands()
    outcomes: list[bytes | RpcError] = []

    def hang_up(outcome: bytes | RpcError) -> None:
        outcomes.append(outcome)
        met.channel._end("enough")

    met.channel.call(CALL, hang_up)
    met.channel.call(CALL, outcomes.append)
    met.say(answer(1, b"one"), answer(3, b"two"))
    first, second = outcomes
    assert first == b"one"
    assert isinstance(second, RpcError)
    assert second.details == "enough"
    assert met.pipe.aborted


async def test_an_authority_that_is_not_ours_is_told_so_by_the_channel(
    tmp_path: Path, certificates: Certificates
) -> None:
    """The server's log then says why."""
    met = Met(certificates)
    met.server = Certificates(tmp_path / "other").server()
    met.channel.connection_made(met.pipe)
    met.hear()
    with contextlib.suppress(ssl.SSLWantReadError):
        met.server.tls.do_handshake()
    met.tell(met.server.to_send.read())
    assert met.lost
    met.server.received.write(met.pipe.written)
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
        met.server.tls.do_handshake()
