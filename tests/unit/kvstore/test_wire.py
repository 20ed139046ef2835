"""HTTP/2 without I/O: what a server may do, what it must not, and that nothing it does is more than an error."""

from __future__ import annotations

import struct

import pytest
from hpack import Encoder, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st
from msgspec import field

from lazymesh.kvstore import wire
from lazymesh.kvstore.channel import Code
from lazymesh.kvstore.wire import Exchange, ProtocolError, Wire, request_head

HEAD = request_head("http", "b:2379", "/etcdserverpb.KV/Range", (), 5_000)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame; spelled out, not the program's own."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def message(payload: bytes, compressed: int = 0) -> bytes:
    """Return a gRPC message."""
    return struct.pack(">BI", compressed, len(payload)) + payload


def headers(*pairs: tuple[str, str]) -> bytes:
    """Return a header block that uses no table."""
    encoder = Encoder()
    encoder.header_table_size = 0
    return bytes(encoder.encode(list(pairs)))


OK_HEAD = headers((":status", "200"), ("content-type", "application/grpc"))
OK_TRAILERS = headers(("grpc-status", "0"), ("grpc-message", ""))
HELLO = frame(wire.SETTINGS, 0, 0)


def answer(stream: int, payload: bytes) -> bytes:
    """Return a whole response, as Go's server sends it."""
    return (
        frame(wire.HEADERS, wire.END_HEADERS, stream, OK_HEAD)
        + frame(wire.DATA, 0, stream, message(payload))
        + frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, stream, OK_TRAILERS)
    )


class Caller(Exchange, eq=False):
    """One call and what came of it."""

    messages: list[bytes] = field(default_factory=list)
    ends: list[tuple[Code, str]] = field(default_factory=list)

    def on_message(self, message: bytes) -> None:
        """Take a response."""
        self.messages.append(message)

    def on_end(self, code: Code, details: str) -> None:
        """Take the outcome."""
        self.ends.append((code, details))


def sent(connection: Wire) -> list[tuple[int, int, int, bytes]]:
    """Take what is to be sent, as frames: kind, flags, stream, payload."""
    data, frames = b"".join(connection.out).removeprefix(wire.PREFACE), []
    connection.out.clear()
    while data:
        length = int.from_bytes(data[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", data[3:9])
        frames.append((kind, flags, stream, data[9 : 9 + length]))
        data = data[9 + length :]
    return frames


def connected(hello: bytes = HELLO, most: int = 1 << 20) -> Wire:
    """Return a connection whose server has said hello."""
    connection = Wire(most)
    assert connection.feed(memoryview(hello)) == len(hello)
    sent(connection)
    return connection


def called(connection: Wire, payload: bytes | None = b"request") -> Caller:
    """Begin a call."""
    caller = Caller()
    connection.begin(caller, HEAD, payload)
    return caller


def feed(connection: Wire, data: bytes) -> None:
    """Feed whole frames."""
    assert connection.feed(memoryview(data)) == len(data)


def test_the_client_speaks_first_and_asks_for_no_table_and_large_windows() -> None:
    """The preface, settings, and credit for the whole connection."""
    out = b"".join(Wire(1).out)
    assert out.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    settings, update = sent(Wire(1))
    pairs = dict(struct.iter_unpack(">HI", settings[3]))
    assert pairs == {1: 0, 2: 0, 4: wire.STREAM_WINDOW}
    assert update == (wire.WINDOW_UPDATE, 0, 0, struct.pack(">I", (1 << 31) - 1 - 65_535))


def test_a_call_is_a_head_and_a_message_and_its_answer_comes_once() -> None:
    """The everyday case: three frames back."""
    connection = connected()
    caller = called(connection)
    head, data = sent(connection)
    assert head == (wire.HEADERS, wire.END_HEADERS, 1, HEAD)
    assert data == (wire.DATA, wire.END_STREAM, 1, message(b"request"))
    feed(connection, answer(1, b"response"))
    assert (caller.messages, caller.ends) == ([b"response"], [(Code.OK, "")])
    assert not connection.exchanges


def test_equal_calls_have_equal_heads() -> None:
    """No table is used, so a head is made once."""
    again = request_head("http", "b:2379", "/etcdserverpb.KV/Range", (), 5_000)
    assert again is HEAD
    assert request_head("http", "b:2379", "/etcdserverpb.KV/Range", (("token", "x"),), None) != HEAD


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(0, 3))
def test_bytes_may_come_in_any_pieces(cuts: list[int], calls: int) -> None:
    """What is no whole frame yet is fed again."""
    connection = Wire(1 << 20)
    callers = [called(connection) for _ in range(calls)]
    data = HELLO + b"".join(answer(2 * n + 1, b"x" * (n * 1_000)) for n in range(calls))
    rest = b""
    for cut in [*cuts, len(data)]:
        rest, data = rest + data[:cut], data[cut:]
        rest = rest[connection.feed(memoryview(rest)) :]
    assert not rest
    assert [caller.messages for caller in callers] == [[b"x" * (n * 1_000)] for n in range(calls)]


@given(st.binary(max_size=400))
def test_garbage_is_an_error_of_the_protocol_and_nothing_else(garbage: bytes) -> None:
    """Whatever comes behind a hello."""
    connection = connected()
    caller = called(connection)
    try:
        connection.feed(memoryview(garbage))
    except ProtocolError:
        connection.fail(Code.UNAVAILABLE, "gone")
    assert len(caller.ends) <= 1


frames = st.builds(
    frame,
    st.integers(0, 11),
    st.integers(0, 0x2F),
    st.sampled_from([0, 1, 2, 3, 5, 1 << 30]),
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from([OK_HEAD, OK_TRAILERS, message(b"x"), bytes(4), bytes(8), struct.pack(">HI", 4, 0)]),
    ),
)


