"""HTTP/2 as a gRPC client uses it, without I/O: the server's bytes in, bytes for the server and outcomes out.

RFC 9113 frames, RFC 7541 headers (by the hpack library, with a dynamic table of size zero, so that equal header
blocks mean equal headers and each is decoded once), and gRPC's five-byte prefix of every message. The server is not
trusted: whatever it sends, nothing but ProtocolError is raised. native.py moves the bytes.

Flow control: received bytes are credited as they arrive, except complete messages of a stream that wait to be
consumed; so a slow reader slows the server down, and nothing here grows without bound.
"""

from __future__ import annotations

import struct
from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import unquote

from hpack import Decoder, Encoder, HPACKError, NeverIndexedHeaderTuple
from msgspec import Struct, field

from lazymesh.kvstore.channel import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazymesh.kvstore.channel import Metadata

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME = struct.Struct(">HBBBI")
_PREFIX = struct.Struct(">BI")
_MESSAGE = struct.Struct(">HBBBIBI")
"""The header of a DATA frame, and the prefix of the message that it holds."""
_SETTING = struct.Struct(">HI")
_U32 = struct.Struct(">I")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 0x1, 0x1, 0x4, 0x8, 0x20
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_STREAMS, _INITIAL_WINDOW, _MAX_FRAME = 1, 2, 3, 4, 5

_DEFAULT_WINDOW = 65_535
_MOST = (1 << 31) - 1
FRAME_SIZE = 16_384
"""The largest frame that we accept: the default, and the most that Go's servers ever send."""
STREAM_WINDOW = 16 << 20
"""Large enough for a page of 1,000 records without waiting for credit."""
_CREDIT_AT = STREAM_WINDOW // 2
_HEADERS_MOST = 64 << 10
_REMEMBERED_MOST = 512
"""Longest header block that is decoded once only: etcd's have less than 100 bytes."""
_REASON_MOST = 1_000

_BY_RESET = {
    0x0: Code.INTERNAL,
    0x7: Code.UNAVAILABLE,
    0x8: Code.CANCELLED,
    0xB: Code.RESOURCE_EXHAUSTED,
    0xC: Code.PERMISSION_DENIED,
}
_BY_HTTP = {
    "400": Code.INTERNAL,
    "401": Code.UNAUTHENTICATED,
    "403": Code.PERMISSION_DENIED,
    "404": Code.UNIMPLEMENTED,
    **dict.fromkeys(("429", "502", "503", "504"), Code.UNAVAILABLE),
}
"""gRPC's mapping of HTTP/2 resets and of answers from something that is not a gRPC server."""
_CANCEL = 0x8


class ProtocolError(Exception):
    """The server violates the protocol, or speaks another one: the connection cannot be used any more."""


class Exchange(Struct, eq=False):
    """One call on its own stream."""

    stream: int = 0
    window: int = 0
    """How many bytes the server accepts on this stream."""
    outgoing: deque[bytes] = field(default_factory=deque)
    """Messages that the windows have not admitted yet."""
    unsent_end: bool = False
    sent_all: bool = False
    head: bool = False
    """The response's headers have arrived."""
    body: bytearray = field(default_factory=bytearray)
    """The beginning of an incomplete message."""
    uncredited: int = 0
    """Bytes received since the server was last given credit."""
    withheld: int = 0
    """Bytes of messages waiting to be consumed."""
    ended: bool = False

    def on_message(self, message: bytes) -> None:
        """Take one complete message."""
        raise NotImplementedError

    def on_end(self, code: Code, details: str) -> None:
        """Take the outcome: once, after the last message."""
        raise NotImplementedError


