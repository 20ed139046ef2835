"""A UDP flow that a test drives packet by packet, from inside its own process."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from tests.support.traffic import PORT

if TYPE_CHECKING:
    from tests.support.lab import Pod


class Flow:
    """One UDP flow of a pod to a peer that echoes; the same ports for all its packets."""

    def __init__(self, pod: Pod, address: str) -> None:
        self._sock = pod.namespace.call(self._connect, address)
        self._number = 0

    @staticmethod
    def _connect(address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((address, PORT))
        return sock

    def passes(self, patience: float = 3.0) -> bool:
        """Send one packet and tell whether it was answered."""
        self._number += 1
        payload = b"%d" % self._number
        self._sock.settimeout(patience)
        self._sock.send(payload)
        try:
            while self._sock.recv(64) != payload:
                pass
        except TimeoutError:
            return False
        return True

    def is_lost(self, patience: float = 0.1) -> bool:
        """Send one packet and tell whether it was not answered; less patient, since a loss takes all of it."""
        return not self.passes(patience)

    def close(self) -> None:
        """Hang up."""
        self._sock.close()
