"""TLS for a connection: OpenSSL on two memory buffers, with nothing around it.

asyncio's own layers would cost 4 to 5 % of a single read (measured) and 256 KiB for each connection.
"""

from __future__ import annotations

import ssl
from typing import Any


class TlsStream:
    """The client side of one connection.

    Its owner moves the encrypted bytes: ``feed`` them in, send what ``seal`` and ``to_send`` return.
    """

    def __init__(self, context: ssl.SSLContext, server_hostname: str) -> None:
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_hostname=server_hostname)
        self.feed = self._received.write
        """Takes received bytes."""
        self._full = False
        """There was no room for all that the last read could have opened."""
        self.established = False
        """Our side of the handshake is over; the server may still refuse our certificate."""
        self.ended = False
        """Nothing more can come: the server has closed the stream, or there is an error."""
        self.error: ssl.SSLError | None = None
        """The error, if there is one; ``to_send`` then holds the alert for the server."""

    def shake_hands(self) -> None:
        """Begin or continue the handshake, as far as the received bytes allow."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as exc:
            self.ended, self.error = True, exc
        else:
            self.established = True

    def open_into(self, room: memoryview) -> int:
        """Decrypt what was fed, as far as there is room; return its length, 0 when there is no more.

        Each read decrypts one record, and a server may use several for one answer.
        """
        read: Any = self._tls.read  # into a buffer it returns a length, whatever its stub says
        received, length = self._received, 0
        try:
            # Only where there was no room for it all, a part of a record may wait within.
            while length < len(room) and (received.pending or self._full) and not self.ended:
                opened = read(len(room) - length, room[length:])
                if not opened:
                    self.ended = True
                    break
                length += opened
                self._full = length == len(room)
        except ssl.SSLWantReadError:  # part of a record, or a record for TLS itself
            self._full = False
        except ssl.SSLError as exc:
            self.ended, self.error = True, exc
        return length

    def seal(self, data: bytes) -> bytes:
        """Return data encrypted, behind whatever is ``to_send``; only after the handshake and before the end."""
        self._tls.write(data)
        return self._to_send.read()

    def to_send(self) -> bytes:
        """Return the bytes to be sent, once."""
        return self._to_send.read()