class Wire:
    """One connection, from the preface on. Bytes to be sent collect in ``out``."""

    def __init__(self, max_message_bytes: int) -> None:
        settings = ((_HEADER_TABLE_SIZE, 0), (_ENABLE_PUSH, 0), (_INITIAL_WINDOW, STREAM_WINDOW))
        self.out: list[bytes] = [
            PREFACE,
            _frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*pair) for pair in settings)),
            _frame(WINDOW_UPDATE, 0, 0, _U32.pack(_MOST - _DEFAULT_WINDOW)),
        ]
        self.pongs: list[bytes] = []
        """Answers to pings, for ``out`` when the owner thinks it is time."""
        self.exchanges: dict[int, Exchange] = {}
        self.closing: str | None = None
        """Why the server accepts no new calls; those in flight may still succeed."""
        self.ready = False
        """The server has proved that it speaks HTTP/2."""
        self.max_streams = _MOST
        self._max_message = max_message_bytes
        self._next_stream = 1
        self._window = _DEFAULT_WINDOW
        self._first_window = _DEFAULT_WINDOW
        self._frame_size = FRAME_SIZE
        self._uncredited = 0
        self._blocked: dict[int, Exchange] = {}
        self._decoder = Decoder(max_header_list_size=_HEADERS_MOST)
        self._heads: dict[bytes, _Head] = {}
        self._unfinished: tuple[int, int, bytearray] | None = None
        """Stream, flags and beginning of a header block that continues in the next frame."""
        self._handlers: dict[int, Callable[[int, int, memoryview], None]] = {
            DATA: self._data,
            HEADERS: self._headers,
            RST_STREAM: self._reset,
            SETTINGS: self._settings,
            PUSH_PROMISE: self._push,
            PING: self._ping,
            GOAWAY: self._goaway,
            WINDOW_UPDATE: self._window_update,
            CONTINUATION: self._continuation,
        }

    # --- our side ------------------------------------------------------------------------------------------------

    def begin(self, exchange: Exchange, head: bytes, message: bytes | None) -> None:
        """Begin a call: with its only message, or with None for a stream, whose messages ``send`` takes."""
        stream = exchange.stream = self._next_stream
        self._next_stream += 2
        if self._next_stream > _MOST:
            self.closing = "all stream numbers of the connection are used up"
        self.exchanges[stream] = exchange
        exchange.window = self._first_window
        start = _frame(HEADERS, END_HEADERS, stream, head)
        if message is None:
            self.out.append(start)
            self._flush(exchange)
            return
        size = _PREFIX.size + len(message)
        exchange.unsent_end = True
        if size <= min(self._window, exchange.window, self._frame_size):
            self._window -= size
            exchange.window -= size
            exchange.sent_all = True
            rest = _MESSAGE.pack(size >> 8, size & 0xFF, DATA, END_STREAM, stream, 0, len(message))
            self.out.append(start + rest + message)
        else:
            self.out.append(start)
            self.send(exchange, message)

    def send(self, exchange: Exchange, message: bytes) -> None:
        """Send one message, as far as the windows allow now, and the rest later."""
        exchange.outgoing.append(_PREFIX.pack(0, len(message)) + message)
        if exchange.stream:
            self._flush(exchange)

    def finish(self, exchange: Exchange) -> None:
        """Send no more messages."""
        exchange.unsent_end = True
        if exchange.stream:
            self._flush(exchange)

    def consumed(self, exchange: Exchange, size: int) -> None:
        """Give the server credit for a message that has been consumed."""
        exchange.withheld -= size + _PREFIX.size
        self._credit(exchange)

    def withhold(self, exchange: Exchange, size: int) -> None:
        """Give the server no credit for a message until it is ``consumed``."""
        exchange.withheld += size + _PREFIX.size

    def cancel(self, exchange: Exchange) -> None:
        """Abandon a call: its callbacks are not called any more."""
        if not exchange.ended:
            self._forget(exchange)
            self.out.append(_frame(RST_STREAM, 0, exchange.stream, _U32.pack(_CANCEL)))

    def fail(self, code: Code, details: str) -> None:
        """End every call: the connection is gone."""
        self.closing = self.closing or details
        for exchange in list(self.exchanges.values()):
            self._end(exchange, code, details)

    # --- the server's side ---------------------------------------------------------------------------------------

    def feed(self, data: memoryview) -> int:
        """Take received bytes; return the length of the complete frames. Feed the rest again, with what follows it."""
        at, end = 0, len(data)
        while end - at >= _FRAME.size:
            high, low, kind, flags, stream = _FRAME.unpack_from(data, at)
            length = high << 8 | low
            if not self.ready and kind != SETTINGS:
                raise ProtocolError("the server does not speak HTTP/2")
            if length > FRAME_SIZE:
                raise ProtocolError(f"a frame of {length} bytes")
            if end - at - _FRAME.size < length:
                break
            self.ready = True
            at += _FRAME.size
            if self._unfinished and kind != CONTINUATION:
                raise ProtocolError("a header block that is not continued")
            handler = self._handlers.get(kind)
            if handler:  # unknown kinds must be ignored (RFC 9113)
                handler(flags, stream & _MOST, data[at : at + length])
            at += length
        return at

    def _data(self, flags: int, stream: int, payload: memoryview) -> None:
        self._uncredited += len(payload)
        if self._uncredited > _CREDIT_AT:
            self.out.append(_frame(WINDOW_UPDATE, 0, 0, _U32.pack(self._uncredited)))
            self._uncredited = 0
        exchange = self.exchanges.get(stream) or self._exchange(stream)
        if exchange is None:
            return
        if not exchange.head:
            raise ProtocolError("a response without a head")
        exchange.uncredited += len(payload)
        self._messages(exchange, _without_padding(payload) if flags & PADDED else payload)
        if exchange.ended:
            return
        if flags & END_STREAM:
            self._end(exchange, Code.INTERNAL, "the response ends without a status")
        elif exchange.uncredited >= _CREDIT_AT:
            self._credit(exchange)

    def _messages(self, exchange: Exchange, data: memoryview) -> None:
        """Split the stream's bytes into messages."""
        body = exchange.body
        if not body and len(data) >= _PREFIX.size:
            # Most responses are one frame: copied only once.
            packed, size = _PREFIX.unpack_from(data)
            if not packed and len(data) == size + _PREFIX.size and size <= self._max_message:
                exchange.on_message(bytes(data[_PREFIX.size :]))
                return
        body += data
        while len(body) >= _PREFIX.size:
            packed, size = _PREFIX.unpack_from(body)
            if packed or size > self._max_message:
                what = "a compressed message" if packed else f"a message of {size} bytes"
                self.cancel(exchange)
                exchange.on_end(Code.RESOURCE_EXHAUSTED, f"{what}, which is not accepted")
                return
            if len(body) - _PREFIX.size < size:
                return
            with memoryview(body) as whole:  # a slice of the bytearray would be one more copy
                message = bytes(whole[_PREFIX.size : _PREFIX.size + size])
            del body[: _PREFIX.size + size]
            exchange.on_message(message)

    def _credit(self, exchange: Exchange) -> None:
        due = exchange.uncredited - exchange.withheld
        if due >= _CREDIT_AT and not exchange.ended:
            exchange.uncredited -= due
            self.out.append(_frame(WINDOW_UPDATE, 0, exchange.stream, _U32.pack(due)))

    def _headers(self, flags: int, stream: int, payload: memoryview) -> None:
        block = _without_padding(payload) if flags & PADDED else payload
        if flags & PRIORITISED:
            if len(block) < 5:
                raise ProtocolError("HEADERS too short")
            block = block[5:]
        if flags & END_HEADERS:
            self._head(flags, stream, bytes(block))
        else:
            self._unfinished = (stream, flags, bytearray(block))

    def _continuation(self, flags: int, stream: int, payload: memoryview) -> None:
        if self._unfinished is None or self._unfinished[0] != stream:
            raise ProtocolError("a continuation of nothing")
        _, first_flags, block = self._unfinished
        block += payload
        if len(block) > _HEADERS_MOST:
            raise ProtocolError("a header block without end")
        if flags & END_HEADERS:
            self._unfinished = None
            self._head(first_flags, stream, bytes(block))

    def _head(self, flags: int, stream: int, block: bytes) -> None:
        head = self._heads.get(block) or self._decode(block)
        exchange = self.exchanges.get(stream) or self._exchange(stream)
        if exchange is None:
            return
        if flags & END_STREAM:
            self._end(exchange, *head.outcome(after_body=exchange.head))
        elif head.status.startswith("1"):
            return
        elif head.status != "200":
            self.cancel(exchange)
            exchange.on_end(*head.outcome(after_body=False))
        else:
            exchange.head = True

    def _decode(self, block: bytes) -> _Head:
        try:
            pairs = self._decoder.decode(block)
        except (HPACKError, UnicodeDecodeError, IndexError, ValueError) as exc:
            raise ProtocolError(f"headers that cannot be decoded ({type(exc).__name__})") from exc
        head = _Head({str(name): str(value) for name, value in pairs})
        # A block that changes the table means something else the second time. (Our table has size zero, but a server
        # may not know that yet.)
        resizes = b"\x20" <= block[:1] < b"\x40"
        if not self._decoder.header_table.dynamic_entries and not resizes and len(block) <= _REMEMBERED_MOST:
            if len(self._heads) > 1_000:
                self._heads.clear()
            self._heads[block] = head
        return head

    def _reset(self, _flags: int, stream: int, payload: memoryview) -> None:
        (reason,) = self._unpack(_U32, payload)
        exchange = self._exchange(stream)
        # For a call that has ended it only means that the server does not need the rest of the request.
        if exchange is not None:
            code = _BY_RESET.get(reason, Code.INTERNAL)
            self._end(exchange, code, f"the server reset the call (HTTP/2 error {reason})")

    def _settings(self, flags: int, stream: int, payload: memoryview) -> None:
        if stream or len(payload) % _SETTING.size:
            raise ProtocolError("malformed SETTINGS")
        if flags & ACK:
            return
        for name, value in _SETTING.iter_unpack(payload):
            if name == _MAX_STREAMS:
                self.max_streams = max(1, value)
            elif name == _INITIAL_WINDOW:
                if value > _MOST:
                    raise ProtocolError("a window too large")
                for exchange in self.exchanges.values():
                    exchange.window += value - self._first_window
                self._first_window = value
            elif name == _MAX_FRAME:
                if not FRAME_SIZE <= value < 1 << 24:
                    raise ProtocolError("an invalid frame size")
                self._frame_size = value
        self.out.append(_frame(SETTINGS, ACK, 0, b""))
        self._unblock()

    def _push(self, _flags: int, _stream: int, _payload: memoryview) -> None:
        raise ProtocolError("a push that was not requested")

    def _ping(self, flags: int, _stream: int, payload: memoryview) -> None:
        if len(payload) != 8:
            raise ProtocolError("malformed PING")
        if not flags & ACK:
            if len(self.pongs) > 100:
                raise ProtocolError("a flood of pings")
            self.pongs.append(_frame(PING, ACK, 0, bytes(payload)))

    def _goaway(self, _flags: int, _stream: int, payload: memoryview) -> None:
        if len(payload) < 8:
            raise ProtocolError("malformed GOAWAY")
        last, reason = _U32.unpack_from(payload)[0] & _MOST, _U32.unpack_from(payload, 4)[0]
        words = bytes(payload[8 : 8 + _REASON_MOST]).decode(errors="replace")
        self.closing = f"the server ends the connection (HTTP/2 error {reason}{words and ', '}{words})"
        for exchange in [one for number, one in self.exchanges.items() if number > last]:
            self._end(exchange, Code.UNAVAILABLE, self.closing)

    def _window_update(self, _flags: int, stream: int, payload: memoryview) -> None:
        more = self._unpack(_U32, payload)[0] & _MOST
        if not more:
            raise ProtocolError("a window update of nothing")
        if not stream:
            self._window += more
            if self._window > _MOST:
                raise ProtocolError("a window too large")
            self._unblock()
            return
        exchange = self._exchange(stream)
        if exchange is not None:
            exchange.window += more
            if exchange.window > _MOST:
                raise ProtocolError("a window too large")
            self._flush(exchange)

    # --- inside -------------------------------------------------------------------------------------------------

    def _exchange(self, stream: int) -> Exchange | None:
        """Return the call of a stream, None for one that has ended; ProtocolError for one that never was."""
        exchange = self.exchanges.get(stream)
        if exchange is None and (stream >= self._next_stream or not stream & 1):
            raise ProtocolError(f"stream {stream}, which we never opened")
        return exchange

    def _unblock(self) -> None:
        for exchange in list(self._blocked.values()):
            self._flush(exchange)

    def _flush(self, exchange: Exchange) -> None:
        """Send as much as the windows allow."""
        outgoing = exchange.outgoing
        while outgoing:
            data = outgoing[0]
            room = min(len(data), self._window, exchange.window, self._frame_size)
            if room <= 0:
                self._blocked[exchange.stream] = exchange
                return
            if room == len(data):
                outgoing.popleft()
            else:
                outgoing[0] = data[room:]
                data = data[:room]
            self._window -= room
            exchange.window -= room
            last = exchange.unsent_end and not outgoing
            exchange.sent_all |= last
            self.out.append(_frame(DATA, END_STREAM if last else 0, exchange.stream, data))
        self._blocked.pop(exchange.stream, None)
        if exchange.unsent_end and not exchange.sent_all:
            exchange.sent_all = True
            self.out.append(_frame(DATA, END_STREAM, exchange.stream, b""))

    def _end(self, exchange: Exchange, code: Code, details: str) -> None:
        if not exchange.sent_all and not self.closing:
            # Our half is still open: a reset closes it.
            self.out.append(_frame(RST_STREAM, 0, exchange.stream, _U32.pack(_CANCEL)))
        self._forget(exchange)
        exchange.on_end(code, details)

    def _forget(self, exchange: Exchange) -> None:
        exchange.ended = True
        exchange.outgoing.clear()
        del self.exchanges[exchange.stream]
        self._blocked.pop(exchange.stream, None)

    @staticmethod
    def _unpack(layout: struct.Struct, payload: memoryview) -> tuple[int, ...]:
        if len(payload) != layout.size:
            raise ProtocolError("a frame of the wrong size")
        return layout.unpack(payload)