@given(st.lists(frames, max_size=12))
def test_frames_in_any_order_are_an_error_of_the_protocol_or_an_outcome(order: list[bytes]) -> None:
    """Well formed frames that make no sense together; the books stay in order."""
    connection = connected()
    callers = [called(connection), called(connection, None), called(connection, b"y" * 100_000)]
    try:
        feed_all(connection, order)
    except ProtocolError:
        connection.fail(Code.UNAVAILABLE, "gone")
    for caller in callers:
        assert len(caller.ends) <= 1
        assert (caller.stream in connection.exchanges) != caller.ended


def feed_all(connection: Wire, order: list[bytes]) -> None:
    """Feed frames one by one."""
    for one in order:
        connection.feed(memoryview(one))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "does not speak HTTP/2"),
        (HELLO + frame(wire.DATA, 0, 0, b"x"), "never opened"),
        (HELLO + frame(wire.DATA, 0, 2, b"x"), "never opened"),
        (HELLO + frame(wire.DATA, 0, 99, b"x"), "never opened"),
        (HELLO + frame(wire.PUSH_PROMISE, 4, 1, bytes(4)), "not requested"),
        (HELLO + frame(wire.DATA, 0, 1, b"x"), "without a head"),
        (
            HELLO + frame(wire.HEADERS, 4, 1, OK_HEAD) + frame(wire.DATA, wire.PADDED, 1, b"\x09xx"),
            "padding",
        ),
        (HELLO + frame(wire.HEADERS, 0, 1, OK_HEAD) + frame(wire.PING, 0, 0, bytes(8)), "not continued"),
        (HELLO + frame(wire.CONTINUATION, 4, 1, OK_HEAD), "a continuation of nothing"),
        (HELLO + frame(wire.HEADERS, 4, 1, b"\xff\xff\xff\xff\xff"), "cannot be decoded"),
        (HELLO + frame(wire.WINDOW_UPDATE, 0, 0, bytes(4)), "of nothing"),
        (HELLO + frame(wire.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), "too large"),
        (HELLO + frame(wire.SETTINGS, 0, 0, b"xxx"), "malformed"),
        (HELLO + struct.pack(">I", 1 << 20)[1:] + bytes(6), "a frame of"),
        (HELLO + 200 * frame(wire.PING, 0, 0, bytes(8)), "a flood of pings"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_told_apart(data: bytes, why: str) -> None:
    """The words end up in front of a person."""
    connection = Wire(1 << 20)
    called(connection)
    with pytest.raises(ProtocolError, match=why):
        connection.feed(memoryview(data))


def test_headers_may_go_on_and_be_padded_and_have_a_priority() -> None:
    """As RFC 9113 allows, though Go does none of it."""
    connection = connected()
    caller = called(connection)
    flags = wire.PADDED | wire.PRIORITISED
    feed(
        connection,
        frame(wire.HEADERS, flags, 1, b"\x03" + bytes(5) + OK_HEAD[:4] + bytes(3))
        + frame(wire.CONTINUATION, wire.END_HEADERS, 1, OK_HEAD[4:])
        + frame(wire.DATA, wire.PADDED, 1, b"\x02" + message(b"padded") + bytes(2))
        + frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, OK_TRAILERS),
    )
    assert (caller.messages, caller.ends) == ([b"padded"], [(Code.OK, "")])


