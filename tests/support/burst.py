"""Traffic that is counted where it arrives: datagrams by the hundred, streams, and what the kernel says of both.

Everything runs in threads inside the lab's namespaces. A sink's buffer is larger than any burst, so what it lacks was
lost on the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.namespaces import Namespace

PORT = 9_009
_SO_RCVBUFFORCE, _IP_PKTINFO, _UDP_SEGMENT = 33, 8, 103
_BUFFER = 64 << 20


@dataclass
class Arrived:
    """One datagram at the sink."""

    address: str
    """Whom it was sent to."""
    data: bytes
    at: float


class Sink:
    """Takes every datagram to one port of a namespace, for whichever address."""

    def __init__(self, namespace: Namespace, family: int = 4, port: int = PORT) -> None:
        self.arrived: list[Arrived] = []
        self._socket = namespace.call(_sink_socket, family, port)
        self._socket.settimeout(0.05)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def wait(self, count: int, patience_s: float = 5.0) -> list[Arrived]:
        """Return what has arrived once it is so much, or nothing more comes."""
        until = time.monotonic() + patience_s
        while len(self.arrived) < count and time.monotonic() < until:
            time.sleep(0.01)
        return list(self.arrived)

    def by_address(self) -> dict[str, list[bytes]]:
        """Return what has arrived for each address, in order."""
        found: dict[str, list[bytes]] = {}
        for each in list(self.arrived):
            found.setdefault(each.address, []).append(each.data)
        return found

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                data, ancillary, _, _ = self._socket.recvmsg(65_536, 256)
                self.arrived.append(Arrived(_target(ancillary), data, time.monotonic()))


def _sink_socket(family: int, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    if family == 6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    sock.bind(("", port))
    return sock


def _target(ancillary: list[tuple[int, int, bytes]]) -> str:
    (_, _, info) = ancillary[0]
    if len(info) == 12:
        return socket.inet_ntop(socket.AF_INET, info[8:12])
    return socket.inet_ntop(socket.AF_INET6, info[:16])


def send(
    namespace: Namespace, addresses: Iterable[str], count: int = 1, size: int = 0, *, gso: int = 0
) -> None:
    """Send numbered datagrams back to back: ``count`` to the first address, then to the next.

    gso: hand the kernel all of an address' at once, to be cut up into pieces of this size.
    """

    def run() -> None:
        with contextlib.ExitStack() as stack:
            sockets = {
                family: stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
                for family in (socket.AF_INET, socket.AF_INET6)
            }
            for address in addresses:
                sock = sockets[socket.AF_INET6 if ":" in address else socket.AF_INET]
                sock.setsockopt(socket.SOL_SOCKET, 32, _BUFFER)  # SO_SNDBUFFORCE
                if gso:
                    sock.setsockopt(socket.SOL_UDP if hasattr(socket, "SOL_UDP") else 17, _UDP_SEGMENT, gso)
                    sock.sendto(b"".join(numbered(count, gso)), (address, PORT))
                    continue
                for data in numbered(count, size):
                    sock.sendto(data, (address, PORT))

    namespace.call(run)


def numbered(count: int, size: int = 0) -> list[bytes]:
    """Return datagrams that tell their place."""
    return [struct.pack("!I", number).ljust(size, b".") for number in range(count)]


class Ticker:
    """Sends a datagram every few milliseconds, to a known peer and to an address never used before."""

    def __init__(
        self, namespace: Namespace, known: str, fresh: Iterable[str], every_s: float = 0.002
    ) -> None:
        self.sent: list[tuple[str, float]] = []
        """To whom, and when."""
        self._known, self._fresh, self._every_s = known, iter(fresh), every_s
        self._socket: socket.socket = namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send nothing more."""
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        for number, fresh in enumerate(self._fresh):
            for address in (self._known, fresh):
                now = time.monotonic()
                self.sent.append((address, now))
                # A host without a listener may have told an earlier datagram's sender so.
                with contextlib.suppress(ConnectionRefusedError):
                    self._socket.sendto(struct.pack("!Id", number, now), (address, PORT))
            if self._stop.wait(self._every_s):
                return


@dataclass
class Stream:
    """What became of a TCP stream."""

    equal: bool
    seconds: float
    retransmitted: int
    checksum_errors: int
    out_of_order: int
    counters: dict[str, int] = field(default_factory=dict)


def stream(pod: Namespace, node: Namespace, address: str, megabytes: int) -> Stream:
    """Send so much from a pod to an address that is local to the node; both sides hash."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server: socket.socket = node.call(socket.socket, family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("", PORT))
    server.listen()
    before = counters(pod), counters(node)
    received = hashlib.sha256()

    def receive() -> None:
        connection, _ = server.accept()
        with connection:
            while data := connection.recv(1 << 18):
                received.update(data)

    thread = threading.Thread(target=receive)
    thread.start()
    began = time.monotonic()
    sent = pod.call(_send_stream, family, address, megabytes)
    thread.join()
    seconds = time.monotonic() - began
    server.close()
    after = counters(pod), counters(node)
    return Stream(
        equal=sent == received.hexdigest(),
        seconds=seconds,
        retransmitted=after[0]["Tcp.RetransSegs"] - before[0]["Tcp.RetransSegs"],
        checksum_errors=after[1]["Tcp.InCsumErrors"] - before[1]["Tcp.InCsumErrors"],
        out_of_order=after[1]["TcpExt.TCPOFOQueue"] - before[1]["TcpExt.TCPOFOQueue"],
    )


def _send_stream(family: socket.AddressFamily, address: str, megabytes: int) -> str:
    digest = hashlib.sha256()
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        sock.connect((address, PORT))
        for number in range(megabytes):
            block = hashlib.sha256(b"%d" % number).digest() * 32_768
            digest.update(block)
            sock.sendall(block)
    return digest.hexdigest()


def counters(namespace: Namespace) -> dict[str, int]:
    """Return the kernel's TCP and IP counters of a namespace, as ``Tcp.RetransSegs``."""
    return namespace.call(_read_counters)


def _read_counters() -> dict[str, int]:
    found: dict[str, int] = {}
    for name in ("snmp", "netstat"):
        lines = Path("/proc/thread-self/net", name).read_text(encoding="ascii").splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            kind, *words = names.split()
            numbers = map(int, values.split()[1:])
            found |= {f"{kind[:-1]}.{word}": number for word, number in zip(words, numbers, strict=True)}
    return found
