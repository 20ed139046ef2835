"""Traffic by the clock: established UDP flows and new TCP connections, each packet numbered, each with its fate.

The oracle of whoever claims that nothing was lost: losses are counted for each flow, with their moments. A process of
its own inside a pod's namespace, so that neither a test nor a stand-in's threads make it late.
"""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.namespaces import Namespace

PORT = 7777
LATE_S = 0.9
"""A connection that takes longer has lost its first SYN: the kernel sends another one after a second."""


@dataclass(frozen=True)
class Pulse:
    """What is sent."""

    flows: Sequence[str]
    """Addresses of the established flows; one datagram each in turn."""
    fresh: Sequence[str]
    """Addresses of new connections, one after the other, over and over."""
    flow_every_s: float = 0.1
    """Between two datagrams of a flow."""
    fresh_every_s: float = 0.01
    port: int = PORT


@dataclass
class Fates:
    """What became of every packet that was sent."""

    began: float = 0.0
    """Of time.monotonic(), like all other moments here."""
    flows: list[tuple[float, float | None]] = field(default_factory=list)
    """When a datagram was sent, and how many seconds later its answer came; None: never."""
    fresh: list[tuple[float, float | None]] = field(default_factory=list)
    """The same of a connection's SYN."""
    peers: list[str] = field(default_factory=list)
    """The flows' addresses; datagram number n was sent to the one at n modulo their number."""

    def losses(self) -> dict[str, list[float]]:
        """Return the addresses of flows that lost datagrams, with the moments at which these were sent."""
        found: dict[str, list[float]] = {}
        for number, (at, took) in enumerate(self.flows):
            if took is None:
                found.setdefault(self.peers[number % len(self.peers)], []).append(at)
        return found

    @property
    def lost(self) -> int:
        """How many packets were lost."""
        return sum(1 for _, took in (*self.flows, *self.fresh) if took is None)

    def per_bin(self, seconds: float = 0.1) -> list[tuple[int, int]]:
        """Return for each stretch of time how many packets were sent, and how many of these were lost."""
        rows: dict[int, list[int]] = {}
        for at, took in (*self.flows, *self.fresh):
            row = rows.setdefault(int((at - self.began) / seconds), [0, 0])
            row[0] += 1
            row[1] += took is None
        return [(rows[n][0], rows[n][1]) if n in rows else (0, 0) for n in range(max(rows, default=-1) + 1)]


class Sender:
    """Sends from entering on, until ``stop``."""

    def __init__(self, namespace: Namespace, what: Pulse) -> None:
        self._process: subprocess.Popen[str] = namespace.popen(
            # Isolated and without site: up in 20 ms.
            *(sys.executable, "-I", "-S", str(Path(__file__))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(asdict(what)) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def stop(self) -> Fates:
        """Send nothing more, wait for answers that are under way, and return what became of everything."""
        text, _ = self._process.communicate("stop\n", timeout=30)
        return Fates(**json.loads(text))


# Inside the namespace.


class _Loop:
    def __init__(self, what: dict[str, Any]) -> None:
        self._what = what
        self._selector = selectors.DefaultSelector()
        self._fates = Fates(time.monotonic(), peers=list(what["flows"]))
        self._flows = [self._flow(address) for address in what["flows"]]
        self._open: dict[socket.socket, int] = {}
        """New connections that are under way, oldest first, with their index in the list."""
        self._turn = 0

    def _flow(self, address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((address, self._what["port"]))
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, self._on_answer)
        return sock

    def run(self) -> Fates:
        self._selector.register(sys.stdin, selectors.EVENT_READ, None)
        print("ready", flush=True)
        next_flow = next_fresh = time.monotonic()
        flow_every = self._what["flow_every_s"] / max(1, len(self._flows))
        sending, until = True, float("inf")
        while time.monotonic() < until:
            for key, _ in self._selector.select(0.002):
                if key.data is not None:
                    key.data(key.fileobj)
                elif sending:
                    sending, until = False, time.monotonic() + LATE_S + 0.2
            now = time.monotonic()
            while sending and self._flows and next_flow <= now:
                self._send()
                next_flow += flow_every
            while sending and self._what["fresh"] and next_fresh <= now:
                self._connect()
                next_fresh += self._what["fresh_every_s"]
            self._give_up(now)
        return self._fates

    def _send(self) -> None:
        sock = self._flows[len(self._fates.flows) % len(self._flows)]
        number = len(self._fates.flows)
        self._fates.flows.append((time.monotonic(), None))
        with contextlib.suppress(OSError):
            sock.send(b"%d" % number)

    def _on_answer(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                number, now = int(sock.recv(64)), time.monotonic()
                sent, _ = self._fates.flows[number]
                self._fates.flows[number] = (sent, now - sent)

    def _connect(self) -> None:
        address = self._what["fresh"][self._turn % len(self._what["fresh"])]
        self._turn += 1
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        self._open[sock] = len(self._fates.fresh)
        self._fates.fresh.append((time.monotonic(), None))
        with contextlib.suppress(BlockingIOError):
            sock.connect((address, self._what["port"]))
        self._selector.register(sock, selectors.EVENT_WRITE, self._on_connected)

    def _on_connected(self, sock: socket.socket) -> None:
        number, now = self._open[sock], time.monotonic()
        sent, _ = self._fates.fresh[number]
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 and now - sent < LATE_S:
            self._fates.fresh[number] = (sent, now - sent)
        self._close(sock)

    def _give_up(self, now: float) -> None:
        for sock, number in list(self._open.items()):
            if now - self._fates.fresh[number][0] < LATE_S:
                return
            self._close(sock)

    def _close(self, sock: socket.socket) -> None:
        del self._open[sock]
        self._selector.unregister(sock)
        # Hang up at once: a thousand connections in TIME_WAIT help nobody.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        sock.close()


if __name__ == "__main__":
    _hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))
    json.dump(asdict(_Loop(json.loads(sys.stdin.readline())).run()), sys.stdout)