def test_a_header_block_without_end_is_refused() -> None:
    """Or it would fill our memory."""
    connection = connected()
    called(connection)
    feed(connection, frame(wire.HEADERS, 0, 1, OK_HEAD))
    with pytest.raises(ProtocolError, match="without end"):
        feed(connection, 10 * frame(wire.CONTINUATION, 0, 1, bytes(16_000)))


@pytest.mark.parametrize(
    ("pairs", "outcome"),
    [
        (
            (("grpc-status", "7"), ("grpc-message", "etcdserver%3A no")),
            (Code.PERMISSION_DENIED, "etcdserver: no"),
        ),
        ((("grpc-status", "99"),), (Code.UNKNOWN, "")),
        ((("grpc-status", "²"),), (Code.UNKNOWN, "")),
        (((":status", "503"),), (Code.UNAVAILABLE, "HTTP status 503, not gRPC's")),
        (((":status", "404"),), (Code.UNIMPLEMENTED, "HTTP status 404, not gRPC's")),
        (((":status", "200"),), (Code.UNKNOWN, "the response ends without a status")),
    ],
)
def test_a_refusal_may_be_all_of_the_response(pairs: tuple, outcome: tuple[Code, str]) -> None:
    """Headers that end the stream: gRPC's own status, or what something else between us and it says."""
    connection = connected()
    caller = called(connection)
    feed(connection, frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, headers(*pairs)))
    assert caller.ends == [outcome]


def test_long_header_blocks_are_not_remembered_and_their_words_are_cut() -> None:
    """A thousand different ones would else stay for as long as the connection."""
    connection = connected()

    def refused(words: str) -> tuple[bytes, str]:
        """Refuse a call; return the header block, which leaves the decoder's table as it is, and what was said."""
        caller = called(connection)
        pairs = (("grpc-status", "7"), ("grpc-message", words))
        block = bytes(Encoder().encode([NeverIndexedHeaderTuple(*pair) for pair in pairs]))
        feed(connection, frame(wire.HEADERS, 5, caller.stream, block))
        ((code, said),) = caller.ends
        assert code is Code.PERMISSION_DENIED
        return block, said

    assert [refused(f"{number}" * 5_000)[1] for number in range(3)] == [
        f"{number}" * 1_000 for number in range(3)
    ]
    assert connection._heads == {}
    block, _ = refused("permission denied")
    assert set(connection._heads) == {block}


def test_a_web_page_is_no_response() -> None:
    """Its body is not read."""
    connection = connected()
    caller = called(connection)
    feed(connection, frame(wire.HEADERS, wire.END_HEADERS, 1, headers((":status", "502"))))
    assert caller.ends == [(Code.UNAVAILABLE, "HTTP status 502, not gRPC's")]
    feed(connection, frame(wire.DATA, 0, 1, b"<html>"))
    assert sent(connection)[-1] == (wire.RST_STREAM, 0, 1, struct.pack(">I", 8))


def test_a_response_without_trailers_is_no_good_end() -> None:
    """The data may be all of it, or not."""
    connection = connected()
    caller = called(connection)
    feed(connection, frame(wire.HEADERS, 4, 1, OK_HEAD) + frame(wire.DATA, wire.END_STREAM, 1, message(b"x")))
    assert caller.ends == [(Code.INTERNAL, "the response ends without a status")]


def test_a_reset_after_the_answer_is_normal_and_before_it_a_failure() -> None:
    """Go's server sends RST_STREAM(NO_ERROR) now and then when it has answered before we have ended."""
    connection = connected()
    done, broken = called(connection), called(connection)
    feed(connection, answer(1, b"x") + frame(wire.RST_STREAM, 0, 1, bytes(4)))
    feed(connection, frame(wire.RST_STREAM, 0, 3, struct.pack(">I", 7)))
    assert done.ends == [(Code.OK, "")]
    assert broken.ends == [(Code.UNAVAILABLE, "the server reset the call (HTTP/2 error 7)")]


def test_goodbye_fails_what_the_server_has_not_taken_and_lets_the_rest_end_well() -> None:
    """No new call is begun afterwards."""
    connection = connected()
    taken, lost = called(connection), called(connection)
    feed(connection, frame(wire.GOAWAY, 0, 0, struct.pack(">II", 1, 0) + b"too_many_pings"))
    assert lost.ends[0][0] is Code.UNAVAILABLE
    assert "too_many_pings" in (connection.closing or "")
    feed(connection, answer(1, b"x"))
    assert taken.ends == [(Code.OK, "")]


