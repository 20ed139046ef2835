"""Echo servers and measuring clients, run as children inside the lab's namespaces; standard library only.

``serve`` answers TCP and UDP on one port for every address that is local to its namespace. A UDP answer
leaves from the address that was asked, as a pod's would. ``probe`` opens its connections all at once, because
a miss is about the first packet, then measures round trips one after the other, and prints one JSON list.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from tests.support.namespaces import Namespace

PORT = 7777
RETRY_SECONDS = 1.0
"""A UDP client asks again after this long, as resolvers and TCP do."""


@dataclass(frozen=True)
class Probe:
    """What a client does: which addresses over which protocol, how patient it is, how many echoes follow.

    timeout: seconds for the first packet's answer, and again for each echo.
    stagger: seconds between two starts; zero starts all at once.
    source: the local address to bind to, None for the kernel's choice.
    """

    tcp: tuple[str, ...] = ()
    udp: tuple[str, ...] = ()
    timeout: float = 3.0
    echoes: int = 10
    stagger: float = 0.0
    port: int = PORT
    source: str | None = None


@dataclass(frozen=True)
class Exchange:
    """One connection or UDP exchange: round trips of its first packet and of the echoes, in milliseconds."""

    address: str
    protocol: str
    first_ms: float | None
    steady_ms: list[float] = field(default_factory=list)
    lost: int = 0
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the peer answered at all."""
        return self.first_ms is not None


def probe(namespace: Namespace, what: Probe) -> list[Exchange]:
    """Run one client inside a namespace and return an exchange for each address, TCP ones first."""
    with Client(namespace, what) as client:
        return client.result()


