"""TLS between a connection's bytes and what they say: OpenSSL on two buffers, with nothing around it.

asyncio can do it, too, in layers that are a twentieth of a lone read (measured), and with 256 KiB for each connection.
"""

from __future__ import annotations

import ssl
from typing import Any


class TlsStream:
    """One side of one connection, a client's. Its owner moves the sealed bytes: ``feed`` them, send ``to_send``."""

    def __init__(self, context: ssl.SSLContext, server_hostname: str) -> None:
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_hostname=server_hostname)
        self.established = False
        """The handshake is over as far as we are concerned; the server may still refuse our certificate."""
        self.ended = False
        """Nothing more can come: the server has said so, or there is an error."""
        self.error: ssl.SSLError | None = None
        """Why; what is ``to_send`` then tells the server."""

    def shake_hands(self) -> None:
        """Begin the handshake, or go on with it as far as what was received allows."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as exc:
            self.ended, self.error = True, exc
        else:
            self.established = True

    def feed(self, sealed: memoryview) -> None:
        """Take what was received."""
        self._received.write(sealed)

    def open_into(self, room: memoryview) -> int:
        """Open what was fed, as much as there is room for; return its length, 0 when there is no more.

        Each look opens one record, and servers may need several for one answer.
        """
        read: Any = self._tls.read  # into a buffer it returns a length, whatever its stub says
        received, pending = self._received, self._tls.pending
        length = 0
        try:
            while length < len(room) and (received.pending or pending()) and not self.ended:
                opened = read(len(room) - length, room[length:])
                if not opened:
                    self.ended = True
                    break
                length += opened
        except ssl.SSLWantReadError:  # a part of a record, or one that is for TLS itself
            pass
        except ssl.SSLError as exc:
            self.ended, self.error = True, exc
        return length

    def seal(self, data: bytes) -> None:
        """Make something ready to be sent: after the handshake, and before the end."""
        self._tls.write(data)

    def to_send(self) -> bytes:
        """Return what is to be sent, once."""
        return self._to_send.read()