def test_answers_to_pings_wait_for_the_owner() -> None:
    """And their answers to us, which we never ask for, are passed over."""
    connection = connected()
    feed(connection, frame(wire.PING, 0, 0, b"12345678") + frame(wire.PING, wire.ACK, 0, bytes(8)))
    assert not connection.out
    assert connection.pongs == [frame(wire.PING, wire.ACK, 0, b"12345678")]


def test_what_the_server_does_not_take_yet_is_sent_when_it_does() -> None:
    """Both windows, the frame size, and a change of the first window behind a call's back."""
    connection = connected(frame(wire.SETTINGS, 0, 0, struct.pack(">HI", 4, 10)))
    caller = called(connection, b"z" * 40_000)
    (_, data) = sent(connection)
    assert data == (wire.DATA, 0, 1, message(b"z" * 40_000)[:10])
    feed(connection, frame(wire.WINDOW_UPDATE, 0, 1, struct.pack(">I", 20_000)))
    assert [len(payload) for _, _, _, payload in sent(connection)] == [16_384, 3_616]
    feed(connection, frame(wire.SETTINGS, 0, 0, struct.pack(">HI", 4, 100_010)))
    last = sent(connection)
    assert [(kind, flags) for kind, flags, _, _ in last][-1] == (wire.DATA, wire.END_STREAM)
    assert sum(len(payload) for kind, _, _, payload in last if kind == wire.DATA) == 40_005 - 10 - 20_000
    feed(connection, answer(1, b""))
    assert caller.ends == [(Code.OK, "")]


def test_the_connections_window_is_shared() -> None:
    """Who waits for it goes on in the order of waiting."""
    connection = connected(frame(wire.SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 20)))
    called(connection, b"a" * 65_000)
    called(connection, b"b" * 65_000)
    assert sum(len(p) for kind, _, _, p in sent(connection) if kind == wire.DATA) == 65_535
    feed(connection, frame(wire.WINDOW_UPDATE, 0, 0, struct.pack(">I", 100_000)))
    data = [(stream, flags) for kind, flags, stream, _ in sent(connection) if kind == wire.DATA]
    assert data[-1] == (3, wire.END_STREAM)


def test_credit_is_given_as_data_comes_but_not_for_what_nobody_has_taken() -> None:
    """A slow reader of a stream slows the server down."""

    class Slow(Caller):
        def on_message(self, message: bytes) -> None:
            super().on_message(message)
            connection.withhold(self, len(message))

    connection, caller = connected(most=64 << 20), Slow()
    connection.begin(caller, HEAD, None)
    whole = 3 * message(b"m" * (wire.STREAM_WINDOW // 4))

    def deliver() -> None:
        feed(connection, frame(wire.HEADERS, 4, 1, OK_HEAD))
        for at in range(0, len(whole), 16_384):
            feed(connection, frame(wire.DATA, 0, 1, whole[at : at + 16_384]))

    sent(connection)
    deliver()
    assert [stream for kind, _, stream, _ in sent(connection) if kind == wire.WINDOW_UPDATE] == [0]
    for one in caller.messages:
        connection.consumed(caller, len(one))
    assert [stream for kind, _, stream, _ in sent(connection) if kind == wire.WINDOW_UPDATE] == [1]


@pytest.mark.parametrize(
    "data", [message(b"x" * 2_000), message(b"x", compressed=1)], ids=["large", "compressed"]
)
def test_a_message_too_large_or_compressed_ends_its_call_only(data: bytes) -> None:
    """The connection goes on."""
    connection = connected(most=1_000)
    caller, other = called(connection), called(connection)
    feed(connection, frame(wire.HEADERS, 4, 1, OK_HEAD) + frame(wire.DATA, 0, 1, data))
    assert caller.ends[0][0] is Code.RESOURCE_EXHAUSTED
    feed(connection, answer(3, b"fine"))
    assert other.ends == [(Code.OK, "")]


def test_a_left_call_is_reset_and_told_nothing_more() -> None:
    """Its late answer is passed over."""
    connection = connected()
    caller = called(connection)
    sent(connection)
    connection.cancel(caller)
    connection.cancel(caller)
    assert sent(connection) == [(wire.RST_STREAM, 0, 1, struct.pack(">I", 8))]
    feed(connection, answer(1, b"late"))
    assert (caller.messages, caller.ends) == ([], [])


def test_used_up_stream_numbers_end_the_connection() -> None:
    """A billion calls are a day's work; the next connection starts over."""
    connection = connected()
    connection._next_stream = (1 << 31) - 1
    called(connection)
    assert "used up" in (connection.closing or "")
