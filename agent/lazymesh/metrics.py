"""Prometheus metrics, and the small HTTP server for /metrics, /healthz and /readyz.

Names are CFP-44921's where it proposes one, otherwise ``lazymesh_<noun>_<unit>``. No label ever holds an address. What
the kernel counts is read at each scrape. Everything runs on the event loop: nothing changes while it is being read, and
an agent whose loop hangs does not answer /healthz.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_left, bisect_right
from functools import partial
from itertools import accumulate, pairwise, repeat
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from lazymesh import __version__
from lazymesh.errors import LazymeshError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

RESOLUTION_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""Seconds: from the answer of an etcd on the same node to the time limit of a read."""

_MANY = 16
"""Durations from which on finding each bound's place among them takes less than finding the bucket of each."""

REQUEST_LIMIT_S = 5.0
"""A client that has not sent its request and taken the answer after this long is disconnected."""
CONNECTIONS = 32
"""How many at once; one more, and the oldest is closed. A probe sends its request at once, and is answered."""
_PLAIN = "text/plain; charset=utf-8"

Sample = tuple[tuple[str, ...], float]
"""Label values, value."""


class Metrics:
    """What the agent counts itself, and the registry of all metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.collect_gauge(
            "lazymesh_build_info", "1, for the running version", ("version",), lambda: [((__version__,), 1)]
        )
        counter = self._counter
        self.signals = counter(
            "cilium_ipcache_miss_signal", "Miss signals that reached the agent", "direction"
        )
        self.duration = Durations(
            "cilium_ipcache_miss_resolution_duration_seconds",
            "From the miss of a packet until its answer is in force",
        )
        self.registry.register(self.duration)
        self.errors = counter(
            "cilium_ipcache_miss_resolution_errors", "Misses that got no entry, by reason", "reason"
        )
        self.outcomes = counter("lazymesh_resolutions", "Ends of resolutions", "outcome", "cached")
        self.evictions = counter(
            "lazymesh_entries_evicted", "Entries that lazymesh removed, by reason", "reason"
        )
        self.hung_up = counter(
            "lazymesh_http_connections_dropped",
            "Connections that this server closed: request or answer took too long, or there were too many",
            "reason",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def collect_counter(
        self, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Iterable[Sample]]
    ) -> None:
        """Export counts kept elsewhere, read at each scrape."""
        self.registry.register(_Reading(CounterMetricFamily, name, text, labels, read))

    def collect_gauge(
        self, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Iterable[Sample]]
    ) -> None:
        """Export a state kept elsewhere, read at each scrape."""
        self.registry.register(_Reading(GaugeMetricFamily, name, text, labels, read))


class Durations(Collector):
    """A histogram by outcome that is cheap to update, as every miss does."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._counts: dict[str, list[int]] = {}
        """By outcome; one count for each bucket, and a last one for what is beyond."""
        self._sums: dict[str, float] = {}

    def observe(self, outcome: str, durations: Sequence[float]) -> None:
        """Add durations in seconds; negative ones count as zero."""
        counts = self._counts.get(outcome)
        if counts is None:
            counts = self._counts[outcome] = [0] * (len(RESOLUTION_BUCKETS) + 1)
            self._sums[outcome] = 0.0
        if len(durations) < _MANY:
            for bucket in map(partial(bisect_left, RESOLUTION_BUCKETS), durations):
                counts[bucket] += 1
            self._sums[outcome] += sum(map(max, durations, repeat(0.0)))
            return
        durations = sorted(durations)  # they come almost in order
        ends = [0, *map(partial(bisect_right, durations), RESOLUTION_BUCKETS), len(durations)]
        for bucket, (begin, end) in enumerate(pairwise(ends)):
            counts[bucket] += end - begin
        self._sums[outcome] += sum(durations[bisect_left(durations, 0.0) :])

    def describe(self) -> Iterable[Metric]:
        """Return the family without samples."""
        return [HistogramMetricFamily(self._name, self._text, labels=("outcome",))]

    def collect(self) -> Iterable[Metric]:
        """Return what was observed."""
        metric = HistogramMetricFamily(self._name, self._text, labels=("outcome",))
        bounds = [*(str(float(bound)) for bound in RESOLUTION_BUCKETS), "+Inf"]
        for outcome, counts in self._counts.items():
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            metric.add_metric((outcome,), buckets, self._sums[outcome])
        return [metric]


