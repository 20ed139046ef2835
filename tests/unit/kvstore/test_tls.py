"""TLS on two buffers, against OpenSSL's server side on two more: whatever pieces the bytes come in."""

from __future__ import annotations

import contextlib
import ssl
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymesh.kvstore.tls import TlsStream
from tests.support.etcd import Authority

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.etcd import Pair

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
        client.seal(word)
    server.received.write(client.to_send())
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