class _Head:
    """The relevant headers of one block."""

    __slots__ = ("code", "message", "status")

    def __init__(self, headers: dict[str, str]) -> None:
        self.status = headers.get(":status", "200")
        self.message = unquote(headers.get("grpc-message", "")[:_REASON_MOST], errors="replace")
        number = headers.get("grpc-status", "")
        self.code: Code | None = None
        if number:
            known = number.isdecimal() and len(number) < 3 and int(number) <= max(Code)
            self.code = Code(int(number)) if known else Code.UNKNOWN

    def outcome(self, *, after_body: bool) -> tuple[Code, str]:
        """Return the status that ends a response, from its trailers or its only headers."""
        if self.code is not None:
            return self.code, self.message
        if after_body or self.status == "200":
            return Code.UNKNOWN, "the response ends without a status"
        return _BY_HTTP.get(self.status, Code.UNKNOWN), f"HTTP status {self.status}, not gRPC's"


@lru_cache(maxsize=256)
def request_head(scheme: str, authority: str, path: str, metadata: Metadata, timeout_ms: int | None) -> bytes:
    """Return the header block of a call; equal calls have equal blocks, as no dynamic table is used."""
    pairs = [
        (":method", "POST"),
        (":scheme", scheme),
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "lazymesh"),
        *metadata,
    ]
    if timeout_ms is not None:
        pairs.append(("grpc-timeout", f"{min(timeout_ms, 99_999_999)}m"))
    return bytes(Encoder().encode([NeverIndexedHeaderTuple(*pair) for pair in pairs]))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    length = len(payload)
    return _FRAME.pack(length >> 8, length & 0xFF, kind, flags, stream) + payload


def _without_padding(payload: memoryview) -> memoryview:
    if not payload or payload[0] >= len(payload):
        raise ProtocolError("padding longer than its frame")
    return payload[1 : len(payload) - payload[0]]