class _Reading(Collector):
    def __init__(
        self,
        family: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        text: str,
        labels: tuple[str, ...],
        read: Callable[[], Iterable[Sample]],
    ) -> None:
        self._make: Callable[[], CounterMetricFamily | GaugeMetricFamily] = lambda: family(
            name, text, labels=labels
        )
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Return the family without reading anything: registration must not touch the datapath."""
        return [self._make()]

    def collect(self) -> Iterable[Metric]:
        """Read the samples."""
        metric = self._make()
        for labels, value in self._read():
            metric.add_metric(labels, value)
        return [metric]


class HttpServer:
    """Serves /metrics, /healthz and /readyz; one request per connection.

    ready: returns None when ready, otherwise one line that says what is missing.
    """

    def __init__(self, address: tuple[str, int], metrics: Metrics, ready: Callable[[], str | None]) -> None:
        self._address = address
        self._registry = metrics.registry
        self._hung_up = metrics.hung_up
        self._ready = ready
        self._connections: dict[asyncio.WriteTransport, None] = {}
        """Oldest first."""
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; LazymeshError if the port is taken or the address is not this node's."""
        host, port = self._address
        try:
            # asyncio also accepts up to this many in one turn of the loop, before any of them can be closed.
            self._server = await asyncio.start_server(self._serve, host, port, backlog=CONNECTIONS)
        except OSError as exc:
            # asyncio repeats the address in strerror; a name that does not resolve has no errno of its own.
            why = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            raise LazymeshError(
                f"cannot serve metrics on {where}: {why}; choose another --metrics-address"
            ) from exc

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._make_room()
        transport = writer.transport
        self._connections[transport] = None
        # Then what is drained has been handed to the kernel, and closing waits for no client.
        transport.set_write_buffer_limits(0)
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                path, accept = await _request(reader)
                status, kind, body = self._answer(path, accept)
                head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
                await writer.drain()
        except TimeoutError:
            self._hung_up.labels("late").inc()
        except (OSError, ValueError):
            pass  # the client left, or a line is longer than any in a request that we answer
        finally:
            self._connections.pop(transport, None)
            transport.abort()

    def _make_room(self) -> None:
        if len(self._connections) == CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.abort()
            self._hung_up.labels("crowded").inc()

    def _answer(self, path: str, accept: str) -> tuple[str, str, bytes]:
        try:
            return self._page(path, accept)
        except Exception as exc:
            # A bug; whatever its type, it must not look like a client that has left.
            error = {"message": f"cannot answer {path}", "exception": exc}
            asyncio.get_running_loop().call_exception_handler(error)
            return "500 Internal Server Error", _PLAIN, b"cannot answer: see the agent's log\n"

    def _page(self, path: str, accept: str) -> tuple[str, str, bytes]:
        if path == "/metrics":
            encode, kind = choose_encoder(accept)
            return "200 OK", kind, encode(self._registry)
        missing = self._ready() if path == "/readyz" else None
        if path not in ("/healthz", "/readyz"):
            return "404 Not Found", _PLAIN, b"try /metrics, /healthz or /readyz\n"
        if missing:
            return "503 Service Unavailable", _PLAIN, f"{missing}\n".encode()
        return "200 OK", _PLAIN, b"ok\n"


async def _request(reader: asyncio.StreamReader) -> tuple[str, str]:
    """Read a request's head; return its path, without the query, and its Accept header."""
    words = (await reader.readline()).decode("latin-1").split()
    if len(words) < 2:
        raise ValueError("no request line")
    accept = ""
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        if name.lower() == "accept":
            accept = value.strip()
    return words[1].partition("?")[0], accept
