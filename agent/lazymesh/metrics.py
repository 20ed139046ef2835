"""Prometheus metrics, and the small HTTP server for /metrics, /healthz and /readyz.

Names are CFP-44921's where it proposed one, else ``lazymesh_<noun>_<unit>``. No label ever holds an address. What the
kernel counts is read when somebody scrapes.
"""

from __future__ import annotations

import threading
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lazymesh.errors import LazymeshError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

RESOLUTION_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""Seconds: from a co-located etcd's answer to the read's time limit."""

Sample = tuple[tuple[str, ...], float]
"""Label values, value."""


class Metrics:
    """Everything the agent counts by itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = self._counter, self._gauge
        self.signals = counter(
            "cilium_ipcache_miss_signal", "Miss signals that reached the agent", "direction"
        )
        self.duration = Histogram(
            "cilium_ipcache_miss_resolution_duration_seconds",
            "From the packet's miss to its answer in force",
            ("outcome",),
            registry=self.registry,
            buckets=RESOLUTION_BUCKETS,
        )
        self.errors = counter(
            "cilium_ipcache_miss_resolution_errors", "Misses that got no entry, by reason", "reason"
        )
        self.outcomes = counter("lazymesh_resolutions", "Ends of resolutions", "outcome", "cached")
        self.evictions = counter("lazymesh_entries_evicted", "Entries of ours taken out, by why", "why")
        self.muted = gauge("lazymesh_datapath_muted", "1 while the kernel is told to signal nothing")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

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
        """Give the names without reading anything: registration must not touch the datapath."""
        return [self._make()]

    def collect(self) -> Iterable[Metric]:
        """Read now."""
        metric = self._make()
        for labels, value in self._read():
            metric.add_metric(labels, value)
        return [metric]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Scrapes are no news."""


class HttpServer:
    """Serves /metrics, /healthz and /readyz from threads of its own.

    ready: returns None when ready, else one line saying what is still missing.
    """

    def __init__(self, address: tuple[str, int], metrics: Metrics, ready: Callable[[], str | None]) -> None:
        self._metrics_app = make_wsgi_app(metrics.registry)
        self._ready = ready
        host, port = address
        family = type("_Server6", (_Server,), {"address_family": 10}) if ":" in host else _Server
        try:
            self._server: WSGIServer = make_server(
                host, port, self._serve, server_class=family, handler_class=_Quiet
            )
        except OSError as exc:
            raise LazymeshError(
                f"cannot serve metrics on {host}:{port}: {exc.strerror}; choose another --metrics-address"
            ) from exc
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO")
        if path == "/metrics":
            return self._metrics_app(environ, start)  # type: ignore[no-any-return]
        missing = self._ready() if path == "/readyz" else None
        if path not in ("/healthz", "/readyz"):
            status, text = "404 Not Found", "try /metrics, /healthz or /readyz"
        elif missing:
            status, text = "503 Service Unavailable", missing
        else:
            status, text = "200 OK", "ok"
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [text.encode() + b"\n"]