class Client:
    """A client at work inside a namespace, for tests that act while it waits."""

    def __init__(self, namespace: Namespace, what: Probe) -> None:
        self._patience = 30 + what.timeout * (what.echoes + 1) * 2
        self._process = namespace.popen(
            *_this_module("probe"),
            json.dumps(asdict(what)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> list[Exchange]:
        """Wait for the client's end."""
        out, err = self._process.communicate(timeout=self._patience)
        if self._process.returncode:
            raise RuntimeError(f"traffic client failed: {err.strip()}")
        return [Exchange(**row) for row in json.loads(out)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        _end(self._process)


class EchoServer:
    """An echo server process inside a namespace, up when entered."""

    def __init__(self, namespace: Namespace, port: int = PORT) -> None:
        self._namespace = namespace
        self._port = port

    def __enter__(self) -> Self:
        argv = _this_module("serve")
        self._process = self._namespace.popen(*argv, str(self._port), stdout=subprocess.PIPE, text=True)
        if self._process.stdout.readline() != "ready\n":
            _end(self._process)
            raise RuntimeError(
                f"the echo server in {self._namespace.name} did not start; see its words above"
            )
        return self

    def __exit__(self, *exc: object) -> None:
        _end(self._process)


def _this_module(role: str) -> list[str]:
    # Isolated and without site: such a child is up in 20 ms.
    return [sys.executable, "-I", "-S", str(Path(__file__)), role]


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


# The client side, inside the namespace.


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _milliseconds(since: float) -> float:
    return (time.perf_counter() - since) * 1000


async def _connect(what: Probe, address: str) -> tuple[Exchange, socket.socket]:
    sock = _client_socket(what, address, socket.SOCK_STREAM)
    began = time.perf_counter()
    try:
        async with asyncio.timeout(what.timeout):
            await asyncio.get_running_loop().sock_connect(sock, (address, what.port))
        return Exchange(address, "tcp", _milliseconds(began)), sock
    except OSError as error:
        return Exchange(address, "tcp", None, error=type(error).__name__), sock


async def _ask(what: Probe, address: str) -> tuple[Exchange, socket.socket]:
    sock = _client_socket(what, address, socket.SOCK_DGRAM)
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    sent = 0
    try:
        sock.connect((address, what.port))
        async with asyncio.timeout(what.timeout):
            while True:
                sock.send(b"first")
                sent += 1
                try:
                    async with asyncio.timeout(RETRY_SECONDS):
                        await loop.sock_recv(sock, 2048)
                except TimeoutError:
                    continue
                return Exchange(address, "udp", _milliseconds(began), lost=sent - 1), sock
    except OSError as error:
        return Exchange(address, "udp", None, lost=sent, error=type(error).__name__), sock


def _client_socket(what: Probe, address: str, kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(_family(address), kind)
    sock.setblocking(False)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if what.source:
        if sock.family == socket.AF_INET6:
            # A remote pod's address is local by route only, as in _udp_server.
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        sock.bind((what.source, 0))
    return sock


async def _first_packets(what: Probe) -> list[tuple[Exchange, socket.socket]]:
    tasks = []
    for ask, addresses in ((_connect, what.tcp), (_ask, what.udp)):
        for address in addresses:
            tasks.append(asyncio.create_task(ask(what, address)))
            await asyncio.sleep(what.stagger)
    return [await task for task in tasks]


def _echoes(what: Probe, exchange: Exchange, sock: socket.socket) -> Exchange:
    """Measure the round trips that follow; a lost one ends them, so that a dead peer costs one timeout."""
    steady: list[float] = []
    error = exchange.error
    sock.settimeout(what.timeout)
    try:
        for number in range(what.echoes if exchange.ok else 0):
            payload = b"echo %d" % number
            began = time.perf_counter()
            sock.send(payload)
            # A late answer to a repeated first datagram is not the answer to this one.
            while sock.recv(2048) != payload:
                pass
            steady.append(_milliseconds(began))
    except OSError as problem:
        error = type(problem).__name__
    return Exchange(exchange.address, exchange.protocol, exchange.first_ms, steady, exchange.lost, error)


def _probe_main(what: Probe) -> None:
    rows = []
    for exchange, sock in asyncio.run(_first_packets(what)):
        with sock:
            rows.append(asdict(_echoes(what, exchange, sock)))
    json.dump(rows, sys.stdout)


# The server side, inside the namespace.


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


def _udp_server(family: socket.AddressFamily, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        # The remote pods' addresses are local by route only; IPv6 answers from such when told.
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    sock.bind(("", port))
    sock.setblocking(False)
    return sock


_IP_PKTINFO, _IPV6_FREEBIND = 8, 78
"""From linux/in.h and linux/in6.h; the socket module of Python 3.11 lacks them."""


def _answer(sock: socket.socket) -> None:
    """Send a datagram back from the address that was asked, which a wildcard socket does only when told."""
    data, ancillary, _flags, peer = sock.recvmsg(2048, 256)
    sock.sendmsg([data], [_as_source(*item) for item in ancillary], 0, peer)


def _as_source(level: int, kind: int, info: bytes) -> tuple[int, int, bytes]:
    if level == socket.IPPROTO_IP:
        _index, _local, destination = struct.unpack("=I4s4s", info)
        info = struct.pack("=I4s4s", 0, destination, bytes(4))
    else:
        info = info[:16] + bytes(4)
    return level, kind, info


async def _serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    for family in (socket.AF_INET, socket.AF_INET6):
        await asyncio.start_server(_echo, "0.0.0.0" if family == socket.AF_INET else "::", port, backlog=4096)
        sock = _udp_server(family, port)
        loop.add_reader(sock, _answer, sock)
    print("ready", flush=True)
    await asyncio.Event().wait()


def _main(role: str, argument: str) -> None:
    # Thousands of connections need more descriptors than a login shell is given.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if role == "serve":
        asyncio.run(_serve(int(argument)))
    else:
        options: dict[str, Any] = json.loads(argument)
        _probe_main(Probe(**options))


if __name__ == "__main__":
    _main(*sys.argv[1:])
